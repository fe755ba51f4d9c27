"""A base in its serving form gives the same logits as when it was loaded, whatever adapters its rows have."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import Gemma2Config, Qwen3Config

from tests import tiny
from tests.bases import Bases, load
from tests.serving import Row, Step
from weft.config import Quantization
from weft.kernels.cpu import gemm
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.methods import ia3
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.inject import GroupedLinear, LinearGroup
from weft.methods.protocol import Adapter, BaseShape, SiteKind
from weft.model import elementwise, groups, loader, serving_form
from weft.model.packed import PackedLinear, multiplies_bfloat16

ARCHITECTURES = [*sorted(tiny.ARCHITECTURES), "qwen3", "gemma2"]
GROUPS_PER_LAYER = {"phi3": 0, "gpt2": 0}  # they come with one module where others have two or three; else two
NORMS_PER_LAYER = {"gpt2": 0, "qwen3": 4, "gemma2": 4}  # else two; and one before the head
GATES_PER_LAYER = {"gpt2": 0, "phi3": 0}  # else one


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    sizes = {**tiny._SIZES, "head_dim": 16}  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setitem(tiny.ARCHITECTURES, "qwen3", lambda: Qwen3Config(**sizes))
    monkeypatch.setitem(tiny.ARCHITECTURES, "gemma2", lambda: Gemma2Config(**sizes, query_pre_attn_scalar=16))
    return request.param


def _scaled_inputs(base: BaseShape, *, seed: int) -> Adapter:
    """An IA³ that scales the input of one member of each group, which then cannot share the others' product."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = {site.suffix for site in base.of_kind(SiteKind.LINEAR)}
    targets = tuple(suffixes & {"k_proj", "up_proj", "c_attn", "qkv_proj"})
    sites = {
        site.name: ia3.math.Ia3Params(1 + 0.5 * torch.randn(site.in_features, generator=generator), True)
        for site in base.of_kind(SiteKind.LINEAR)
        if site.suffix in targets
    }
    config = ia3.math.Ia3Config(target_modules=targets, feedforward_modules=targets)
    return Adapter(method=ia3.METHOD, config=config, sites=sites)


def _rows(base: BaseShape, *, scaled: bool) -> list[Row]:
    adapters = [
        None,
        tiny.random_lora(base, rank=3, seed=1),
        tiny.random_lora(base, rank=2, seed=2, targets=tuple({"q_proj", "c_attn", "qkv_proj"})),
        tiny.random_dora(base, rank=2, seed=3),
        tiny.random_bitfit(base, seed=4, kinds=(SiteKind.LINEAR,)),
        tiny.random_ia3(base, seed=5),
        tiny.random_prefix(base, length=5, seed=6),
        tiny.random_bottleneck(base, BottleneckConfig(form=Form.SUM, size=4), seed=7),
        *([_scaled_inputs(base, seed=8)] if scaled else []),
    ]
    return [Row([5 + index, 60, 7, 33][: 1 + index % 4], adapter) for index, adapter in enumerate(adapters)]


