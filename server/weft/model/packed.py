"""Linear modules of an unquantized base on a CPU, with weights laid out once in the order in which they are read.

torch lays out a bfloat16 weight again in every call, which for a handful of rows costs as much as the product itself.
If the processor multiplies pairs of bfloat16, the product is our own (kernels/cpu/gemm.py), otherwise oneDNN's. Both
sum in float32, and add a bias before rounding, not after. Packed weights have no gradient, so this is for serving only.
A head that shares its weight with the embedding is held twice: one copy for looking up rows, the other for the product.
"""

from typing import cast

import torch
from torch import Tensor, nn

from weft.kernels.cpu import gemm

_ROWS_EXPECTED = 16  # the number that oneDNN's layout is chosen for; any other works too


class PackedLinear(nn.Module):
    """The product and bias of an nn.Linear, computed by our own kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._lay_out(linear.weight.detach())

    def _lay_out(self, weight: Tensor) -> None:
        self._packed = gemm.pack(weight)

    @property
    def weight(self) -> Tensor:
        """The original weight [O, I], in new memory: for inspection, not for the hot path."""
        return gemm.unpack(self._packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for `x` [..., I]."""
        return gemm.linear(x, self._packed, self.bias)


class OneDnnLinear(PackedLinear):
    """The same, computed by oneDNN, whose product has torch's bits."""

    def _lay_out(self, weight: Tensor) -> None:
        self._reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED)

    @property
    def weight(self) -> Tensor:
        """The original weight [O, I], in new memory: for inspection, not for the hot path."""
        return cast(Tensor, self._reordered.to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for `x` [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, "none", [], "")


def pack(model: nn.Module) -> int:
    """Lay out the weights of a model for the best available product (`lay_out`); return how many there were."""
    if gemm.available():
        return lay_out(model, PackedLinear)
    return lay_out(model, OneDnnLinear) if multiplies_bfloat16() else 0


def multiplies_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this processor.

    It needs AVX-512. With AVX2 alone it refuses, and torch's own product then takes 4 times as long as in float32 for
    16 rows, and 8 times for 600 (1536 × 576, one core of an EPYC).
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lay_out(model: nn.Module, kind: type[PackedLinear]) -> int:
    """Replace every plain bfloat16 nn.Linear of a model on a CPU, in place; return how many there were."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu"
    ]
    for name, module in found:
        model.set_submodule(name, kind(module))
    return len(found)
