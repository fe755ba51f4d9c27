"""On the NF4 base every method equals the same method on the dequantized base, within the rounding of bfloat16.

The quantized base computes in bfloat16 (bitsandbytes' CPU kernel also rounds its block scales to bfloat16); the oracle
is float32 on the very weights that the quantized ones stand for. The stated tolerance is on the logits, relative to
their spread: NF4_TOLERANCE of their standard deviation.
"""

import bitsandbytes as bnb
import pytest
import torch

from tests import tiny
from tests.bases import Bases
from tests.serving import Row, Step
from weft.config import Quantization
from weft.kernels.selection import REFERENCE, select
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.inject import AdaptedLinear
from weft.methods.protocol import Adapter, SiteKind
from weft.model import loader

NF4_TOLERANCE = 0.3  # largest difference of a logit, in standard deviations of the logits
NF4_MEAN_TOLERANCE = 0.03  # mean difference
_PROMPTS = [list(range(30, 60)), [7, 9, 100, 101, 55]]


@pytest.fixture(scope="module", params=[False, True], ids=["plain scales", "double quantization"])
def held(request: pytest.FixtureRequest, bases: Bases) -> tuple[loader.Base, loader.Base]:
    """(NF4 in bfloat16, the same weights dequantized in float32)."""
    nf4, full = bases.fresh("llama", Quantization.NF4, double_quant=request.param), bases.fresh()
    for name, module in nf4.model.named_modules():
        if isinstance(module, AdaptedLinear) and module.site.kind is SiteKind.LINEAR:
            weight = module.base.weight
            target = full.model.get_submodule(name).base.weight
            target.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32))
    return nf4, full


@pytest.mark.parametrize(
    "kind", ["base", "lora", "lora, bias", "dora", "vera", "bitfit", "ia3", "prefix", "prompt", "ptuning", "bottleneck"]
)
@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_methods_on_nf4_equal_methods_on_dequantized_weights(
    kind: str, kernels: str, held: tuple[loader.Base, loader.Base]
) -> None:
    nf4, full = held
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in nf4.model.modules())
    adapter = _adapter(kind, nf4)
    chosen = REFERENCE if kernels == "reference" else select(nf4.device, nf4.dtype)
    got = torch.cat(Step(nf4, chosen).logits([Row(p, adapter) for p in _PROMPTS])).float()
    wanted = torch.cat(Step(full, REFERENCE).logits([Row(p, adapter) for p in _PROMPTS]))
    difference = (got - wanted).abs() / wanted.std()
    assert difference.max() < NF4_TOLERANCE
    assert difference.mean() < NF4_MEAN_TOLERANCE
    nested = {m.weight.quant_state.nested for m in nf4.model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(nested) == 1
    if adapter is not None:  # negative control: without its adapter the same comparison is far off
        without = torch.cat(Step(nf4, chosen).logits([Row(p) for p in _PROMPTS])).float()
        assert ((without - wanted).abs() / wanted.std()).max() > 5 * NF4_TOLERANCE


def test_double_quantization_is_another_base(bases: Bases) -> None:
    """An adapter trained on one is not served on the other; only NF4 has scales to quantize."""
    double, single = (bases("llama", Quantization.NF4, double_quant=flag).shape for flag in (True, False))
    assert double.digest != single.digest
    for quantization in (Quantization.INT8, Quantization.NONE):
        with pytest.raises(ValueError, match=f"double_quant: needs quantization nf4, given {quantization.value}"):
            bases("llama", quantization, double_quant=True)


def _adapter(kind: str, base: loader.Base) -> Adapter | None:
    match kind:
        case "lora":
            return tiny.random_lora(base.shape, rank=8, seed=1)
        case "lora, bias":
            return tiny.random_lora(base.shape, rank=4, seed=4, lora_bias=True)
        case "dora":
            return tiny.random_dora(base.shape, rank=8, seed=5)
        case "vera":
            return tiny.random_vera(base.shape, rank=8, seed=8)
        case "bitfit":
            return tiny.random_bitfit(base.shape, seed=6)
        case "ia3":
            return tiny.random_ia3(base.shape, seed=2)
        case "prefix":
            return tiny.random_prefix(base.shape, length=9, seed=3)
        case "prompt":
            return tiny.random_prompt(base.shape, length=9, seed=4)
        case "ptuning":
            return tiny.random_ptuning(base.shape, length=17, seed=5)
        case "bottleneck":
            return tiny.random_bottleneck(base.shape, BottleneckConfig(form=Form.SUM, size=6), seed=7)
    return None
