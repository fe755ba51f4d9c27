"""Names, layers and patterns mean what they mean to PEFT, and the same to training, files, serving and PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.bases import Bases
from weft.adapters import packed_adapter
from weft.config import AdapterLimits
from weft.methods import targets
from weft.methods.bitfit.math import BitfitConfig
from weft.methods.bottleneck.math import BottleneckConfig
from weft.methods.checkpoint import directory
from weft.methods.dora.math import DoraConfig
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.methods.protocol import Adapter, BaseShape, MethodConfig, SiteKind
from weft_training.adapter import initial

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def made(config: MethodConfig, shape: BaseShape) -> Adapter:
    """Return an adapter as a recipe begins it, with changed values, since a file without effect is refused."""
    generator = torch.Generator().manual_seed(1)
    adapter = initial(config, shape, generator)

    def moved(params: Any) -> Any:
        tensors = {name: value for name, value in params._asdict().items() if torch.is_tensor(value)}
        noise = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
        return params._replace(**{name: value + noise[name] for name, value in tensors.items()})

    return replace(adapter, sites={name: moved(params) for name, params in adapter.sites.items()})


def loaded_in_peft(path: Path, adapter: Path) -> dict[str, BaseTunerLayer]:
    """Return PEFT's layers by module path; fail if PEFT misses a tensor or has one too many."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(adapter))
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(adapter / directory.WEIGHTS_FILE)
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[key], written[key]) for key in written)
    inner = model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


# --- patterns of ranks and alphas ------------------------------------------------------------------------------------

_RANKS = {"layers.0.self_attn.q_proj": 2, "mlp.down_proj": 3, "q_proj": 5, Q0.replace("q_proj", "v_proj"): 7}
_ALPHAS = {"layers.0.self_attn.q_proj": 33.0, "layers.1.mlp.down_proj": 1.0, "k_proj": 12.0, "down_proj": 6.0}
_PATTERNS: dict[str, MethodConfig] = {
    "the review's": LoraConfig(alpha_pattern={"layers.0.self_attn.q_proj": 99}),
    "LoRA": LoraConfig(rank=4, rank_pattern=_RANKS, alpha_pattern=_ALPHAS),
    "rsLoRA": LoraConfig(rank=4, rank_pattern=_RANKS, alpha_pattern=_ALPHAS, use_rslora=True),
    "LoRA with bias": LoraConfig(rank=4, rank_pattern=_RANKS, alpha_pattern=_ALPHAS, lora_bias=True),
    "activated LoRA": LoraConfig(rank=4, rank_pattern=_RANKS, alpha_pattern=_ALPHAS, invocation_tokens=(5, 6)),
    "DoRA": DoraConfig(rank=4, rank_pattern=_RANKS, alpha_pattern=_ALPHAS),
}


@pytest.mark.parametrize("kind", list(_PATTERNS))
def test_every_site_has_one_rank_and_one_scale_trained_saved_served_and_in_peft(
    kind: str, path: Path, shape: BaseShape, tmp_path: Path
) -> None:
    config = _PATTERNS[kind]
    assert isinstance(config, LoraConfig)
    trained = made(config, shape)
    directory.write(trained, tmp_path, shape)
    served = directory.load(tmp_path, shape, AdapterLimits())
    theirs: Any = loaded_in_peft(path, tmp_path)
    assert trained.sites.keys() == served.sites.keys() == theirs.keys()
    for name, params in trained.sites.items():
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.alpha)
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        assert len(params.a) == len(served.sites[name].a) == theirs[name].r["default"] == rank
        assert params.scaling == served.sites[name].scaling == theirs[name].scaling["default"] == scaling
    assert len({params.scaling for params in trained.sites.values()}) > 1  # control: the patterns have an effect
    count = trained.method.count
    assert count is not None
    for adapter in (trained, served):
        sites = [shape.sites[name] for name in adapter.sites]
        assert count(adapter.config, sites, shape).total == adapter.num_parameters
    # The slots hold the same update: the trained adapter and the one read back pack alike.
    packed_adapters = [packed_adapter.build(one, shape, dtype=torch.float32) for one in (trained, served)]
    assert torch.equal(packed_adapters[0].buffer, packed_adapters[1].buffer)


