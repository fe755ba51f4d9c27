"""Triton kernels on a machine without a GPU: import this before a kernel for CUDA, and make tensors on DEVICE.

tests/conftest.py switches Triton's interpreter on before anything imports Triton. Three faults in the interpreter of
Triton 3.6 are repaired here: bounds of loops, since numpy 2.4 no longer converts an array of one element to an int;
conversions of float32 to bfloat16, which it would truncate although a GPU rounds; and products of bfloat16, whose bits
it would multiply as integers. The products of two bfloat16 are exact in float32, so a kernel computes the same sums as
tensor cores, except for their order.
"""

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)


def _mend() -> None:
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensor, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_and_round(self: Any, source: Any, to: Any) -> Any:
        made = cast(self, source, to)
        if source.dtype.scalar == triton.language.float32 and to.scalar == triton.language.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            made.data = rounded.numpy().view(np.uint16)
        return made

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_widened(self, operand) for operand in (a, b)), *rest)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    builder.create_dot = dot_of_numbers
    builder.cast_impl = cast_and_round


def _widened(builder: Any, operand: Any) -> Any:
    is_narrow = operand.dtype.scalar == triton.language.bfloat16
    return builder.cast_impl(operand, triton.language.float32) if is_narrow else operand


if INTERPRETED:
    _mend()
