"""Linear modules of an unquantized base on a CPU, their weights laid out once as oneDNN's product wants them.

torch lays a bfloat16 weight out anew in every call, which for a handful of rows costs as much as the product itself:
packed, 16 rows take about half the time. The product is the same to the bit; a bias is added before it is rounded, not
after. Packed weights have no gradient, so this is for serving only. A head that shares its weight with the embedding is
held twice: rows are looked up in the one, and multiplied with the other.
"""

from typing import cast

import torch
from torch import Tensor, nn

_ROWS_EXPECTED = 16  # what the layout is chosen for; it serves any number


class PackedLinear(nn.Module):
    """The product and bias of an nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_EXPECTED)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I] as it was, in new memory: for looking at, not for the hot path."""
        return cast(Tensor, self._packed.to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] for `x` [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> int:
    """Replace every plain bfloat16 nn.Linear of a model on a CPU, in place; how many there were."""
    if not torch.backends.mkldnn.is_available():
        return 0
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and child.weight.dtype is torch.bfloat16 and child.weight.device.type == "cpu"
    ]
    for module, name, child in found:
        setattr(module, name, PackedLinear(child))
    return len(found)
