"""What errors of a device mean for those who go on after them."""

from collections.abc import Iterator

import torch

_FATAL_TEXTS = ("CUDA error", "Triton Error [CUDA]")
_MEMORY_TEXTS = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CAPTURE_CODES = range(900, 909)  # cudaErrorStreamCaptureUnsupported to …WrongThread
_CAPTURE_TEXTS = ("captur",)  # every text of these codes has it


class CaptureLost(RuntimeError):
    """A capture failed on a torch whose allocator then believes for ever that it goes on; the process has to end."""


def is_fatal(error: BaseException) -> bool:
    """Return whether the device's memory can no longer be trusted: after an error of CUDA, whoever reports it.

    torch raises AcceleratorError, or a RuntimeError whose text begins with "CUDA error" where a library reports it;
    Triton's text begins with "Triton Error [CUDA]". Too little memory is no such error, but in a capture that does not
    survive it (CaptureLost).
    """
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    if isinstance(error, CaptureLost | torch.AcceleratorError):
        return True
    return any(text in str(error) for text in _FATAL_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device had too little memory, whoever asked for it: torch's allocator, CUDA or cuBLAS."""
    if isinstance(error, CaptureLost) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MEMORY_TEXTS)


def is_of_capture(error: BaseException) -> bool:
    """Return whether CUDA refused something because a capture was under way: nothing else is wrong with the device."""
    code = getattr(error, "error_code", None)
    return code in _CAPTURE_CODES or any(text in str(error) for text in _CAPTURE_TEXTS)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came after, the last first: the end of a failed capture hides its cause."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
