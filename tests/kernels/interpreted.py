"""Triton kernels on a machine without a GPU: import this before a kernel for CUDA, and make tensors on DEVICE.

tests/conftest.py switches Triton's interpreter on before anything imports Triton. Two things in the interpreter of
Triton 3.6 are mended here: numbers that bound loops, since numpy 2.4 no longer makes an int of an array of one
element, and products of bfloat16, whose bits it would multiply as whole numbers. The products of two bfloat16 are exact
in float32, so what the kernel computes is what tensor cores add up, but for the order.
"""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)


def _mend() -> None:
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_widened(self, operand) for operand in (a, b)), *rest)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter.InterpreterBuilder.create_dot = dot_of_numbers


def _widened(builder: Any, operand: Any) -> Any:
    is_narrow = operand.dtype.scalar == triton.language.bfloat16
    return builder.cast_impl(operand, triton.language.float32) if is_narrow else operand


if INTERPRETED:
    _mend()
