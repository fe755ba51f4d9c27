"""Merged LoRAs: `exact` is the sum, `svd` the nearest to it of a rank, the others what PEFT makes of the same parts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import tiny
from tests.serving import Row, Step, error
from torch import Tensor
from transformers import AutoModelForCausalLM

from weft.kernels.selection import select
from weft.methods import lora
from weft.methods.checkpoint import directory
from weft.methods.lora.math import LoraParams
from weft.methods.protocol import Adapter, SiteKind
from weft.model import loader
from weft_training.tools import merging
from weft_training.tools.merging import Part

_RANK = 5
_DENSITY = 0.4
_WEIGHTS = (0.7, -0.4, 1.5)
_TOLERANCE = 1e-5  # relative, of float32 products of matrices with 64 to 128 columns


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def _adapters(base: loader.Base, *, lora_bias: bool = False) -> list[Adapter]:
    """Of unequal ranks, on all modules and on some."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    return [
        tiny.random_lora(base.shape, rank=4, seed=1, lora_bias=lora_bias),
        tiny.random_lora(base.shape, rank=7, seed=2, targets=tuple(suffixes[:2])),
        tiny.random_lora(base.shape, rank=1, seed=3, targets=tuple(suffixes[1:])),
    ]


def _update(params: LoraParams) -> Tensor:
    """ΔW [O, I] in float64."""
    return params.scaling * params.b.double() @ params.a.double()


def _sum_of_updates(adapters: list[Adapter], name: str) -> Tensor:
    updates = [w * _update(a.sites[name]) for a, w in zip(adapters, _WEIGHTS, strict=True) if name in a.sites]
    return torch.stack(updates).sum(0)


def _merged(adapters: list[Adapter], rule: merging.Rule) -> tuple[Adapter, float]:
    return merging.merge(list(zip(adapters, _WEIGHTS, strict=True)), rule)


# -- exact and svd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_bias", [False, True])
def test_exact_serves_as_the_composition_does(base: loader.Base, tmp_path: Path, lora_bias: bool) -> None:
    """Read back from its files, on the kernels; the base's sites have sums of different ranks."""
    adapters = _adapters(base, lora_bias=lora_bias)
    merged, kept = _merged(adapters, merging.exact)
    assert kept == 1
    assert {params.rank for params in merged.sites.values()} == {4 + 7, 4 + 7 + 1, 4 + 1}
    assert merged.rank == 12
    from weft_training import adapter

    directory.write(merged, tmp_path / "merged", base.shape)
    again = adapter.read(tmp_path / "merged", base.shape)
    step = Step(base, select(base.device, base.dtype))
    tokens = list(range(40, 70))
    parts = list(zip(adapters, _WEIGHTS, strict=True))
    composed, served, without = step.logits([Row(tokens, adapters=parts), Row(tokens, again), Row(tokens)])
    assert error(served, composed) < _TOLERANCE
    assert error(without, composed) > 1000 * _TOLERANCE, "negative control"
    (other,) = step.logits([Row(tokens, adapters=[(adapters[0], 0.71), *parts[1:]])])
    assert error(other, composed) > 10 * _TOLERANCE, "negative control"


def test_exact_loads_in_peft(base: loader.Base, path: Path, peft_model: Any, tmp_path: Path) -> None:
    """Modules of three ranks, named in its patterns; PEFT's own concatenation has one rank, filled up with zeros."""
    merged, _ = _merged(_adapters(base), merging.exact)
    directory.write(merged, tmp_path / "merged", base.shape)
    wanted = _peft_updates(peft_model, "cat")
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(stock, str(tmp_path / "merged"), adapter_name="merged")
    found = _updates_in(model)
    assert found.keys() == wanted.keys()
    assert {len(layer.lora_A["merged"].weight) for layer in _layers(model).values()} == {4 + 7, 4 + 7 + 1, 4 + 1}
    for name, update in found.items():
        assert error(update, wanted[name]) < _TOLERANCE


def test_svd_is_the_nearest_update_of_its_rank(base: loader.Base) -> None:
    adapters = _adapters(base)
    merged, kept = _merged(adapters, partial(merging.svd, rank=_RANK))
    shares = []
    for name, params in merged.sites.items():
        wanted = _sum_of_updates(adapters, name)
        assert params.rank == _RANK
        values = torch.linalg.svdvals(wanted)
        got = _update(params)
        # Eckart and Young: no matrix of that rank is nearer than what is left of the singular values.
        assert (got - wanted).norm().item() == pytest.approx(values[_RANK:].norm().item(), rel=1e-4, abs=1e-4)
        shares.append((got.norm() / wanted.norm()).item())
    assert kept == pytest.approx(min(shares), rel=1e-5)
    assert kept < 0.99, "something was cut"


