"""Classify errors of a device: fatal, out of memory, or only of a capture."""

import torch

_FATAL_TEXTS = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS_", "CUDNN_STATUS_", "illegal memory access")
_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
_CAPTURE_CODES = range(900, 909)  # cudaErrorStreamCaptureUnsupported to …WrongThread
_CAPTURE_TEXTS = ("captur",)  # every text of these codes has it


class CaptureLost(RuntimeError):
    """A capture failed, and torch's allocator assumes forever that it is still running, so the process has to end."""


def is_fatal(error: BaseException) -> bool:
    """Return whether the device's memory can no longer be trusted: after a CUDA error, whichever library reports it.

    torch raises AcceleratorError, or a RuntimeError whose text begins with "CUDA error" if a library reports it;
    Triton's text begins with "Triton Error [CUDA]", and some texts have only the status of cuBLAS or cuDNN. Running out
    of memory is not fatal, except in a capture that does not survive it (CaptureLost). Of an error without such a text
    only the device itself knows (`Runner.is_alive`).
    """
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    if isinstance(error, CaptureLost | torch.AcceleratorError):
        return True
    return any(text in str(error) for text in _FATAL_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device had too little memory for torch's allocator, CUDA or one of its libraries."""
    if isinstance(error, CaptureLost) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MEMORY_TEXTS)


def is_of_capture(error: BaseException) -> bool:
    """Return whether CUDA refused something only because a capture was under way. The device itself is fine."""
    code = getattr(error, "error_code", None)
    return code in _CAPTURE_CODES or any(text in str(error) for text in _CAPTURE_TEXTS)
