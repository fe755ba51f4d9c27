"""Packed linear modules: as close to the formula as torch's, for any number of rows, and nothing else changes."""

import pytest
import torch
from torch import nn

from weft.kernels.cpu import gemm
from weft.model.packed import OneDnnLinear, PackedLinear, multiplies_bfloat16, pack

ONEDNN = pytest.param(
    OneDnnLinear, marks=pytest.mark.skipif(not multiplies_bfloat16(), reason="oneDNN multiplies no bfloat16 here")
)
OWN = pytest.param(
    PackedLinear, marks=pytest.mark.skipif(not gemm.available(), reason="no product of bfloat16 pairs here")
)


@pytest.mark.parametrize("kind", [OWN, ONEDNN])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 200])
@torch.inference_mode()
def test_the_product_is_as_near_to_the_formula_as_torchs(rows: int, kind: type[PackedLinear]) -> None:
    torch.manual_seed(rows)
    plain, biased = (nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16) for bias in (False, True))
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    wide = torch.randn(1, rows, 192, dtype=torch.bfloat16)[..., ::2]
    for linear in (plain, biased):
        laid_out = kind(linear)
        for given in (x, wide):
            bias = 0 if linear.bias is None else linear.bias.double()
            exact = nn.functional.linear(given.double(), linear.weight.double()) + bias
            error, torchs = ((out.double() - exact).abs() for out in (laid_out(given), linear(given)))
            assert (error <= 2**-8 * exact.abs() + 1e-6).all()
            assert error.mean() <= 1.001 * torchs.mean()
        assert torch.equal(laid_out.weight, linear.weight)
    assert kind is PackedLinear or torch.equal(kind(plain)(x), plain(x)), "oneDNN's has torch's bits"


@pytest.mark.parametrize("kind", [OWN, ONEDNN])
def test_only_plain_linear_modules_are_replaced(kind: type[PackedLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "available", lambda: kind is PackedLinear)

    class Own(nn.Linear):
        """Such as a quantized one, which has a better product of its own."""

    embedding = nn.Embedding(32, 16, dtype=torch.bfloat16)
    inner = nn.Sequential(Own(16, 16), nn.LayerNorm(16))
    model = nn.Sequential(nn.Linear(16, 16), inner, nn.Linear(16, 32, bias=False)).to(torch.bfloat16)
    model.append(nn.Linear(16, 16))  # float32
    model[2].weight = embedding.weight
    before = embedding.weight.clone()
    assert pack(model) == 2
    assert [type(model[0]), type(inner[0]), type(model[2])] == [kind, Own, kind]
    assert torch.equal(embedding.weight, before)
    assert pack(model) == 0, "once is enough"


@pytest.mark.parametrize(
    "missing",
    [(torch.backends.mkldnn, "is_available"), (torch.ops.mkldnn, "_is_mkldnn_bf16_supported")],
    ids=["a torch without oneDNN", "a processor without AVX-512"],
)
def test_without_either_product_a_model_stays_as_it_is(
    missing: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "available", lambda: False)
    monkeypatch.setattr(*missing, lambda: False)
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear
