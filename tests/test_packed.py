"""Packed linear modules: the same bits as torch's, in any number of rows, and nothing else of the model changes."""

import pytest
import torch
from torch import nn

from weft.model.packed import PackedLinear, pack


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 200])
@torch.inference_mode()
def test_the_product_is_torchs_to_the_bit_and_the_bias_within_its_rounding(rows: int) -> None:
    torch.manual_seed(rows)
    plain, biased = (nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16) for bias in (False, True))
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    wide = torch.randn(1, rows, 192, dtype=torch.bfloat16)[..., ::2]
    packed = PackedLinear(plain)
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(packed(wide), plain(wide)), "rows need not be contiguous"
    assert torch.equal(packed.weight, plain.weight)
    exact = nn.functional.linear(x.double(), biased.weight.double(), biased.bias.double())
    error, torchs = ((out - exact).abs().max() for out in (PackedLinear(biased)(x), biased(x)))
    assert error <= torchs


def test_only_plain_linear_modules_are_replaced() -> None:
    class Own(nn.Linear):
        """Such as a quantized one, which knows its weight better."""

    embedding = nn.Embedding(32, 16, dtype=torch.bfloat16)
    inner = nn.Sequential(Own(16, 16), nn.LayerNorm(16))
    model = nn.Sequential(nn.Linear(16, 16), inner, nn.Linear(16, 32, bias=False)).to(torch.bfloat16)
    model.append(nn.Linear(16, 16))  # float32
    model[2].weight = embedding.weight
    before = embedding.weight.clone()
    assert pack(model) == 2
    assert [type(model[0]), type(inner[0]), type(model[2])] == [PackedLinear, Own, PackedLinear]
    assert torch.equal(embedding.weight, before)
    assert pack(model) == 0, "once is enough"