def test_svd_of_a_rank_that_is_enough_loses_nothing(base: loader.Base) -> None:
    adapters = _adapters(base)
    merged, kept = _merged(adapters, partial(merging.svd, rank=12))
    assert kept == pytest.approx(1)
    for name, params in merged.sites.items():
        assert error(_update(params), _sum_of_updates(adapters, name)) < _TOLERANCE
    # Modules whose sum has a smaller rank keep that: 12 would be rows of noise.
    assert {params.rank for params in merged.sites.values()} == {4 + 7, 12, 4 + 1}


# -- what PEFT makes of the same --------------------------------------------------------------------------------------

_RULES: dict[str, Callable[[], merging.Rule]] = {
    "svd": lambda: partial(merging.svd, rank=_RANK),
    "magnitude_prune_svd": lambda: partial(merging.magnitude_prune, rank=_RANK, density=_DENSITY),
    "ties_svd": lambda: partial(merging.ties, rank=_RANK, density=_DENSITY),
    "dare_linear_svd": lambda: partial(
        merging.dare_linear, rank=_RANK, density=_DENSITY, generator=torch.Generator().manual_seed(7)
    ),
    "dare_ties_svd": lambda: partial(
        merging.dare_ties, rank=_RANK, density=_DENSITY, generator=torch.Generator().manual_seed(7)
    ),
}


