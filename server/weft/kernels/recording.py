"""Recording what a device is told to do, to have it done again without telling it anew."""

from collections.abc import Callable

import torch
from torch import Tensor

Replay = Callable[[], Tensor]
"""Computes what was recorded from what its inputs hold now; the result is the same tensor every time."""

Record = Callable[[Callable[[], Tensor]], Replay]
"""Records a function that reads nothing but tensors, which stay where they are, and makes one. Raises Unrecordable."""


class Unrecordable(Exception):
    """The function did something that cannot be recorded; the device is as it was."""


class CudaGraphs:
    """Records CUDA graphs. They share memory: a replay overwrites the results of those before it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            function()  # what is done in a first call only (compiling, libraries' workspaces) is not to be recorded
        torch.cuda.current_stream().wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: threads that load adapters go on pinning memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            raise Unrecordable(str(error)) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
