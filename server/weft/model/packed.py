"""Linear modules of an unquantized base on a CPU, their weights laid out once in the order in which they are read.

torch lays a bfloat16 weight out anew in every call, which for a handful of rows costs as much as the product itself.
Where the processor multiplies bfloat16 pairs the product is our own (kernels/cpu/gemm.py), elsewhere oneDNN's. Both sum
in float32; a bias is added before that is rounded, not after. Packed weights have no gradient, so this is for serving
only. A head that shares its weight with the embedding is held twice: rows are looked up in the one, and multiplied with
the other.
"""

from typing import cast

import torch
from torch import Tensor, nn

from weft.kernels.cpu import gemm

_ROWS_EXPECTED = 16  # what oneDNN's layout is chosen for; it serves any number


class PackedLinear(nn.Module):
    """The product and bias of an nn.Linear, by our own kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._lay_out(linear.weight.detach())

    def _lay_out(self, weight: Tensor) -> None:
        self._packed = gemm.pack(weight)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I] as it was, in new memory: for looking at, not for the hot path."""
        return gemm.unpack(self._packed)

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] for `x` [..., I]."""
        return gemm.linear(x, self._packed, self.bias)


class OneDnnLinear(PackedLinear):
    """The same by oneDNN, whose product has torch's bits."""

    def _lay_out(self, weight: Tensor) -> None:
        self._reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I] as it was, in new memory: for looking at, not for the hot path."""
        return cast(Tensor, self._reordered.to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] for `x` [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, "none", [], "")


def pack(model: nn.Module) -> int:
    """Lay out the weights of a model for the best product that there is (`lay_out`); how many there were."""
    if gemm.available():
        return lay_out(model, PackedLinear)
    return lay_out(model, OneDnnLinear) if onednn_available() else 0


def onednn_available() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this processor, which takes AVX-512 or a newer AVX2."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def lay_out(model: nn.Module, kind: type[PackedLinear]) -> int:
    """Replace every plain bfloat16 nn.Linear of a model on a CPU, in place; how many there were."""
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and child.weight.dtype is torch.bfloat16 and child.weight.device.type == "cpu"
    ]
    for module, name, child in found:
        setattr(module, name, kind(child))
    return len(found)
