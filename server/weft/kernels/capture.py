"""Capture a device's work once, and replay it without issuing it again."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from weft.errors import chain
from weft.kernels import faults

_HEADROOM_BYTES = 512 << 20
"""Left free by captures: steps with prompts need it for activations, dequantized weights and sorted logits, and CUDA
needs it for the graphs themselves."""
_SURVIVES_FROM = (2, 12)  # of torch: github.com/pytorch/pytorch/pull/180395

Replay = Callable[[], Tensor]
"""Computes the captured step from the current contents of its inputs. The result is the same tensor every time."""


class NotCapturable(Exception):
    """The function did something that cannot be captured. It can still be called directly.

    Raised by a proof before a capture, by a capture that can be dropped, or after a failed capture if torch survives
    one. The memory of that capture may then be lost.
    """


class Capture(Protocol):
    """Captures a function from tensors at fixed addresses to one tensor."""

    @property
    def needs_proof(self) -> bool:
        """Whether a failed capture does harm, so that host_reads.py must first prove the function."""
        ...

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """Capture the function.

        Raises NotCapturable, torch.OutOfMemoryError, and errors that are fatal for the device (faults.py).
        """
        ...


class CaptureDevice(Protocol):
    """The device operations that a capture needs."""

    def warm_up(self, function: Callable[[], Tensor]) -> int:
        """Call the function once; return its peak memory in bytes, beyond what was already allocated."""
        ...

    def room_bytes(self) -> int:
        """Return how many more bytes a capture may take."""
        ...

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """Call the function, capturing its kernel calls instead of executing them."""
        ...


class CudaGraphs:
    """Captures CUDA graphs. They share memory: a replay overwrites the results of earlier ones.

    torch_version: decides whether a failed capture is fatal.
    """

    needs_proof = True

    def __init__(self, device: CaptureDevice | None = None, torch_version: str = torch.__version__) -> None:
        self._device = CudaDevice() if device is None else device
        self._torch_version = torch_version

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """Capture the function.

        Raises OutOfMemoryError before the capture begins, since running out of memory during one may be fatal; errors
        of the device as they are; CaptureLost; NotCapturable.
        """
        wanted = self._device.warm_up(function) + _HEADROOM_BYTES
        room = self._device.room_bytes()
        if room < wanted:
            raise torch.OutOfMemoryError(f"no room to capture a graph: {room >> 20} MiB of {wanted >> 20} MiB")
        try:
            return self._device.capture(function)
        except Exception as error:
            if not survives_failure(self._torch_version):
                raise faults.CaptureLost(
                    f"a capture failed, and torch {self._torch_version} does not survive that: {error}"
                ) from error
            causes = list(chain(error))
            for cause in causes:
                if faults.is_out_of_memory(cause) or (faults.is_fatal(cause) and not faults.is_of_capture(cause)):
                    raise cause from None
            if not isinstance(error, RuntimeError):
                raise
            raise NotCapturable(str(causes[-1])) from error


class CudaDevice:
    """Captures on the current CUDA device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Tensor]) -> int:
        """Keep what only a first call does (compiling, libraries' workspaces) out of the capture."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            function()
        torch.cuda.current_stream().wait_stream(self._aside)
        return torch.cuda.max_memory_allocated() - before

    def room_bytes(self) -> int:
        """Count the driver's free memory and the unused memory that torch holds, which the graphs' pool can use."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """Capture in mode thread_local, because threads that load adapters pin memory at the same time."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # torch leaves its own stream current if the end of a capture fails
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def survives_failure(torch_version: str) -> bool:
    """Return whether this torch ("2.13.0+cu130") can go on after a failed capture.

    Before 2.12 its allocator assumes forever that the capture is still running, and a later wait ends the process.
    """
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) >= _SURVIVES_FROM
