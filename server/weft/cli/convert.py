"""`weft adapters convert`: an adapter of another library as a directory that servers take. No server is asked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.output import fail, print_line, size
from weft.config import AdapterLimits, ModelConfig, Quantization, typed_path

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG_FILE = "adapter_config.json"
_SAFETENSORS = ("adapter_model.safetensors", "adapter.safetensors")
_PICKLE = "pytorch_adapter.bin"


def command(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="An AdapterHub or PEFT directory.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    base: Annotated[Path, typer.Option(help="The model directory that it is for.", parser=typed_path, metavar="MODEL")],
) -> None:
    """Convert an adapter, such as AdapterHub's bottlenecks, to a form that servers take.

    A pickled file (pytorch_adapter.bin) is read with torch's restricted unpickler, which makes tensors and nothing
    else. Servers read none at all.
    """
    from weft.errors import WeftError
    from weft.methods.checkpoint import directory
    from weft.model import loader

    if output.exists():
        raise fail(f"OUT: {output} exists; give another directory", code=2)
    try:
        config = json.loads((source / _CONFIG_FILE).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{source / _CONFIG_FILE}: must hold an object, given {type(config).__name__}")
        tensors = _tensors(source)
        # The weights are not looked at beyond their shapes, so any way of holding them will do.
        held = loader.load(ModelConfig(path=base, quantization=Quantization.NONE, device="cpu"), attention="sdpa")
        adapter = directory.read(config, tensors, {}, held.shape, AdapterLimits())
        # Nothing says which weights it was trained on, so it is bound to none.
        directory.write(adapter, output, replace(held.shape, digest=""))
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    print_line(f"{output}: {adapter.method.name}, {adapter.num_parameters:,} parameters, {size(num_bytes)}")


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
