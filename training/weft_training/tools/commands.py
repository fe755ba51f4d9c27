"""`weft adapters merge`, `arrow` and `convert`: make an adapter's directory from others, without a server."""

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from weft.cli import adapter_directory
from weft.cli.output import fail, note, print_line, size
from weft.config import AdapterLimits, ModelConfig, Quantization, typed_path

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods.protocol import Adapter, BaseShape
    from weft.model.loader import Base
    from weft_training.tools.merging import Rule

# Plain help, as in `weft`.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)

Output = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")]
BasePath = Annotated[
    Path, typer.Option("--base", help="Model directory of the base.", parser=typed_path, metavar="MODEL")
]

_SAFETENSORS = ("adapter_model.safetensors", "adapter.safetensors")
_PICKLE = "pytorch_adapter.bin"


# -- merge -------------------------------------------------------------------------------------------------------------


# How updates are combined: each is the function of that name in `merging`.
Strategy = Literal["exact", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"]


@app.command()
def merge(
    parts: Annotated[
        list[str], typer.Argument(metavar="DIR[=WEIGHT]...", help="LoRA directories and their weights; 1 by default.")
    ],
    output: Output,
    base: BasePath,
    strategy: Annotated[Strategy, typer.Option(help="Rule by which their updates are combined.")] = "exact",
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="[all but exact] Rank of the result.")] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="X", help="[ties, dare_*, magnitude_prune] Share of entries to keep, up to 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="[dare_*] Seed of the entries to drop.")] = None,
) -> None:
    """Merge LoRAs into one PEFT directory that any server accepts.

    exact adds their weighted updates as a composition does, and its rank is the sum of theirs. svd is its best
    approximation of rank R. The others first thin out the updates: magnitude_prune keeps the largest entries of each
    update, dare_linear random ones, and ties and dare_ties also average those that agree in sign. PEFT calls them cat,
    svd and ties_svd … None of them is PEFT's "linear", which adds A and B separately and is not the weighted sum.

    Example: weft adapters merge runs/polite=0.7 runs/brief=0.5 runs/both --base model --strategy svd --rank 8
    """
    with _making(output):
        rule = _rule(strategy, rank, density, seed)
        weighted = [_part(text) for text in parts]
        adapters, bound = _read_parts([path for path, _ in weighted], _loaded(base).shape)
        weights = [weight for _, weight in weighted]

        from weft.methods.checkpoint import directory
        from weft_training.tools import merging

        merged, kept = merging.merge(list(zip(adapters, weights, strict=True)), rule)
        directory.write(merged, output, bound)
    _report(output, merged)
    if kept < 1:
        note(f"rank {merged.rank} keeps at least {kept:.1%} of the norm of every module's update")
    if merged.rank > AdapterLimits().rank_max:
        note(f"a server takes rank {merged.rank} only with --adapter-rank-max {merged.rank} or more")


def _part(text: str) -> tuple[Path, float]:
    path, separator, weight = text.rpartition("=")
    try:
        value = float(weight) if separator else 1.0
    except ValueError:
        raise typer.BadParameter(f"must be DIR or DIR=WEIGHT, given {text!r}") from None
    if not math.isfinite(value) or value == 0:
        raise typer.BadParameter(f"weights must be finite and other than 0, given {text!r}")
    return Path(path if separator else text), value


def _rule(strategy: Strategy, rank: int | None, density: float | None, seed: int | None) -> "Rule":
    """Return how modules are merged. BadParameter for an option that the strategy lacks or ignores."""
    import torch

    from weft_training.tools import merging

    rule = getattr(merging, strategy)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    given = {"rank": rank, "density": density, "generator": generator}
    takes = inspect.signature(rule).parameters
    for name, value in given.items():
        option = "seed" if name == "generator" else name
        if name in takes and value is None:
            raise typer.BadParameter(f"--strategy {strategy} needs --{option}")
        if name not in takes and value is not None:
            raise typer.BadParameter(f"--{option} means nothing with --strategy {strategy}")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter(f"--density must be above 0 and at most 1, given {density}")
    return partial(rule, **{name: value for name, value in given.items() if name in takes})


def _read_parts(paths: list[Path], shape: "BaseShape") -> "tuple[list[Adapter], BaseShape]":
    """Return the adapters, and the base that their sum is for: the first that they name, or None.

    Digests of the same weights in several quantizations are one base. Raises ValueError for two bases, and for two
    sets of rotary factors, because no base fits their sum.
    """
    found = [adapter_directory.read(path, shape) for path in paths]
    named = {read.base_digest: path for path, read in zip(paths, found, strict=True) if read.base_digest is not None}
    holdings = {shape.digest: shape.held_as, **shape.same_weights}
    if len(named) > 1:
        if not named.keys() <= holdings.keys():
            bases = ", ".join(f"{path} for {digest[:12]}…" for digest, path in named.items())
            raise ValueError(f"the parts were trained for different bases: {bases}")
        *most, last = [holdings[digest] for digest in named]
        note(f"the base was held as {', '.join(most)} and {last} in their training; the sum is bound to {most[0]}")
    factors = {read.rope_factors: path for path, read in zip(paths, found, strict=True) if read.rope_factors}
    if len(factors) > 1:
        given = ", ".join(f"{path} with {name}" for name, path in factors.items())
        raise ValueError(f"the parts were trained with different rotary factors of the base: {given}")
    bound = replace(shape, digest=next(iter(named), ""), rope_factors=next(iter(factors), ""))
    return [read.adapter for read in found], bound