def test_patterns_fit_as_in_peft() -> None:
    patterns = ["layers.0.self_attn.q_proj", "0.self_attn.q_proj", "proj", "self_attn.q_proj", "model.layers.1.mlp.up"]
    patterns += ["layers.1.mlp.up", "q.proj", "a.b", "1.mlp.up"]
    modules = [Q0, Q1, "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.up", "layers.1.mlp.up", "up", "proj"]
    modules += ["lm_head", "x.a_b", "q_proj", "model.layers.11.mlp.up", "xlayers.1.mlp.up"]
    for order in (patterns, patterns[::-1]):
        for module in modules:
            found = targets.decisive(order, module)
            assert (found or module) == get_pattern_key(order, module), module


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(rank_pattern={"layers.7.self_attn.q_proj": 2}), "rank_pattern.*layers.7.self_attn.q_proj"),
        (LoraConfig(alpha_pattern={"layers.*.q_proj": 2.0}), r"alpha_pattern.*layers\.\*\.q_proj"),
        (LoraConfig(target_modules=("v_proj",), rank_pattern={"q_proj": 2}), "rank_pattern.*q_proj.*end of none"),
        (LoraConfig(layers=(1,), rank_pattern={"layers.0.self_attn.q_proj": 2}), "rank_pattern.*layers.0"),
        (LoraConfig(rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 4}), "'q_proj' comes first"),
        (DoraConfig(alpha_pattern={"proj": 2.0}), "alpha_pattern.*'proj'"),
        (Ia3Config(target_modules=("k_proj",), feedforward_modules=("down_proj",)), "feedforward_modules.*down_proj"),
        (BottleneckConfig(reduction_factors={0: 4.0}, layers=(1,)), "reduction_factors.*given 0"),
        (LoraConfig(layers=(0, 2)), "layers: .*0 to 1.*given 2"),
        (BottleneckConfig(layers=(-1,)), "layers: .*0 to 1.*given -1"),
        (LoraConfig(exclude=("layers.5.mlp.up_proj",)), "exclude: .*layers.5.mlp.up_proj"),
        (LoraConfig(target_modules=("q_proj",), exclude=("self_attn.q_proj",)), "exclude: must leave a module"),
        (LoraConfig(target_modules=("lm_head",), layers=(0,)), "layers: must leave a module"),
        (BitfitConfig(target_modules=("layers.0.mlp.c_fc",)), "target_modules: .*layers.0.mlp.c_fc"),
    ],
)
def test_what_means_nothing_on_the_base_is_refused_by_name(config: MethodConfig, named: str, shape: BaseShape) -> None:
    with pytest.raises(ValueError, match=named):
        initial(config, shape, torch.Generator())


def test_an_adalora_of_unequal_ranks_is_written_as_the_lora_that_peft_computes(
    path: Path, shape: BaseShape, tmp_path: Path
) -> None:
    """Its ranks become patterns by full path, with one scale: alpha over the initial rank."""
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["q_proj"], total_step=10)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    model.save_pretrained(str(tmp_path / "adalora"))
    file = tmp_path / "adalora" / directory.WEIGHTS_FILE
    tensors = {key: torch.randn(tensor.shape) for key, tensor in load_file(file).items()}
    cut = {key: tensor[:, :2] if "lora_B" in key else tensor[:2] for key, tensor in tensors.items() if ".0." in key}
    save_file({key: tensor.contiguous() for key, tensor in (tensors | cut).items()}, file)
    keys = json.loads((tmp_path / "adalora" / directory.CONFIG_FILE).read_text())
    keys["rank_pattern"] = {f"{Q0}.lora_E": [True, True, False, False], f"{Q1}.lora_E": [True] * 4}
    (tmp_path / "adalora" / directory.CONFIG_FILE).write_text(json.dumps(keys))

    read = directory.load(tmp_path / "adalora", shape, AdapterLimits())
    directory.write(read, tmp_path / "lora", shape)
    served = directory.load(tmp_path / "lora", shape, AdapterLimits())
    theirs: Any = loaded_in_peft(path, tmp_path / "lora")
    assert {name: len(params.a) for name, params in served.sites.items()} == {Q0: 2, Q1: 4}
    for name, params in read.sites.items():
        assert theirs[name].r["default"] == params.rank == served.sites[name].rank
        for scaling in (served.sites[name].scaling, theirs[name].scaling["default"]):
            assert scaling == pytest.approx(params.scaling, rel=1e-12)


