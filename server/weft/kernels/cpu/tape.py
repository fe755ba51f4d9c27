"""Decode steps recorded on the CPU: what a model tells the kernels, noted once and told again without the model.

A step of a small model is hundreds of kernels of some microseconds each, and model code takes as long to ask for them.
A tape notes every kernel call with its packed record, and every operation of torch with its tensors; runs of kernels
are then one call. Tensors lie in an arena where they stay; a place is taken again, in the same order as when it was
recorded, once nobody held it any more.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.kernels.cpu import library, pointwise
from weft.kernels.recording import Replay, Unrecordable

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
_LOOKS_AT_KINDS = frozenset({_aten._has_compatible_shallow_copy_type.default})  # of tensors, not at what they hold


class Arena:
    """Memory of recorded steps. They share it, since one ends before the next begins: each takes places from the start.

    What a recording hands out is free again when the last tensor over it is gone.
    """

    def __init__(self) -> None:
        self._places: list[tuple[ctypes.Array[ctypes.c_char], int]] = []  # memory, and where its aligned part begins
        self._taken: dict[int, weakref.ref[Any]] = {}  # by place: what the tensors over it hold

    @property
    def num_bytes(self) -> int:
        """What all places take."""
        return sum(len(memory) for memory, _ in self._places)

    def begin(self) -> None:
        """A recording begins; nothing of it holds a place yet."""
        self._taken = {}

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, strides and dtype, its elements whatever was there."""
        num_bytes = (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize
        place = self._place(num_bytes)
        memory, begin = self._places[place]
        held = (ctypes.c_char * num_bytes).from_buffer(memory, begin)
        self._taken[place] = weakref.ref(held)
        return torch.frombuffer(held, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies here."""
        at = tensor.untyped_storage().data_ptr()
        return any(0 <= at - ctypes.addressof(memory) < len(memory) for memory, _ in self._places)

    def _place(self, num_bytes: int) -> int:
        """The smallest free place of so many bytes, or a new one."""
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


class Tapes:
    """Records functions on the CPU (kernels/recording.py, Record)."""

    needs_proof = False  # a tape sees what is read while it notes, and what it noted is dropped then

    def __init__(self) -> None:
        self._arena = Arena()
        self._is_warm = False

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        if not self._is_warm:
            function()  # what is done in a first call only, such as packing a weight, is not to be recorded
            self._is_warm = True
        self._arena.begin()
        tape = _Tape(self._arena)
        with library.noting(tape.note), tape:
            result = function()
        steps = tape.steps()

        def replay(kept: Sequence[object] = tape.kept) -> Tensor:
            for step in steps:
                step()
            return result

        return replay


class _Tape(TorchDispatchMode):
    """What was asked for, in order."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self._noted: list[Callable[[], object] | tuple[str, bytes]] = []
        self.kept: list[object] = []

    def note(self, kernel: str, record: bytes, held: tuple[object, ...]) -> None:
        """A kernel was called."""
        self._noted.append((kernel, record))
        self.kept += held

    def steps(self) -> list[Callable[[], object]]:
        """What to call, one after another, to do it all again."""
        made: list[Callable[[], object]] = []
        run: list[tuple[str, bytes]] = []
        for noted in [*self._noted, lambda: None]:
            if isinstance(noted, tuple):
                run.append(noted)
                continue
            if run:
                made.append(library.replay_of(run))
                run = []
            made.append(noted)
        return made[:-1]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _has_open_shape(operation, args):
            raise Unrecordable(f"{operation}: the shape of what it makes depends on what tensors hold")
        if operation._schema.is_mutable:
            return self._change(operation, args, kwargs)
        result = operation(*args, **kwargs)
        if operation in _LOOKS_AT_KINDS:
            return result
        made = [result] if isinstance(result, Tensor) else result
        if not isinstance(made, (tuple, list)) or not all(one is None or isinstance(one, Tensor) for one in made):
            raise Unrecordable(f"{operation}: what follows may depend on the {type(result).__name__} that it gives")
        if operation in _ALLOCATIONS:
            return self._held(result)
        if all(one is None or _is_view(one, args, kwargs) for one in made):
            return result
        if isinstance(result, Tensor):
            return self._one(operation, args, kwargs, result)
        return self._several(operation, args, kwargs, made)

    def _held(self, result: Tensor) -> Tensor:
        """A place for what an operation makes."""
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
            self._noted.append(lambda: held.copy_(operation(*args, **kwargs)))
        return held

    def _several(
        self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        held = [None if one is None else self._held(one).copy_(one) for one in results]

        def again() -> None:
            for here, there in zip(held, operation(*args, **kwargs), strict=True):
                if here is not None:
                    here.copy_(there)

        self._noted.append(again)
        return held

    def _change(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if operation is _aten.copy_.default and pointwise.compute(operation, args, kwargs, args[0]):
            self._keep(args)
            return args[0]
        self._noted.append(lambda: operation(*args, **kwargs))
        return operation(*args, **kwargs)

    def _keep(self, args: Sequence[Any]) -> None:
        """A kernel's record has the addresses of its operands; those outside the arena are to stay."""
        self.kept += [one for one in tree_leaves(args) if isinstance(one, Tensor) and not self._arena.holds(one)]


def _has_open_shape(operation: Any, args: Sequence[Any]) -> bool:
    """Whether what a tensor holds decides on the shape of the result: an index does only where it is a mask."""
    if operation is _aten.index.Tensor:
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return torch.Tag.dynamic_output_shape in operation.tags


def _is_view(result: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result lies where an operand does; oneDNN's own tensors lie nowhere that others can."""
    at = result.untyped_storage().data_ptr()
    given = (one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and not one.is_mkldnn)
    return any(one.untyped_storage().data_ptr() == at for one in given)