# -- arrow -------------------------------------------------------------------------------------------------------------


@app.command()
def arrow(
    output: Output,
    experts: Annotated[
        list[str],
        typer.Argument(metavar="ID=PATH…", help="LoRA directories, with the ids under which they are registered."),
    ],
    base: BasePath,
    quantization: Annotated[Quantization, typer.Option(help="Quantization on the server.")] = Quantization.NF4,
    top_k: Annotated[int, typer.Option(metavar="K", help="Experts that keep a gate.")] = 2,
    temperature: Annotated[float, typer.Option(help="Divisor of the logits.")] = 1.0,
) -> None:
    """Make an Arrow router (arXiv:2405.11157) over LoRA adapters, without training.

    Register the experts first and then OUT, like any adapter.
    """
    from weft.adapters.identifiers import check_adapter_id
    from weft.adapters.versions import digest_at
    from weft.methods import lora
    from weft.methods.checkpoint import directory, mixture
    from weft.methods.mixture import Expert, Mixture
    from weft_training.tools import arrow

    with _making(output):
        named = [_expert(text) for text in experts]
        held = _loaded(base, quantization)
        found, params = [], []
        for name, path in named:
            adapter = directory.load(path, held.shape, AdapterLimits())
            if adapter.method is not lora.METHOD:
                raise ValueError(f"{name}: must be a LoRA, which has directions, given {adapter.method.name}")
            if adapter.invocation_tokens:
                raise ValueError(f"{name}: must act on all tokens, given an activated LoRA")
            found.append(Expert(digest_at(path), check_adapter_id(name)))
            params.append(adapter.sites)
        config = arrow.config(len(found), top_k=top_k, temperature=temperature)
        router = arrow.router(arrow.norm_readers(held.model, held.shape), params, held.shape)
        mixture.write(Mixture(config, router, tuple(found)), output, held.shape)
    print_line(f"{output}: an Arrow mixture of {', '.join(name for name, _ in named)}, top {config.top_k}")


def _expert(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ValueError(f"expert: must be ID=PATH, given {text!r}")
    return name, Path(path)


# -- convert -----------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="An AdapterHub or PEFT directory.")],
    output: Output,
    base: BasePath,
) -> None:
    """Convert an adapter, such as AdapterHub's bottlenecks, to a form that servers accept.

    A pickled file (pytorch_adapter.bin) is read with torch's restricted unpickler, which makes tensors and nothing
    else. Servers never read pickles.
    """
    from weft.methods.checkpoint import directory
    from weft_training.tools import adapterhub

    with _making(output):
        path = source / adapter_directory.CONFIG_FILE
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{path}: must hold an object, given {type(config).__name__}")
        tensors, shape = _tensors(source), _loaded(base).shape
        if directory.is_adapterhub(config):
            adapter = adapterhub.read(config, tensors, shape, AdapterLimits())
        else:
            adapter = directory.read(config, tensors, {}, shape, AdapterLimits())
        # The weights that it was trained on are unknown, so it is bound to none.
        directory.write(adapter, output, replace(shape, digest=""))
    _report(output, adapter)


def _tensors(source: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    for name in _SAFETENSORS:
        if (source / name).is_file():
            return load_file(source / name)
    if not (source / _PICKLE).is_file():
        raise FileNotFoundError(f"{source} holds none of {', '.join((*_SAFETENSORS, _PICKLE))}")
    return _unpickled(source / _PICKLE)


def _unpickled(path: Path) -> "dict[str, Tensor]":
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: is no file of tensors alone: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path}: must hold tensors by name and nothing else")
    return found


# -- all three ---------------------------------------------------------------------------------------------------------


@contextmanager
def _making(output: Path) -> Iterator[None]:
    """Refuse an OUT that exists, and report an error inside the block in one line."""
    from weft.errors import WeftError

    if output.exists():
        raise fail(f"OUT: {output} exists; give another directory", code=2)
    try:
        yield
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None


def _loaded(path: Path, quantization: Quantization = Quantization.NONE) -> "Base":
    """Load the base. If only its shapes are read, any quantization will do."""
    from weft.model import loader

    return loader.load(ModelConfig(path=path, quantization=quantization, device="cpu"), attention="sdpa")


def _report(output: Path, adapter: "Adapter") -> None:
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    rank = f" rank {adapter.rank}," if adapter.rank else ""
    print_line(f"{output}: {adapter.method.name},{rank} {adapter.num_parameters:,} parameters, {size(num_bytes)}")
