"""torch's own operations on small tensors as kernel calls, for the work between the main kernels of a captured step.

The bits are torch's: computed in float32, rounded once. float32 and bfloat16, up to 5 dimensions.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.cpu import library

_DIMS = 5  # pointwise.cpp
_pack = struct.Struct(f"={1 + _DIMS + 3 * (2 + _DIMS)}q").pack  # Pointwise in pointwise.cpp
_ADD, _MULTIPLY, _NEGATE, _COPY = range(4)
_DTYPES = (torch.float32, torch.bfloat16)

_aten = torch.ops.aten


def compute(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> bool:
    """Compute an operation of torch into `out`, of its result's shape and dtype; return False if no kernel computes it.

    out: may share memory with the operands only element for element.
    """
    calls = _CALLS.get(operation)
    if calls is None:
        return False
    made = calls(out, *args, **kwargs)
    if made is None or not all(_is_served(*operands) for _, *operands in made):
        return False
    for number, *operands in made:
        _run(number, *operands)
    return True


_Calls = Sequence[tuple[int, Tensor, Tensor, Tensor]]  # (operation number, out, a, b) of each call


def _add(out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> _Calls | None:
    return _binary(_ADD, out, a, b) if alpha == 1 else None


def _multiply(out: Tensor, a: Any, b: Any) -> _Calls | None:
    return _binary(_MULTIPLY, out, a, b)


def _binary(number: int, out: Tensor, a: Any, b: Any) -> _Calls | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not out.dtype == a.dtype == b.dtype:
        return None
    return [(number, out, a.expand(out.shape), b.expand(out.shape))]


def _negate(out: Tensor, a: Tensor) -> _Calls:
    return [(_NEGATE, out, a, a)]


def _copy(out: Tensor, a: Tensor, *_: Any, **__: Any) -> _Calls:
    return [(_COPY, out, a, a)]


def _copy_into(out: Tensor, _: Tensor, a: Tensor, __: bool = False) -> _Calls:
    wide = a.expand(out.shape)
    return [(_COPY, out, wide, wide)]


def _cat(out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> _Calls | None:
    if any(part.dim() != out.dim() for part in parts):
        return None
    places = out.split([part.shape[dim] for part in parts], dim)
    return [(_COPY, place, part, part) for place, part in zip(places, parts, strict=True)]


_CALLS: Mapping[Any, Callable[..., _Calls | None]] = {
    _aten.add.Tensor: _add,
    _aten.mul.Tensor: _multiply,
    _aten.neg.default: _negate,
    _aten.cat.default: _cat,
    _aten.clone.default: _copy,
    _aten.contiguous.default: _copy,
    _aten._to_copy.default: _copy,
    _aten.to.dtype: _copy,
    _aten.copy_.default: _copy_into,
}


def _is_served(*operands: Tensor) -> bool:
    return all(one.is_cpu and one.dtype in _DTYPES and one.dim() <= _DIMS for one in operands)


def _run(number: int, out: Tensor, a: Tensor, b: Tensor) -> None:
    missing = _DIMS - out.dim()
    operands = [(one.data_ptr(), one.dtype is torch.bfloat16, *[0] * missing, *one.stride()) for one in (out, a, b)]
    library.run("weft_pointwise", _pack(number, *[1] * missing, *out.shape, *operands[0], *operands[1], *operands[2]))
