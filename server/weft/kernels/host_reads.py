"""Prove, before a step is captured, that the host neither reads the device's tensors in it nor sends any there.

A read waits for the device, which a capture cannot do, and a replay would not repeat a decision based on it. A replay
would also repeat a send, from memory that is used for something else by then. A capture that fails on either may cost
the process (capture.py), so a step first runs once, watched and uncaptured.

Two modes of torch see more than one. A dispatch mode sees operations, even within composite ones and within kernels
written in Python, such as some of bitsandbytes. A function mode sees calls: those that become no operation (`tolist()`
and `numpy()` of memory that the host can read), and those that make tensors from Python's numbers.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.kernels.capture import NotCapturable

_aten = torch.ops.aten
_TORCHS_OWN = frozenset({"aten", "prims", "prim"})
_KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA, "meta": torch._C.DispatchKey.Meta}
_SKIPPED = (str(Path(torch.__file__).parent), __file__)

# Besides those that torch tags as such.
_READING_OPERATIONS = frozenset({_aten.is_nonzero.default, _aten._linalg_check_errors.default})
_INDEXING = frozenset({_aten.index.Tensor, _aten._unsafe_index.Tensor})
_WRITING_AT = frozenset(
    {
        _aten.index_put.default,
        _aten.index_put_.default,
        _aten._index_put_impl_.default,
        _aten._unsafe_index_put.default,
    }
)
_COPIES = frozenset({_aten._to_copy.default, _aten.copy_.default, _aten.copy.default, _aten._copy_from.default})

_READING_CALLS = frozenset(
    {
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.__repr__,
        Tensor.__format__,
        Tensor.__reduce_ex__,
    }
)
_MAKING_CALLS = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_INDEXING_CALLS = frozenset({Tensor.__getitem__, Tensor.__setitem__})


def prove(function: Callable[[], object], device: torch.device) -> None:
    """Call the function once. Raise NotCapturable, with call and place, if the host reads from or sends to the device.

    device: the device whose tensors are watched. If it is a CPU, every tensor is on the device and nothing ever moves;
        a call of to() then counts if it names the host by a string.
    """
    watch = _Watch(device)
    with _Operations(watch), _Calls(watch):
        function()
    watch.require_nothing()  # a caller may have caught the error


class _Watch:
    """A watched device, and the first read or send found on it."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self._found: NotCapturable | None = None

    def is_there(self, value: object) -> bool:
        """Return whether a value is a tensor on the device."""
        return isinstance(value, Tensor) and value.device.type == self.kind

    def has_any(self, values: object) -> bool:
        """Return whether any tensor among the arguments is on the device."""
        return any(map(self.is_there, tree_leaves(values)))

    def refuse(self, what: object, why: str) -> NoReturn:
        """Raise NotCapturable, and keep the first one raised."""
        error = NotCapturable(f"{what} {why} ({_place()})")
        self._found = self._found or error
        raise error

    def require_nothing(self) -> None:
        """Raise the first NotCapturable, if there was one."""
        if self._found is not None:
            raise self._found


def _place() -> str:
    """Return the innermost line outside torch."""
    for frame, line in traceback.walk_stack(None):
        if not frame.f_code.co_filename.startswith(_SKIPPED):
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return "?"


class _Calls(TorchFunctionMode):
    """Refuses calls from Python that read or send."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, watch = kwargs or {}, self._watch
        if function in _READING_CALLS and watch.is_there(args[0]):
            watch.refuse(function.__name__, "reads a tensor on the host")
        if function is Tensor.to and watch.is_there(args[0]) and any(map(_names_host, (*args[1:], *kwargs.values()))):
            watch.refuse("to", "reads a tensor on the host")
        if function in _INDEXING_CALLS and watch.is_there(args[0]) and _has_numbers(args[1]):
            watch.refuse(function.__name__, "sends a list of indices to the device")
        made = function(*args, **kwargs)
        if function in _MAKING_CALLS and not isinstance(args[0] if args else kwargs.get("data"), Tensor):
            self._require_on_host(function, made)
        if function is Tensor.new_tensor:
            self._require_on_host(function, made)
        return made

    def _require_on_host(self, function: Any, made: Tensor) -> None:
        if self._watch.is_there(made):
            self._watch.refuse(function.__name__, "sends numbers to the device")


def _names_host(argument: object) -> bool:
    return isinstance(argument, str) and argument.startswith("cpu")


def _has_numbers(index: object) -> bool:
    """Return whether an index holds numbers that torch turns into a tensor: a list, or an array."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Iterable) and not isinstance(part, Tensor) for part in parts)


class _Operations(TorchDispatchMode):
    """Refuses operations that read, send, or make shapes from values."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look(operation, args, kwargs)
        if operation._can_decompose():
            with self:
                return operation.decompose(*args, **kwargs)
        key = None if operation.namespace in _TORCHS_OWN else self._key(operation)
        if key is not None:
            with self:
                return operation._op_dk(key, *args, **kwargs)
        return operation(*args, **kwargs)

    def _key(self, operation: Any) -> Any:
        """Return the key under which a library registers its kernel for the device; None if it has none."""
        keys = (_KEYS.get(self._watch.kind), torch._C.DispatchKey.CompositeExplicitAutograd)
        return next((key for key in keys if key is not None and operation.has_kernel_for_dispatch_key(key)), None)

    def _look(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        watch = self._watch
        if operation in _INDEXING or operation in _WRITING_AT:
            return self._look_at_indices(operation, args, kwargs)
        if operation in _COPIES:
            return self._look_at_copy(operation, args, kwargs)
        if not watch.has_any((args, kwargs)):
            return None
        if operation in _READING_OPERATIONS or torch.Tag.data_dependent_output in operation.tags:
            watch.refuse(operation, "reads a tensor on the host")
        has_open_shape = torch.Tag.dynamic_output_shape in operation.tags
        if has_open_shape and kwargs.get("output_size") is None:  # repeat_interleave is given it
            watch.refuse(operation, "makes a shape of what tensors hold")
        return None

    def _look_at_indices(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        watch, (target, indices, *rest) = self._watch, args
        given = [index for index in indices if index is not None]
        if watch.is_there(target) and not all(map(watch.is_there, given)):
            watch.refuse(operation, "sends an index to the device")
        has_mask = any(index.dtype in (torch.bool, torch.uint8) for index in given)
        if not has_mask or not watch.has_any(given):
            return
        value = rest[0] if rest else kwargs.get("values")
        accumulates = rest[1] if len(rest) > 1 else kwargs.get("accumulate", False)
        if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu" and not accumulates:
            return  # one number at a mask fills it, as masked_fill does
        watch.refuse(operation, "makes a shape of what a mask holds")

    def _look_at_copy(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if operation is _aten._to_copy.default:
            source, goal = args[0].device, kwargs.get("device") or args[0].device
        else:
            source, goal = args[1].device, args[0].device
        kinds = torch.device(source).type, torch.device(goal).type
        if kinds[0] != kinds[1] and self._watch.kind in kinds:
            self._watch.refuse(operation, f"copies from {kinds[0]} to {kinds[1]}")