@pytest.mark.parametrize("scaled", [False, True], ids=["inputs shared", "an input scaled"])
@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_are_those_of_the_base_as_loaded(architecture: str, kernels: str, scaled: bool, tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base", architecture)
    loaded, held = load(path), load(path)
    taken = REFERENCE if kernels == "reference" else select(held.device, held.dtype)
    serving_form.take(held, taken)
    rows = _rows(loaded.shape, scaled=scaled)
    if architecture == "gemma2":  # its sublayers end in a norm, so a bottleneck has no place
        rows = [row for row in rows if row.adapter is None or row.adapter.method.name != "bottleneck"]
    wanted = Step(loaded, REFERENCE).logits(rows)
    for given, logits in zip(Step(held, taken).logits(rows), wanted, strict=True):
        torch.testing.assert_close(given, logits, atol=2e-4, rtol=2e-4)


def test_what_is_held_as_one(architecture: str, tmp_path: Path) -> None:
    base = load(tiny.save_base(tmp_path / "base", architecture))
    found = groups.shared_inputs(base.model, base.context)
    num_layers = base.shape.num_layers
    assert len(found) == num_layers * GROUPS_PER_LAYER.get(architecture, 2)
    names = {tuple(site.suffix for site in sites) for sites in found}
    assert names <= {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    kernels = select(base.device, base.dtype)
    if kernels.rms_norm is None or kernels.gate is None:
        pytest.skip("no compiler for the kernels")
    assert groups.fuse(base.model, base.context) == len(found)
    norms = num_layers * NORMS_PER_LAYER.get(architecture, 2) + (architecture != "gpt2")
    assert elementwise.fuse_norms(base.model, kernels.rms_norm) == norms
    assert elementwise.fuse_gates(base.model, kernels.gate) == num_layers * GATES_PER_LAYER.get(architecture, 1)
    assert groups.fuse(base.model, base.context) == 0, "once is enough"


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.NF4])
def test_weights_are_read_as_before_and_held_once(quantization: Quantization, bases: Bases) -> None:
    if not gemm.available() and not multiplies_bfloat16():
        pytest.skip("no product of bfloat16 here, so nothing is packed")
    loaded = bases.fresh("qwen2", quantization, "bfloat16")
    held = bases.served("qwen2", quantization, "bfloat16")
    grouped = [m for m in held.model.modules() if isinstance(m, GroupedLinear)]
    assert len(grouped) == 5 * held.shape.num_layers
    whole = PackedLinear if quantization is Quantization.NONE else Linear4bit
    assert all(isinstance(module.group.whole, whole) for module in grouped)
    Step(held, REFERENCE).logits([Row([5])])  # bitsandbytes lays a weight out again at its first use
    for name, site in held.shape.sites.items():
        if site.kind is not SiteKind.LINEAR:
            continue
        here, there = (_read(base, name) for base in (held, loaded))
        assert torch.equal(here[0], there[0])
        assert here[1] is None if there[1] is None else torch.equal(here[1], there[1])
    alive = [m for m in held.model.modules() if type(m) is nn.Linear and m.weight.dtype is torch.bfloat16]
    assert not alive, "a weight that was packed or joined is not kept beside it"


def _read(base: loader.Base, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    read = base.shape.sites[name].read_base
    assert read is not None
    return read(lambda held: (torch.cat(list(held.blocks(torch.float32))), held.bias))


def test_nf4_logits_do_not_change(bases: Bases) -> None:
    loaded, held = (bases.fresh("llama", Quantization.NF4, "bfloat16") for _ in range(2))
    assert groups.fuse(held.model, held.context) == 2 * held.shape.num_layers
    rows = _rows(loaded.shape, scaled=True)
    kernels = select(held.device, held.dtype)
    for given, logits in zip(Step(held, kernels).logits(rows), Step(loaded, kernels).logits(rows), strict=True):
        assert torch.equal(given, logits)


def test_modules_that_compute_something_else_are_left_alone(bases: Bases) -> None:
    """Negative control: the same names and shapes, another formula."""
    base = bases.fresh()
    groups.fuse(base.model, base.context)
    for layer in base.model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
        layer.input_layernorm.forward = _halved(layer.input_layernorm.forward)
    kernels = select(base.device, base.dtype)
    if kernels.rms_norm is None or kernels.gate is None:
        pytest.skip("no compiler for the kernels")
    assert elementwise.fuse_gates(base.model, kernels.gate) == 0
    assert elementwise.fuse_norms(base.model, kernels.rms_norm) == base.shape.num_layers + 1
    counted = _count_gates(base, kernels)
    assert counted == 0


def _halved(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: 0.5 * forward(x)


def _count_gates(base: loader.Base, kernels: Kernels) -> int:
    calls = []

    def gate(given: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        calls.append(activation)
        assert kernels.gate is not None
        return kernels.gate(given, up, activation)

    elementwise.fuse_gates(base.model, gate)
    calls.clear()
    Step(base, kernels).logits([Row([5])])
    return len(calls)


def test_one_product_for_each_group_and_nothing_is_kept(bases: Bases) -> None:
    base = bases.fresh()
    serving_form.take(base, REFERENCE)
    found = [module for module in base.model.modules() if isinstance(module, LinearGroup)]
    calls: list[nn.Module] = []
    for group in found:
        group.whole.register_forward_hook(lambda module, inputs, output: calls.append(module))
    step = Step(base, REFERENCE)
    for adapter in (None, tiny.random_lora(base.shape, rank=2, seed=0)):
        calls.clear()
        step.logits([Row([5], adapter)])
        assert len(calls) == len(found) == 2 * base.shape.num_layers
        assert all(group._x is None and not group._outputs for group in found)  # pyright: ignore[reportPrivateUsage]
