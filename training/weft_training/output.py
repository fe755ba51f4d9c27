"""Output directory of a run: written beside its place, read back as a server would, and renamed into place."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from weft import durable
from weft.adapters.identifiers import check_adapter_id
from weft.adapters.versions import digest_at
from weft.config import AdapterLimits
from weft.errors import InvalidRequest
from weft.methods.checkpoint import directory
from weft.methods.checkpoint import mixture as mixtures
from weft.methods.mixture import Expert, Mixture, MixtureParams
from weft.methods.protocol import Adapter, BaseShape
from weft.v1.adapter_files import MIXTURE_FILES, PEFT_FILES
from weft_training import adapter as adapters
from weft_training import card
from weft_training.config import SaveDtype
from weft_training.mixture import TrainedMixture

EXPERTS = "experts"  # directory of the experts that were trained with their router

_OUR_FILES = frozenset({*PEFT_FILES, *MIXTURE_FILES, EXPERTS, card.CARD_FILE, card.CURVE_FILE})


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if `output` holds files that may not be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output: {output} exists; give another directory, or overwrite it")
    if not output.is_dir() or {file.name for file in output.iterdir()} - _OUR_FILES:
        raise FileExistsError(f"output: {output} holds other files than an adapter's and is not overwritten")


def rehearse(made: Adapter | TrainedMixture, path: Path, shape: BaseShape) -> None:
    """Write as after training, so that hours of it cannot end in a directory that cannot be written or served."""
    # The experts stay as they are: filled alike, two of one method would be the same adapter.
    write(_mapped(made, lambda tensor: torch.full_like(tensor, 0.5), with_experts=False), path, shape)


def rounded(made: Adapter | TrainedMixture, dtype: SaveDtype) -> Adapter | TrainedMixture:
    """Return what was made, rounded to the dtype in which it is written."""
    return _mapped(made, lambda tensor: tensor.detach().to(getattr(torch, dtype.value)), with_experts=True)


def _mapped(
    made: Adapter | TrainedMixture, function: Callable[[Tensor], Tensor], *, with_experts: bool
) -> Adapter | TrainedMixture:
    if isinstance(made, Adapter):
        return adapters.map_tensors(made, function)
    own = [one.mapped(function) for one in made.experts] if with_experts and made.writes_experts else made.experts
    return made._replace(params=MixtureParams(function(made.params.weight)), experts=own)


def write(made: Adapter | TrainedMixture, path: Path, shape: BaseShape) -> None:
    """Write an adapter's or a mixture's directory, durably, and read it back as a server would."""
    try:
        if isinstance(made, Adapter):
            directory.write(made, path, shape)
        else:
            _write_mixture(made, path, shape)
    except OSError as error:  # the error of a full disk does not name what was written
        raise OSError(f"output: {path} could not be written: {error}") from error
    if isinstance(made, Adapter):
        adapters.read(path, shape)
    else:
        read_mixture(path, shape)
    for file in path.iterdir():
        durable.sync_file(file)


def read_mixture(path: Path, shape: BaseShape) -> Mixture:
    """Read the mixture in a directory. Raises what `weft.methods.checkpoint.mixture.read` raises."""
    config = json.loads((path / mixtures.CONFIG_FILE).read_text())
    return mixtures.read(config, load_file(path / mixtures.WEIGHTS_FILE), shape, AdapterLimits())


def _write_mixture(made: TrainedMixture, path: Path, shape: BaseShape) -> None:
    named = [Expert(one.digest, _hint(one.name)) for one in made.experts]
    if made.writes_experts:
        named = []
        for index, one in enumerate(made.experts):
            own = path / EXPERTS / _directory(index, made)
            write(one.adapter, own, shape)
            named.append(Expert(digest_at(own), _hint(own.name)))
    mixtures.write(Mixture(made.config, made.params, tuple(named)), path, shape)


def _hint(name: str) -> str:
    """Return a directory's name if it is a valid adapter id, else "", because servers check experts' names."""
    try:
        return check_adapter_id(name)
    except InvalidRequest:
        return ""


def _directory(index: int, made: TrainedMixture) -> str:
    """Return the expert's name, numbered if an earlier one has it too."""
    name = made.experts[index].name
    earlier = sum(one.name == name for one in made.experts[:index])
    return f"{name}-{earlier + 1}" if earlier else name


def replace_output(output: Path, result: Path) -> None:
    """Rename `result` to `output`. Readers find the old adapter, the new one, or for an instant none."""
    if output.exists():
        output.rename(result.with_name("replaced"))
    result.rename(output)
