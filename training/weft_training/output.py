"""The directory that a run makes: written beside its place, read back as a server would, and renamed into it."""

from pathlib import Path

import torch

from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft_training import adapter as adapters
from weft_training import card, checkpoint

_OUR_FILES = frozenset({directory.CONFIG_FILE, directory.WEIGHTS_FILE, card.CARD_FILE, card.CURVE_FILE})


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError where `output` holds what may not be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output: {output} exists; give another directory, or overwrite it")
    if not output.is_dir() or {file.name for file in output.iterdir()} - _OUR_FILES:
        raise FileExistsError(f"output: {output} holds other files than a PEFT adapter's and is not overwritten")


def rehearse(adapter: Adapter, path: Path, shape: BaseShape) -> None:
    """Write as after training: hours of it must not end in a directory that cannot be made, or that no server takes."""
    write(adapters.map_tensors(adapter, lambda t: torch.full_like(t, 0.5)), path, shape)


def write(adapter: Adapter, path: Path, shape: BaseShape) -> None:
    """Write a PEFT directory, durably, and read it back as a server would."""
    try:
        directory.write(adapter, path, shape)
    except OSError as error:  # a full disk is told without a word of what was written
        raise OSError(f"output: {path} could not be written: {error}") from error
    adapters.read(path, shape)
    for file in path.iterdir():
        checkpoint.sync(file)


def replace_output(output: Path, result: Path) -> None:
    """Rename `result` to `output`. Readers find the old adapter, the new one, or for an instant none."""
    if output.exists():
        output.rename(result.with_name("replaced"))
    result.rename(output)
