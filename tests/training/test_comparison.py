"""The table of the methods: formulas equal the real counts, on every architecture."""

import math

import pytest
import torch
from tests import tiny
from tests.bases import Bases

from weft.adapters import packed_adapter
from weft.config import Quantization
from weft.methods import ia3, lora, prefix
from weft.methods.catalog import METHODS
from weft.methods.count import Term, gather
from weft.methods.protocol import BaseShape
from weft.model.loader import Base
from weft_training import adapter
from weft_training.base import num_parameters
from weft_training.comparison import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_the_formula_is_what_is_counted(architecture: str, bases: Bases) -> None:
    base = bases(architecture)
    found = compare(base, repeats=0)
    assert {one.method for one in found.methods} == set(METHODS) == set(adapter.USUAL)
    assert found.num_parameters == sum(p.numel() for p in base.model.parameters())
    for one in found.methods:
        config = adapter.usual(one.method, base.shape)
        made = adapter.initial(config, base.shape, torch.Generator())
        assert one.count is not None, f"{one.method} tells no formula"
        assert one.count.total == one.num_parameters == sum(t.numel() for t in made.tensors()) > 0
        assert eval(one.count.numbers.translate({ord("·"): "*", ord("×"): "*"})) == one.count.total
        assert one.ratio == found.num_parameters / one.num_parameters
        assert one.slot_bytes == packed_adapter.build(made, base.shape, dtype=base.dtype).size_bytes > 0
        assert one.overhead is None


def test_counts_by_hand(shape: BaseShape) -> None:
    """Two layers: hidden 64, feed-forward 128, 2 of 4 heads for keys and values, of 16 numbers each."""
    sites = [site for site in shape.sites.values() if ".layers." in site.name]
    count = lora.math.count(lora.math.LoraConfig(rank=8, rank_pattern={"k_proj": 2}), sites, shape)
    layer = 8 * (2 * (64 + 64) + (64 + 32) + 2 * (64 + 128) + (128 + 64)) + 2 * (64 + 32)
    assert count.total == 2 * layer
    assert "2 × 2·(64 + 32)" in count.numbers

    scaled = [site for site in sites if site.suffix in ("k_proj", "v_proj", "down_proj")]
    count = ia3.math.count(ia3.math.Ia3Config(feedforward_modules=("down_proj",)), scaled, shape)
    assert (count.total, count.numbers) == (2 * (32 + 32 + 128), "4 × 32 + 2 × 128")

    count = prefix.math.count(prefix.math.PrefixConfig(num_virtual_tokens=5), (), shape)
    assert (count.total, count.numbers) == (2 * 5 * 2 * 2 * 16, "2·5·2·2·16")


def test_equal_terms_are_gathered() -> None:
    count = gather("Σ", [Term("2·3", 6), Term("5", 5), Term("2·3", 6)])
    assert count == ("Σ", "2 × 2·3 + 5", 17)
    assert gather("Σ", []) == ("Σ", "0", 0)


def test_a_packed_weight_counts_as_what_it_stands_for(bases: Bases) -> None:
    assert len({num_parameters(bases.fresh("llama", quantization)) for quantization in Quantization}) == 1


def test_the_forward_pass_is_measured(bases: Bases) -> None:
    base = bases("llama", Quantization.NF4, attention="sdpa")
    found = compare(base, ("prefix", "lora"), num_tokens=8, repeats=3)
    assert [one.method for one in found.methods] == ["prefix", "lora"]
    assert found.forward_s is not None
    assert 0 < found.forward_s < 10
    assert all(one.overhead is not None and -1 < one.overhead < 1000 for one in found.methods)


def test_an_unknown_method_is_refused(base: Base) -> None:
    with pytest.raises(ValueError, match=r"method: must be one of lora, .*given 'lor'"):
        compare(base, ("lor",))


def test_norms_say_how_far_an_adapter_is_from_nothing(shape: BaseShape) -> None:
    for params in tiny.random_lora(shape, rank=3, seed=1).sites.values():
        expected = (params.scaling * params.b @ params.a).norm().item()
        assert lora.math.norms(params)["‖ΔW‖"] == pytest.approx(expected, rel=1e-5)
        assert expected > 0.1
    for params in tiny.random_ia3(shape, seed=2).sites.values():
        assert ia3.math.norms(params)["‖l - 1‖"] == pytest.approx((params.scale - 1).norm().item())
    embeddings = tiny.random_prefix(shape, length=7, seed=3).prefix
    by_layer = prefix.math.norms(embeddings)
    assert len(by_layer) == 2 * shape.num_layers
    assert math.hypot(*by_layer.values()) == pytest.approx(embeddings.embeddings.norm().item())
    untrained = adapter.initial(adapter.usual("lora", shape), shape, torch.Generator())
    assert {norm for params in untrained.sites.values() for norm in lora.math.norms(params).values()} == {0.0}
