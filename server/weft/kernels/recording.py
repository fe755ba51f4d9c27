"""Recording what a device is told to do, to have it done again without telling it anew."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from weft.kernels import faults

_HEADROOM_BYTES = 512 << 20
"""What recordings leave to steps with prompts, whose activations, dequantized weights and sorted logits take it, and to
CUDA for the graphs themselves."""
_SURVIVES_FROM = (2, 12)  # of torch: github.com/pytorch/pytorch/pull/180395

Replay = Callable[[], Tensor]
"""Computes what was recorded from what its inputs hold now; the result is the same tensor every time."""


class Unrecordable(Exception):
    """The function did something that cannot be recorded. It may be called unrecorded, as before.

    Raised before anything was recorded, by a recorder that drops what it noted, or after a capture that failed on a
    torch which survives that: the memory that the capture had taken may then be lost.
    """


class Record(Protocol):
    """Records a function that reads nothing but tensors, which stay where they are, and makes one."""

    @property
    def needs_proof(self) -> bool:
        """Whether failing does harm: a function has to be seen to read nothing on the host (host_reads.py) before."""
        ...

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """Record. Raises Unrecordable, torch.OutOfMemoryError, and what is fatal for the device (faults.py)."""
        ...


class Capturing(Protocol):
    """What a device is asked for when something is captured on it."""

    def warm_up(self, function: Callable[[], Tensor]) -> int:
        """Call the function once; how many bytes it took at most beside what was taken before."""
        ...

    def room_bytes(self) -> int:
        """What a capture may still take."""
        ...

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """Call the function while what it tells the device is captured, and nothing is computed."""
        ...


class CudaGraphs:
    """Records CUDA graphs. They share memory: a replay overwrites the results of those before it.

    torch_version: decides what a failed capture means.
    """

    needs_proof = True

    def __init__(self, capturing: Capturing | None = None, torch_version: str = torch.__version__) -> None:
        self._capturing = Cuda() if capturing is None else capturing
        self._torch_version = torch_version

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """Record. Raises OutOfMemoryError where there is no room, and then before the capture, since that may be fatal;
        errors of the device as they are; CaptureLost; Unrecordable.
        """
        wanted = self._capturing.warm_up(function) + _HEADROOM_BYTES
        room = self._capturing.room_bytes()
        if room < wanted:
            raise torch.OutOfMemoryError(f"no room to capture a graph: {room >> 20} MiB of {wanted >> 20} MiB")
        try:
            return self._capturing.capture(function)
        except Exception as error:
            if not survives_failure(self._torch_version):
                raise faults.CaptureLost(
                    f"a capture failed, and torch {self._torch_version} does not survive that: {error}"
                ) from error
            causes = list(faults.chain(error))
            for cause in causes:
                if faults.is_out_of_memory(cause) or (faults.is_fatal(cause) and not faults.is_of_capture(cause)):
                    raise cause from None
            if not isinstance(error, RuntimeError):
                raise
            raise Unrecordable(str(causes[-1])) from error


class Cuda:
    """Captures on the current CUDA device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Tensor]) -> int:
        """What is done in a first call only (compiling, libraries' workspaces) is not to be recorded."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            function()
        torch.cuda.current_stream().wait_stream(self._aside)
        return torch.cuda.max_memory_allocated() - before

    def room_bytes(self) -> int:
        """What the driver has, and what torch keeps of it unused: the graphs' pool cannot give that back."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        """Threads that load adapters go on pinning memory meanwhile, which is why the mode is thread_local."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # torch leaves its own current where the end of a capture fails
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def survives_failure(torch_version: str) -> bool:
    """Return whether a torch ("2.13.0+cu130") can go on after a capture that failed.

    Before 2.12 its allocator believes for ever that the capture goes on, and ends the process at a later wait.
    """
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) >= _SURVIVES_FROM
