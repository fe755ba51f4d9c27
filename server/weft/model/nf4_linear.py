"""Linear modules of an NF4 base on CUDA: for few rows, a product that reads the weight as it is stored.

bitsandbytes has such a product too. But on an H100, from 6 to 33 rows on, depending on shape, it writes out the whole
weight in 16 bits and reads that instead. This is right for prompts; here, a decode step may have up to 64 rows before
it happens.

A *shadow* is that 16-bit weight, kept: it spends free memory to speed up steps of more rows, whose bits stay the same.
Every layer is read once a step, so it does not matter which layers have one: the first that fit into the budget do.
"""

import logging
from collections.abc import Callable
from typing import Any

from weft.methods.bnb import Linear4bit
from weft.methods.bnb import functional as bnb

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_log = logging.getLogger(__name__)
_BLOCK_SIZE = 64  # weights per scale, bitsandbytes' default
_ROWS_MAX = 64

# (x [M, I], packed uint8, scales float32, code float32 [16], bias [O] or None) -> [M, O], for M up to 64:
# kernels/cuda/nf4.py
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Nf4Linear(Linear4bit):
    """A bitsandbytes module over the same storage, with another product for up to 64 rows and optionally a shadow."""

    def __init__(self, linear: Any, product: Product, shadow: Tensor | None = None) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=linear.compute_dtype,
            quant_type=linear.weight.quant_type,
            device="meta",
        )
        held: Any = linear.weight
        held.module = self
        self.weight, self.bias, self.quant_state = held, linear.bias, held.quant_state
        self.shadow = shadow
        self._product = product
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for `x` [..., I]."""
        rows = x.numel() // self.in_features
        if rows <= _ROWS_MAX:
            state = _state(self)
            flat = x.reshape(rows, self.in_features)
            out = self._product(flat, self.weight.data.view(-1), state.absmax, state.code, self.bias)
            return out.view(*x.shape[:-1], self.out_features)
        if self.shadow is not None:
            return F.linear(x, self.shadow, self.bias)
        return super().forward(x)


def expand_scales(model: nn.Module) -> int:
    """Hold scales that are quantized themselves as float32, in place; return how many modules had such scales.

    Otherwise they cost 15 to 20 % of a step, and modules with them are not held as one (model/groups.py).
    """
    expanded = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and _state(module).nested:
            state = _state(module)
            state.absmax = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested, state.state2, state.offset = False, None, None
            expanded += 1
    return expanded


def replace(model: nn.Module, product: Product, *, shadow_bytes: int = 0) -> int:
    """Replace the NF4 modules of a model that the product supports, in place; return how many were replaced.

    shadow_bytes: budget for the shadows of all modules together.
    """
    found = [
        (name, module) for name, module in model.named_modules() if type(module) is Linear4bit and _is_known(module)
    ]
    left, num_shadows = shadow_bytes, 0
    for name, module in found:
        state = _state(module)
        size_bytes = module.in_features * module.out_features * state.dtype.itemsize
        shadow = None
        if size_bytes <= left:
            left -= size_bytes
            num_shadows += 1
            shadow = bnb.dequantize_4bit(module.weight.data, state)
        model.set_submodule(name, Nf4Linear(module, product, shadow))
    if shadow_bytes:
        _log.info(
            "%d of %d quantized modules have a 16-bit copy: %d bytes", num_shadows, len(found), shadow_bytes - left
        )
    return len(found)


def _state(linear: Any) -> Any:
    """Return the weight's bnb.QuantState, as Any: its fields are typed as they may be before they are set."""
    return linear.weight.quant_state


def _is_known(linear: Any) -> bool:
    """Return whether the weight is NF4 in bytes, in blocks of 64 that end where rows end, with float32 scales."""
    state = _state(linear)
    return (
        state.quant_type == "nf4"
        and state.blocksize == _BLOCK_SIZE
        and not state.nested
        and state.absmax.dtype is torch.float32
        and state.dtype in (torch.bfloat16, torch.float16)
        and linear.compute_dtype in (None, state.dtype)
        and linear.weight.data.dtype is torch.uint8
        and linear.in_features % _BLOCK_SIZE == 0
        and (linear.bias is None or linear.bias.dtype is state.dtype)
    )
