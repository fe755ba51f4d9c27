"""NF4 modules with another product: which modules, when it is called, and that only shadows are held twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.nn import functional as F

from weft.methods.base_weight import ModuleWeight
from weft.model.nf4_linear import Nf4Linear, expand_scales, replace

BFLOAT16 = torch.bfloat16


class Reference:
    """The product by its formula, and the number of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, packed: Tensor, scales: Tensor, code: Tensor, bias: Tensor | None) -> Tensor:
        self.calls += 1
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(len(scales), 64)
        weight = (code[codes.int()] * scales[:, None]).view(-1, x.shape[1]).to(x.dtype)
        return F.linear(x, weight, bias)


def quantized(size_in: int = 128, size_out: int = 96, *, bias: bool = True, **options: Any) -> Any:
    """Return a module as transformers loads it, but not repacked: that is for CPUs."""
    torch.manual_seed(size_in)
    plain = nn.Linear(size_in, size_out, bias=bias, dtype=options.pop("dtype", BFLOAT16))
    options = {"quant_type": "nf4", "compress_statistics": False} | options
    linear: Any = Linear4bit(size_in, size_out, bias=bias, compute_dtype=BFLOAT16, quant_type=options["quant_type"])
    linear.weight = Params4bit(plain.weight.data, requires_grad=False, module=linear, **options).to("cpu")
    linear.bias = plain.bias
    linear.support_avx512bf16_for_cpu = False
    return linear.requires_grad_(False).eval()


def model_of(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_few_rows_take_the_product_and_many_bitsandbytes(bias: bool) -> None:
    linear = quantized(bias=bias)
    weight = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    product = Reference()
    model = model_of(linear)
    assert replace(model, product) == 1
    made: Any = model[0]
    made.support_avx512bf16_for_cpu = False
    for rows, calls in ((1, 1), (64, 2), (65, 2), (300, 2)):
        x = torch.randn(1, rows, 128, dtype=BFLOAT16)
        torch.testing.assert_close(made(x), F.linear(x, weight, linear.bias), rtol=2**-7, atol=1e-3)
        assert product.calls == calls


def test_the_storage_is_bitsandbytes_own() -> None:
    linear = quantized()
    model = model_of(linear)
    replace(model, Reference())
    made: Any = model[0]
    assert isinstance(made, Nf4Linear)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert made.weight.quant_state is linear.weight.quant_state
    assert made.shadow is None
    for mine, theirs in zip(ModuleWeight(made).blocks(BFLOAT16), ModuleWeight(linear).blocks(BFLOAT16), strict=True):
        assert torch.equal(mine, theirs)
    assert replace(model, Reference()) == 0, "once is enough"


@torch.inference_mode()
def test_shadows_stay_within_their_budget_and_keep_the_bits() -> None:
    size = 128 * 96 * 2
    for budget, num_shadows in ((0, 0), (size - 1, 0), (size, 1), (2 * size, 2)):
        modules = [quantized() for _ in range(3)]
        model = model_of(*modules)
        replace(model, Reference(), shadow_bytes=budget)
        assert [made.shadow is not None for made in model] == [n < num_shadows for n in range(3)]
    x = torch.randn(70, 128, dtype=BFLOAT16)
    model[2].support_avx512bf16_for_cpu = False
    assert torch.equal(model[0](x), model[2](x))
    model[0].shadow.zero_()  # the shadow is read, but not for few rows
    assert torch.equal(model[0](x), modules[0].bias.expand(70, -1))
    assert torch.equal(model[0](x[:5]), model[2](x[:5]))


@torch.inference_mode()
def test_scales_that_are_quantized_are_written_out_once() -> None:
    linear = quantized(compress_statistics=True)
    before = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    model = model_of(linear, quantized(), nn.Linear(8, 8))
    assert replace(model, Reference()) == 1, "nested scales are not what the product reads"
    assert expand_scales(model) == 1
    assert linear.weight.quant_state.absmax.dtype is torch.float32
    assert torch.equal(bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state), before)
    assert expand_scales(model) == 0
    assert replace(model, Reference()) == 1
    x = torch.randn(3, 128, dtype=BFLOAT16)
    torch.testing.assert_close(model[0](x), F.linear(x, before, linear.bias), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantized(quant_type="fp4"),
        lambda: quantized(blocksize=128),
        lambda: quantized(size_in=96, size_out=64),
        lambda: quantized(dtype=torch.float32),
        lambda: nn.Linear(128, 96),
    ],
    ids=["fp4", "blocks of 128", "rows that end within a block", "float32", "not quantized"],
)
def test_what_the_product_does_not_know_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = model_of(quantized(), make())
    kind = type(model[1])
    assert replace(model, Reference()) == 1
    assert type(model[1]) is kind
