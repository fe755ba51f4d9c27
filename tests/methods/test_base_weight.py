"""Reading a base's weight by blocks gives the weight that the base computes with, in every form and at any time."""

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from tests.bases import Bases
from weft.config import Quantization
from weft.methods import base_weight
from weft.methods.base_weight import ModuleWeight
from weft.methods.inject import AdaptedLinear
from weft.methods.protocol import BaseWeight, SiteKind
from weft.model import loader


def _whole(base: loader.Base, name: str) -> Tensor:
    read_base = base.shape.sites[name].read_base
    assert read_base is not None

    def read(held: BaseWeight) -> Tensor:
        return torch.cat(list(held.blocks(torch.float32)))

    return read_base(read)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_plain_weight_is_itself(architecture: str, bases: Bases) -> None:
    """A linear module with weight W [O, I] and bias b is x Wᵀ + b; GPT-2's modules store W transposed."""
    base = bases(architecture)
    for site in base.shape.of_kind(SiteKind.LINEAR, SiteKind.HEAD):
        weight = _whole(base, site.name)
        assert weight.shape == (site.out_features, site.in_features)
        x = torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(1))
        assert site.read_base is not None
        bias = site.read_base(lambda held: held.bias)
        wanted = base.model.get_submodule(site.name)(x)
        torch.testing.assert_close(nn.functional.linear(x, weight, bias), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows_of_a_block", [64, 1 << 20])
def test_nf4_in_blocks_is_what_bitsandbytes_dequantizes(
    double_quant: bool, rows_of_a_block: int, bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weight, "_BLOCK_ELEMENTS", 64 * rows_of_a_block)
    base = bases.fresh("llama", Quantization.NF4, double_quant=double_quant)
    seen = 0
    for site in base.shape.of_kind(SiteKind.LINEAR):
        wrapped = base.model.get_submodule(site.name)
        assert isinstance(wrapped, AdaptedLinear)
        module = wrapped.base
        assert isinstance(module, Linear4bit)
        assert module.weight.quant_state.nested is double_quant
        wanted = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        # The base is in evaluation mode: on a CPU with AVX512-BF16 its scales are those of the packed layout.
        torch.testing.assert_close(_whole(base, site.name), wanted, atol=0, rtol=2**-7)
        module.train()
        torch.testing.assert_close(_whole(base, site.name), wanted, atol=0, rtol=2**-8)
        seen += 1
    assert seen


@pytest.mark.parametrize(
    ("quantization", "double_quant"),
    [(Quantization.NF4, False), (Quantization.NF4, True), (Quantization.INT8, False)],
)
def test_a_base_reads_the_same_before_and_after_its_first_step(
    quantization: Quantization, double_quant: bool, bases: Bases
) -> None:
    """bitsandbytes repacks weights at their first use; an adapter that needs them must not depend on when it loads."""
    base = bases.fresh("llama", quantization, attention="eager", double_quant=double_quant)
    names = [site.name for site in base.shape.of_kind(SiteKind.LINEAR)]
    before = [_whole(base, name) for name in names]
    with torch.inference_mode():
        base.model(input_ids=torch.tensor([[5, 6, 7]]))
    for name, wanted in zip(names, before, strict=True):
        assert torch.equal(_whole(base, name), wanted), name
    # The control: on a processor for which bitsandbytes repacks, the step did.
    packed = [
        getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in base.model.modules() if _is_4bit(m)
    ]
    assert packed == [bool(bnb.has_avx512bf16())] * len(packed)


def _is_4bit(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit)


def test_int8_in_blocks_is_close_to_the_weight_that_was_quantized(bases: Bases) -> None:
    plain, base = bases(), bases("llama", Quantization.INT8)
    for site in base.shape.of_kind(SiteKind.LINEAR):
        wanted = _whole(plain, site.name)
        step = wanted.abs().amax(dim=1, keepdim=True) / 127
        assert ((_whole(base, site.name) - wanted).abs() <= step).all()  # half of it, and two roundings to bfloat16


def test_the_packed_layout_is_the_one_that_bitsandbytes_makes() -> None:
    """Without this CPU feature no base is ever packed; the layout is the same everywhere."""
    module = Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    module.weight.data = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    module = module.to("cpu").eval()
    if module.weight.quant_state is None:
        module.weight = module.weight._quantize("cpu")
    wanted = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    module.weight.data, module.weight.quant_state = bnb._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    assert module.weight.quant_state.packing_format_for_cpu
    got = torch.cat(list(ModuleWeight(module).blocks(torch.float32)))
    torch.testing.assert_close(got, wanted, atol=0, rtol=2**-8)  # the packed scales are bfloat16
