"""After an error of CUDA the engine ends; after any other it goes on."""

import pytest
import torch

from weft.kernels.faults import CaptureLost, is_fatal, is_of_capture, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (CaptureLost("a capture failed: CUDA out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("Error an illegal memory access was encountered at line 74 in file ops.cu"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error in a name"), False),
    ],
)
def test_what_ends_the_engine(error: Exception, fatal: bool) -> None:
    assert is_fatal(error) is fatal


@pytest.mark.parametrize(
    ("error", "memory", "capture"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (CaptureLost("CUDA error: out of memory"), False, False),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), False, True),
        (torch.AcceleratorError("CUDA error: dependency created on uncaptured work in another stream"), False, True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, False),
        (MemoryError("CUDA error: out of memory"), False, False),
    ],
)
def test_what_else_an_error_says(error: Exception, memory: bool, capture: bool) -> None:
    assert is_out_of_memory(error) is memory
    assert is_of_capture(error) is capture