@pytest.fixture(scope="module")
def peft_model(path: Path, base: loader.Base, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PEFT with the three adapters, which it calls a, b and c."""
    root = tmp_path_factory.mktemp("parts")
    for name, adapter in zip("abc", _adapters(base), strict=True):
        directory.write(adapter, root / name, base.shape)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(stock, str(root / "a"), adapter_name="a")
    for name in "bc":
        model.load_adapter(str(root / name), adapter_name=name)
    return model


def _peft_updates(model: Any, combination: str, **how: Any) -> dict[str, Tensor]:
    """Of PEFT's merged adapter, by module."""
    model.add_weighted_adapter(list("abc"), list(_WEIGHTS), "merged", combination_type=combination, **how)
    updates = _updates_in(model)
    model.delete_adapter("merged")
    return updates


def _layers(model: Any) -> dict[str, Any]:
    """PEFT's layers that have a "merged", by the names of the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }


def _updates_in(model: Any) -> dict[str, Tensor]:
    """What that "merged" adds to each weight."""
    updates = {}
    for name, layer in _layers(model).items():
        product = layer.lora_B["merged"].weight @ layer.lora_A["merged"].weight
        updates[name] = product.detach().double() * layer.scaling["merged"]
    return updates


@pytest.fixture
def same_draws(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws what DARE drops from the global generator, and of a Conv1D, which it transposes, in another order."""
    draw, generator = torch.bernoulli, torch.Generator().manual_seed(7)
    is_transposed = "c_attn" in {site.suffix for site in base.shape.sites.values()}

    def drawn(chances: Tensor) -> Tensor:
        return (
            draw(chances.T.contiguous(), generator=generator).T if is_transposed else draw(chances, generator=generator)
        )

    monkeypatch.setattr(peft.utils.merge_utils.torch, "bernoulli", drawn)


@pytest.mark.parametrize("combination", list(_RULES))
def test_updates_equal_peft_s(
    combination: str, base: loader.Base, peft_model: Any, same_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _peft_updates(peft_model, combination, svd_rank=_RANK, density=_DENSITY)
    monkeypatch.undo()
    merged, _ = _merged(_adapters(base), _RULES[combination]())
    assert merged.sites.keys() == wanted.keys()
    for name, params in merged.sites.items():
        assert error(_update(params), wanted[name]) < 1e-4, name
    # Negative control: the other rules make something else.
    for other in _RULES.keys() - {combination}:
        updates = _merged(_adapters(base), _RULES[other]())[0].sites
        assert max(error(_update(params), wanted[name]) for name, params in updates.items()) > 0.05, other


def test_linear_of_peft_is_not_the_weighted_sum(base: loader.Base, tmp_path: Path, path: Path) -> None:
    """It has products of one adapter's B and another's A; two parts of one rank are enough to see them."""
    pair = [tiny.random_lora(base.shape, rank=4, seed=seed) for seed in (1, 2)]
    for name, adapter in zip("ab", pair, strict=True):
        directory.write(adapter, tmp_path / name, base.shape)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(stock, str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "linear", combination_type="linear")
    exact, _ = merging.merge([(pair[0], 0.7), (pair[1], 0.3)], merging.exact)
    for name, params in exact.sites.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        a, b = (layer.get_submodule(f"lora_{side}.linear").weight.double() for side in "AB")
        (a1, b1, s1, _), (a2, b2, s2, _) = (adapter.sites[name] for adapter in pair)
        crossed = (0.7 * 0.3 * s1 * s2) ** 0.5 * (b1 @ a2 + b2 @ a1).double()
        assert error(b @ a, _update(params) + crossed) < _TOLERANCE
        assert error(b @ a, _update(params)) > 0.3


# -- the rules, entry by entry ----------------------------------------------------------------------------------------


def test_ties_entry_by_entry() -> None:
    """Signs are elected over unweighted sums; zeros, and those of the other sign, count for nothing in the mean."""
    updates = [torch.tensor([3.0, -1.0, 2.0, 0.0, -2.0]), torch.tensor([1.0, 4.0, -2.0, 0.0, -4.0])]
    got = merging.elected_mean(updates, [2.0, 10.0])
    #                            (6+10)/2  40/1  tie: + wins, 4/1   none   (-4-40)/2
    assert got.tolist() == [8.0, 40.0, 4.0, 0.0, -22.0]


def test_trim_keeps_the_largest() -> None:
    update = torch.tensor([[0.1, -5.0, 2.0], [-0.3, 4.0, 0.2]])
    assert merging.trim(update, 0.5).tolist() == [[0, -5, 2], [0, 4, 0]]
    assert merging.trim(update, 1.0).equal(update)
    assert merging.trim(update, 0.49).count_nonzero() == 2, "the share is rounded down"


def test_drop_is_right_on_average_and_by_seed() -> None:
    update = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    drawn = merging.drop(update, 0.25, torch.Generator().manual_seed(3))
    kept = drawn != 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert drawn[kept].equal(update[kept] * 4)
    assert drawn.equal(merging.drop(update, 0.25, torch.Generator().manual_seed(3)))
    assert not drawn.equal(merging.drop(update, 0.25, torch.Generator().manual_seed(4)))
    assert merging.drop(update, 1.0, torch.Generator()).equal(update)


@pytest.mark.parametrize("rule", ["svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd"])
def test_one_part_of_density_1_is_itself_times_its_weight(rule: str) -> None:
    """Biases too, as one more update."""
    generator = torch.Generator().manual_seed(1)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((3, 20), (12, 3), (12,)))
    whole = _RULES[rule]()
    assert isinstance(whole, partial)
    if "density" in whole.keywords:
        whole = partial(whole, density=1.0)
    params, kept = whole([Part(LoraParams(a, b, 0.5, bias), -2.0)])
    assert error(_update(params), -(b @ a).double()) < _TOLERANCE
    assert params.bias is not None
    assert error(params.bias, -bias) < _TOLERANCE
    assert kept == pytest.approx(1)


# -- what cannot be merged --------------------------------------------------------------------------------------------


def test_only_loras_merge(base: loader.Base) -> None:
    one = tiny.random_lora(base.shape, rank=2, seed=1)
    for other in (tiny.random_dora(base.shape, rank=2, seed=1), tiny.random_ia3(base.shape, seed=1)):
        with pytest.raises(ValueError, match=f"part 1: only LoRAs can be merged, given {other.method.name}"):
            merging.merge([(one, 1.0), (other, 1.0)], merging.exact)


def test_activated_loras_do_not_merge(base: loader.Base) -> None:
    one = tiny.random_lora(base.shape, rank=2, seed=1)
    other = replace(one, config=replace(one.config, invocation_tokens=(7,)))
    with pytest.raises(ValueError, match="part 1: activated LoRAs cannot be merged"):
        merging.merge([(one, 1.0), (other, 1.0)], merging.exact)


def test_what_cancels_is_refused(base: loader.Base) -> None:
    one = tiny.random_lora(base.shape, rank=2, seed=1)
    gone = {name: params._replace(scaling=0.0) for name, params in one.sites.items()}
    nothing = Adapter(method=lora.METHOD, config=one.config, sites=gone)
    with pytest.raises(ValueError, match="nothing is left"):
        merging.merge([(nothing, 1.0)], partial(merging.ties, rank=2, density=0.5))
    merging.merge([(nothing, 1.0), (one, 1.0)], partial(merging.ties, rank=2, density=0.5))
