"""Written files are valid safetensors, and the same content gives the same bytes."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from weft.adapters.safetensors_header import read_header
from weft.config import AdapterLimits
from weft.methods.checkpoint import safetensors_file


def test_the_library_and_our_own_parser_read_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(4, 2).bfloat16().mT,
        "c": torch.randn(1, 2, 3).half().requires_grad_(),
        "d": torch.randn(7, dtype=torch.float32)[::2],
    }
    path = tmp_path / "x.safetensors"
    metadata = {"weft_base_digest": "0" * 64, "format": "pt"}
    safetensors_file.write(path, tensors, metadata)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    with path.open("rb") as file:
        header = read_header(file, AdapterLimits())
    assert header.tensors.keys() == tensors.keys()
    assert header.metadata == metadata
    again = tmp_path / "y.safetensors"
    safetensors_file.write(again, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert again.read_bytes() == path.read_bytes()
