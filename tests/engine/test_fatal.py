"""After an error of CUDA the engine ends; after any other it goes on."""

import pytest
import torch

from weft.engine.runner import is_fatal


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error in a name"), False),
    ],
)
def test_what_ends_the_engine(error: Exception, fatal: bool) -> None:
    assert is_fatal(error) is fatal
