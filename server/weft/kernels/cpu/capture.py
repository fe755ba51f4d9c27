"""CPU counterpart of CUDA graphs: captures a decode step's kernel calls and replays them without Python of the model.

A step of a small model consists of hundreds of kernels of a few microseconds each, and the model's Python code takes as
long to call them. A capture logs every kernel call with its packed record, and every operation of torch with its
tensors; a replay makes one call for each sequence of kernels. Tensors lie in an arena and stay there. As in the
captured step, a place is used again once no tensor is left in it.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.kernels.capture import NotCapturable, Replay
from weft.kernels.cpu import library, pointwise

_ALIGNMENT = 64  # bytes: a cache line
_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_LOOKS_AT_KINDS = frozenset({_aten._has_compatible_shallow_copy_type.default})  # of tensors, not at their elements


class Arena:
    """The memory of captured steps. They share it, since one ends before the next begins: each starts with all places.

    A place is free again when the last tensor in it is gone.
    """

    def __init__(self) -> None:
        self._places: list[tuple[ctypes.Array[ctypes.c_char], int]] = []  # memory, and the offset of its aligned part
        self._taken: dict[int, weakref.ref[Any]] = {}  # by place: the buffer that its tensors hold

    @property
    def num_bytes(self) -> int:
        """Bytes of all places."""
        return sum(len(memory) for memory, _ in self._places)

    def begin(self) -> None:
        """Begin a capture, with all places free."""
        self._taken = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape, strides and dtype; its elements are not set."""
        num_bytes = (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize
        place = self._place(num_bytes)
        memory, begin = self._places[place]
        held = (ctypes.c_char * num_bytes).from_buffer(memory, begin)
        self._taken[place] = weakref.ref(held)
        return torch.frombuffer(held, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in the arena."""
        at = tensor.untyped_storage().data_ptr()
        return any(0 <= at - ctypes.addressof(memory) < len(memory) for memory, _ in self._places)

    def _place(self, num_bytes: int) -> int:
        """Return the smallest free place of at least `num_bytes`, or a new one."""
        free = (
            place
            for place, (memory, _) in enumerate(self._places)
            if len(memory) - _ALIGNMENT >= num_bytes and ((held := self._taken.get(place)) is None or held() is None)
        )
        found = min(free, key=lambda place: len(self._places[place][0]), default=None)
        if found is not None:
            return found
        memory = ctypes.create_string_buffer(num_bytes + _ALIGNMENT)
        self._places.append((memory, -ctypes.addressof(memory) % _ALIGNMENT))
        return len(self._places) - 1


class CpuCapture:
    """Captures functions on the CPU (kernels/capture.py, Capture)."""

    needs_proof = False  # it sees reads while it captures, and can drop the capture

    def __init__(self) -> None:
        self._arena = Arena()
        self._is_warm = False

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        if not self._is_warm:
            function()  # work of a first call only, such as packing a weight, stays out of the capture
            self._is_warm = True
        self._arena.begin()
        log = _CallLog(self._arena)
        with library.logging_to(log.add), log:
            result = function()
        steps = log.steps()

        def replay(kept: Sequence[object] = log.kept) -> Tensor:
            for step in steps:
                step()
            return result

        return replay


class _CallLog(TorchDispatchMode):
    """The calls of kernels and operations, in order."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self._calls: list[Callable[[], object] | tuple[str, bytes]] = []
        self.kept: list[object] = []

    def add(self, kernel: str, record: bytes, held: tuple[object, ...]) -> None:
        """Log a kernel call; `held` keeps its operands alive."""
        self._calls.append((kernel, record))
        self.kept += held

    def steps(self) -> list[Callable[[], object]]:
        """Return the functions that repeat the step, in order."""
        made: list[Callable[[], object]] = []
        run: list[tuple[str, bytes]] = []
        for call in [*self._calls, lambda: None]:
            if isinstance(call, tuple):
                run.append(call)
                continue
            if run:
                made.append(library.replay_of(run))
                run = []
            made.append(call)
        return made[:-1]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _has_open_shape(operation, args):
            raise NotCapturable(f"{operation}: the shape of its result depends on the elements of tensors")
        if operation._schema.is_mutable:
            return self._change(operation, args, kwargs)
        result = operation(*args, **kwargs)
        if operation in _LOOKS_AT_KINDS:
            return result
        made = [result] if isinstance(result, Tensor) else result
        if not isinstance(made, (tuple, list)) or not all(one is None or isinstance(one, Tensor) for one in made):
            raise NotCapturable(f"{operation}: later steps may depend on the {type(result).__name__} that it returns")
        if operation in _ALLOCATIONS:
            return self._held(result)
        if all(one is None or _is_view(one, args, kwargs) for one in made):
            return result
        if isinstance(result, Tensor):
            return self._one(operation, args, kwargs, result)
        return self._several(operation, args, kwargs, made)

    def _held(self, result: Tensor) -> Tensor:
        """Return a place in the arena for the result of an operation."""
        if result.numel():
            return self._arena.like(result)
        self.kept.append(result)
        return result

    def _one(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Tensor:
        held = self._held(result)
        if pointwise.compute(operation, args, kwargs, held):
            self._keep(args)
        else:
            held.copy_(result)
            self._calls.append(lambda: held.copy_(operation(*args, **kwargs)))
        return held

    def _several(
        self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        held = [None if one is None else self._held(one).copy_(one) for one in results]

        def again() -> None:
            for here, there in zip(held, operation(*args, **kwargs), strict=True):
                if here is not None:
                    here.copy_(there)

        self._calls.append(again)
        return held

    def _change(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if operation is _aten.copy_.default and pointwise.compute(operation, args, kwargs, args[0]):
            self._keep(args)
            return args[0]
        self._calls.append(lambda: operation(*args, **kwargs))
        return operation(*args, **kwargs)

    def _keep(self, args: Sequence[Any]) -> None:
        """Keep operands outside the arena alive: a kernel's record has their addresses."""
        self.kept += [one for one in tree_leaves(args) if isinstance(one, Tensor) and not self._arena.holds(one)]


def _has_open_shape(operation: Any, args: Sequence[Any]) -> bool:
    """Return whether the elements of a tensor decide the shape of the result; an index does so only if it is a mask."""
    if operation is _aten.index.Tensor:
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return torch.Tag.dynamic_output_shape in operation.tags


def _is_view(result: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a result shares the memory of an operand; oneDNN's own tensors share none."""
    at = result.untyped_storage().data_ptr()
    given = (one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and not one.is_mkldnn)
    return any(one.untyped_storage().data_ptr() == at for one in given)