def test_every_bottleneck_has_the_width_of_its_layer(shape: BaseShape, tmp_path: Path) -> None:
    config = BottleneckConfig(reduction_factor=16.0, reduction_factors={1: 4.0})
    trained = made(config, shape)
    directory.write(trained, tmp_path, shape)
    served = directory.load(tmp_path, shape, AdapterLimits())
    for name, params in trained.sites.items():
        assert len(params.down) == len(served.sites[name].down) == (16 if shape.sites[name].layer == 1 else 4)
    sites = [shape.sites[name] for name in trained.sites]
    assert trained.method.count is not None
    assert trained.method.count(served.config, sites, shape).total == trained.num_parameters


# --- which modules, in which layers -----------------------------------------------------------------------------------

_SELECTED: dict[str, tuple[MethodConfig, set[str]]] = {
    "LoRA by path": (LoraConfig(target_modules=("layers.1.self_attn.q_proj", "mlp.up_proj")), {Q1, "up_proj"}),
    "LoRA by layer": (LoraConfig(target_modules=("q_proj",), layers=(1,)), {Q1}),
    "LoRA without": (
        LoraConfig(target_modules=("q_proj", "lm_head"), exclude=("0.self_attn.q_proj",)),
        {Q1, "lm_head"},
    ),
    "DoRA": (DoraConfig(target_modules=("q_proj", "up_proj"), layers=(0,), exclude=("mlp.up_proj",)), {Q0}),
    "IA³": (
        Ia3Config(target_modules=("k_proj", "mlp.down_proj"), feedforward_modules=("down_proj",), layers=(1,)),
        {"model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"},
    ),
    "BitFit": (BitfitConfig(target_modules=("self_attn.q_proj",), layers=(0,)), {Q0}),
}


@pytest.mark.parametrize("kind", list(_SELECTED))
def test_the_same_modules_are_trained_saved_served_and_in_peft(
    kind: str, path: Path, shape: BaseShape, tmp_path: Path
) -> None:
    config, wanted = _SELECTED[kind]
    trained = made(config, shape)
    assert set(trained.sites) == {name for name, site in shape.sites.items() if {name, site.suffix} & wanted}
    directory.write(trained, tmp_path, shape)
    served = directory.load(tmp_path, shape, AdapterLimits())
    assert trained.sites.keys() == served.sites.keys() == loaded_in_peft(path, tmp_path).keys()
    # Written again from what was read, it means the same.
    first = (tmp_path / directory.CONFIG_FILE).read_text()
    directory.write(served, tmp_path, shape)
    assert (tmp_path / directory.CONFIG_FILE).read_text() == first


def test_norms_and_layers_of_bitfit_and_bottlenecks(bases: Bases, tmp_path: Path) -> None:
    """GPT-2, whose norms have biases and whose sublayers both end in a `c_proj`."""
    path, shape = bases.path("gpt2"), bases("gpt2").shape
    chosen: dict[str, MethodConfig] = {
        "bitfit": BitfitConfig(layers=(1,), exclude=("ln_1",)),
        "bottleneck": BottleneckConfig(layers=(1,)),
        "ia3": Ia3Config(target_modules=("c_attn", "c_proj"), feedforward_modules=("mlp.c_proj",)),
    }
    for name, one in chosen.items():
        trained = made(one, shape)
        if name != "ia3":
            assert {targets.layer_of(site) for site in trained.sites} == {1}
        directory.write(trained, tmp_path / name, shape)
        served = directory.load(tmp_path / name, shape, AdapterLimits())
        assert trained.sites.keys() == served.sites.keys()
        assert all(torch.equal(a, b) for a, b in zip(trained.tensors(), served.tensors(), strict=True))
    kinds = {shape.sites[name].kind for name in made(chosen["bitfit"], shape).sites}
    assert kinds == {SiteKind.LINEAR, SiteKind.NORM}
    assert not any(name.endswith("ln_1") for name in made(chosen["bitfit"], shape).sites)
    theirs: Any = loaded_in_peft(path, tmp_path / "ia3")
    assert {name for name, layer in theirs.items() if layer.is_feedforward} == {
        name for name in shape.sites if name.endswith("mlp.c_proj")
    }


def test_describing_is_the_inverse_of_naming(shape: BaseShape) -> None:
    assert targets.describe([Q0, Q1], shape) == ("q_proj",)
    assert targets.describe([Q1], shape) == (Q1,)
    assert targets.describe([Q1, "lm_head"], shape) == ("lm_head", Q1)
    own = {"proj": 1, "a.proj": 2, "b.a.proj": 3}
    for order in (list(own), list(own)[::-1]):
        patterns = targets.patterns_of({name: own[name] for name in order})
        assert {name: targets.value_at(patterns, name, 0) for name in own} == own
