"""Bottleneck adapters on five architectures equal the formulas written out on stock models; their files;
and which bases have no place for them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, OPTConfig

from tests import tiny
from tests.bases import load
from tests.methods import textbook_bottleneck as textbook
from tests.methods.textbook_bottleneck import Network
from tests.serving import Row, Step
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.kernels.selection import REFERENCE, select
from weft.methods import bottleneck
from weft.methods.bottleneck.math import Activation, BottleneckConfig, BottleneckParams, Form
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft.model import loader

CONFIGS: dict[str, BottleneckConfig] = {
    "serial": BottleneckConfig(reduction_factor=4, activation=Activation.GELU),
    "serial, no norm": BottleneckConfig(has_norm=False, sublayers=("attention",), size=3, scaling=2.0),
    "parallel": BottleneckConfig(form=Form.PARALLEL, activation=Activation.SILU, size=9, scaling=0.5),
    "sum": BottleneckConfig(
        form=Form.SUM, has_norm=False, sublayers=("mlp",), reduction_factor=16, reduction_factors={1: 5.5}
    ),
    "sum, norm": BottleneckConfig(form=Form.SUM, activation=Activation.GELU, leave_out=(0,), reduction_factor=8),
    "residual": BottleneckConfig(form=Form.RESIDUAL, has_norm=False, reduction_factor=2, scaling=4.0),
    "residual, norm": BottleneckConfig(form=Form.RESIDUAL, sublayers=("mlp",), activation=Activation.SILU),
}
TOLERANCE = 1e-4
PROMPTS = [[5, 9, 77, 3, 120, 64, 2], list(range(40, 73)), [1]]


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def network_of(params: BottleneckParams) -> Network:
    network = Network(len(params.up), len(params.down), params.activation, has_norm=params.norm is not None)
    values = {
        "down.weight": params.down,
        "down.bias": params.down_bias,
        "up.weight": params.up,
        "up.bias": params.up_bias,
        **({"norm.weight": params.norm, "norm.bias": params.norm_bias} if params.norm is not None else {}),
    }
    network.load_state_dict(values)
    network.scaling = params.scaling
    return network


def textbook_logits(path: Path, adapter: Adapter, base: BaseShape) -> list[Tensor]:
    networks = {}
    for name, params in adapter.sites.items():
        layer = base.sites[name].layer
        assert layer is not None
        networks[layer, base.sites[name].sublayer] = network_of(params)
    model = stock(path)
    textbook.attach(model, networks, adapter.config.form)
    return textbook.logits(model, PROMPTS)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_served_logits_are_the_formulas(kind: str, kernels: str, base: loader.Base, path: Path) -> None:
    adapter = tiny.random_bottleneck(base.shape, CONFIGS[kind], seed=3)
    wanted = textbook_logits(path, adapter, base.shape)
    step = Step(base, REFERENCE if kernels == "reference" else select(base.device, base.dtype))
    got = step.logits([Row(prompt, adapter) for prompt in PROMPTS])
    plain = step.logits([Row(prompt) for prompt in PROMPTS])
    for mine, theirs, without in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)
        assert (without - theirs).abs().max() > 100 * TOLERANCE  # the control: a missing adapter would be detected


@pytest.mark.parametrize("one", list(Form))
def test_the_oracle_tells_forms_apart(one: Form, llama: loader.Base) -> None:
    """Negative control: the same weights in another form give other logits."""
    config = BottleneckConfig(form=one, reduction_factor=4)
    adapter = tiny.random_bottleneck(llama.shape, config, seed=3)
    step = Step(llama, REFERENCE)
    mine = step.logits([Row(PROMPTS[1], adapter)])[0]
    for other in set(Form) - {one}:
        sites = {name: params._replace(form=other) for name, params in adapter.sites.items()}
        theirs = step.logits([Row(PROMPTS[1], replace(adapter, sites=sites))])[0]
        assert (mine - theirs).abs().max() > 100 * TOLERANCE


def test_an_untrained_adapter_changes_nothing(llama: loader.Base) -> None:
    """But for the form that is a norm."""
    step = Step(llama, select(llama.device, llama.dtype))
    plain = step.logits([Row(PROMPTS[1])])[0]
    for form in Form:
        config = BottleneckConfig(form=form, reduction_factor=4)
        sites = {
            site.name: bottleneck.math.init(config, site, torch.Generator().manual_seed(0))
            for site in bottleneck.math.places(config, llama.shape.sites.values())
        }
        untrained = Adapter(method=bottleneck.METHOD, config=config, sites=sites)
        got = step.logits([Row(PROMPTS[1], untrained)])[0]
        assert torch.equal(got, plain) is (form is not Form.PARALLEL)


# --- where sublayers end, and what enters them ----------------------------------------------------------------------


def test_the_ends_of_sublayers_are_found(base: loader.Base) -> None:
    ends = {(site.layer, site.sublayer): site for site in base.shape.sites.values() if site.sublayer}
    assert list(ends) == [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert {site.suffix for site in ends.values()} in ({"o_proj", "down_proj"}, {"c_proj"})
    first_norms = [ends[0, sublayer].norm.rpartition(".")[2] for sublayer in ("attention", "mlp")]
    assert first_norms in (["input_layernorm", "post_attention_layernorm"], ["ln_1", "ln_2"])


_NEOX = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
_OPT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
}
LAYOUTS: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {  # ends, and norms that open them
    "sublayers side by side": (
        lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=True),
        ["dense", "dense_4h_to_h"],
        ["", ""],
    ),
    "sublayers in a row": (
        lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
        ["dense", "dense_4h_to_h"],
        ["input_layernorm", "post_attention_layernorm"],
    ),
    "norms before": (lambda: OPTConfig(**_OPT), ["out_proj", "fc2"], ["self_attn_layer_norm", "final_layer_norm"]),
    "norms after": (lambda: OPTConfig(**_OPT, do_layer_norm_before=False), ["out_proj", "fc2"], ["", ""]),
    "norms around": (lambda: Gemma2Config(**tiny._SIZES, head_dim=16), [], []),
}


@pytest.fixture
def other_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def save(layout: str) -> Path:
        monkeypatch.setitem(tiny.ARCHITECTURES, layout, LAYOUTS[layout][0])
        return tiny.save_base(tmp_path / "base", layout)

    return save


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_are_told_apart(layout: str, other_layout: Callable[[str], Path]) -> None:
    _, suffixes, norms = LAYOUTS[layout]
    shape = load(other_layout(layout)).shape
    ends = [site for site in shape.sites.values() if site.sublayer]
    assert [site.suffix for site in ends] == 2 * suffixes
    assert [site.sublayer for site in ends] == len(suffixes) * ["attention", "mlp"]
    assert [site.layer for site in ends] == [layer for layer in range(2) for _ in suffixes]
    assert [site.norm.rpartition(".")[2] for site in ends] == 2 * norms


@pytest.mark.parametrize("layout", ["sublayers side by side", "norms around"])
@pytest.mark.parametrize("form", list(Form))
def test_a_base_without_the_place_refuses_the_form(
    layout: str, form: Form, other_layout: Callable[[str], Path], llama: loader.Base, tmp_path: Path
) -> None:
    path = other_layout(layout)
    shape = load(path).shape
    config = BottleneckConfig(form=form, reduction_factor=4)
    made = tiny.random_bottleneck(shape if shape.sites and layout != "norms around" else llama.shape, config, seed=1)
    directory.write(made, tmp_path / "adapter", replace(shape, digest=""))
    if layout == "sublayers side by side" and not form.reads_residual:
        step = Step(load(path), REFERENCE)
        got = step.logits([Row(prompt, read(tmp_path / "adapter", shape)) for prompt in PROMPTS])
        for mine, theirs in zip(got, textbook_logits(path, made, shape), strict=True):
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)
        return
    field = "adapter_config.sublayers" if layout == "norms around" else "adapter_config.form"
    with pytest.raises(InvalidAdapter, match=field) as refused:
        read(tmp_path / "adapter", shape)
    assert refused.value.reason == "FEATURE_UNSUPPORTED"


def test_the_residual_is_kept_only_while_somebody_reads_it(llama: loader.Base) -> None:
    norms = [module for name, module in llama.model.named_modules() if name.endswith("layernorm")]

    def num_hooks() -> int:
        return sum(len(norm._forward_pre_hooks) for norm in norms)

    readers = tiny.random_bottleneck(llama.shape, CONFIGS["residual"], seed=1)
    others = [
        tiny.random_bottleneck(llama.shape, CONFIGS["serial"], seed=1),
        tiny.random_lora(llama.shape, rank=2, seed=1),
    ]
    step = Step(llama, select(llama.device, llama.dtype))
    step.logits([Row(PROMPTS[0], other) for other in others])
    assert num_hooks() == 0
    step.logits([Row(PROMPTS[0], readers)])
    assert num_hooks() == len(norms) == 4
    assert llama.context.residual is None  # not beyond the step
    step.logits([Row(PROMPTS[0], others[0])])
    assert num_hooks() == 0


# --- files ----------------------------------------------------------------------------------------------------------


def read(path: Path, base: BaseShape, **changes: Any) -> Adapter:
    config = json.loads((path / directory.CONFIG_FILE).read_text())
    return directory.read({**config, **changes}, load_file(path / directory.WEIGHTS_FILE), {}, base, AdapterLimits())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_save_and_load_is_bit_equal(kind: str, base: loader.Base, tmp_path: Path) -> None:
    adapter = tiny.random_bottleneck(base.shape, CONFIGS[kind], seed=3)
    directory.write(adapter, tmp_path, base.shape)
    again = read(tmp_path, base.shape)
    assert again.config == adapter.config
    assert again.sites.keys() == adapter.sites.keys()
    for one, other in zip(adapter.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)


Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]
_O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj.bottleneck"


def _set(**changes: Any) -> Spoil:
    return lambda config, tensors: config.update(changes)


def _put(name: str, make: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda config, tensors: tensors.update({name: make(tensors[name])})


def _rename(name: str, to: str) -> Spoil:
    return lambda config, tensors: tensors.update({to: tensors.pop(name)})


BAD: dict[str, tuple[str, str, Spoil]] = {  # reason, a part of the text, what is done to a good file
    "no version": ("FEATURE_UNSUPPORTED", "bottleneck_format", _set(bottleneck_format=None)),
    "a later version": ("FEATURE_UNSUPPORTED", "bottleneck_format", _set(bottleneck_format=2)),
    "version true": ("FEATURE_UNSUPPORTED", "bottleneck_format", _set(bottleneck_format=True)),
    "an unknown form": ("FEATURE_UNSUPPORTED", "serial, parallel", _set(form="houlsby")),
    "a form that is no text": ("FEATURE_UNSUPPORTED", "adapter_config.form", _set(form=["serial"])),
    "an unknown activation": ("FEATURE_UNSUPPORTED", "relu, gelu, silu", _set(activation="tanh")),
    "an unknown key": ("CONFIG_FIELD_FORBIDDEN", "adapter_config.gate", _set(gate=True)),
    "no sublayer": ("CONFIG_TARGETS", "adapter_config.sublayers", _set(sublayers=[])),
    "a sublayer twice": ("CONFIG_TARGETS", "adapter_config.sublayers", _set(sublayers=["mlp", "mlp"])),
    "fewer sublayers": ("CONFIG_TARGETS", "o_proj", _set(sublayers=["mlp"])),
    "a layer left out that is there": ("CONFIG_TARGETS", "layers.0", _set(leave_out=[0])),
    "a layer that is not": ("CONFIG_INVALID", "leave_out", _set(leave_out=[2])),
    "all layers left out": ("CONFIG_INVALID", "leaves no layer", _set(leave_out=[0, 1])),
    "leave_out is true": ("CONFIG_INVALID", "leave_out", _set(leave_out=[True])),
    "factor 0": ("RANK_INVALID", "reduction_factor", _set(reduction_factor=0)),
    "factor of a name": ("CONFIG_INVALID", "reduction_factors", _set(reduction_factors={"one": 2})),
    "another factor": ("RANK_MISMATCH", "bottleneck_down.weight", _set(reduction_factor=8)),
    "size and factors": ("CONFIG_INVALID", "reduction_factors", _set(size=16, reduction_factors={"0": 4})),
    "too wide": ("RANK_TOO_LARGE", "2048", _set(size=2049)),
    "scaling as text": ("SCALE_INVALID", "adapter_config.scaling", _set(scaling="learned")),
    "too large a scaling": ("SCALE_INVALID", "adapter_config.scaling", _set(scaling=-65.0)),
    "scaling 0": ("ADAPTER_NO_EFFECT", "changes nothing", _set(scaling=0)),
    "eps 0": ("CONFIG_INVALID", "norm_eps", _set(norm_eps=0)),
    "norm as number": ("CONFIG_INVALID", "has_norm", _set(has_norm=1)),
    "norm denied": ("PAIR_INCOMPLETE", "o_proj", _set(has_norm=False)),
    "parallel without norm": ("CONFIG_INVALID", "has_norm", _set(form="parallel", has_norm=False)),
    "a missing tensor": ("PAIR_INCOMPLETE", "o_proj", lambda config, tensors: tensors.pop(f"{_O_PROJ}_up.bias")),
    "a missing place": (
        "PAIR_INCOMPLETE",
        "needs an adapter",
        lambda config, tensors: [tensors.pop(name) for name in list(tensors) if _O_PROJ in name],
    ),
    "a foreign tensor": ("TENSOR_UNKNOWN", "gate", _rename(f"{_O_PROJ}_up.bias", f"{_O_PROJ}_gate.bias")),
    "an unknown module": (
        "MODULE_UNKNOWN",
        "layers.7",
        lambda config, tensors: tensors.update(
            {"model.layers.7.self_attn.o_proj.bottleneck_up.bias": tensors[f"{_O_PROJ}_up.bias"]}
        ),
    ),
    "a module that ends no sublayer": (
        "CONFIG_TARGETS",
        "no sublayer ends here",
        lambda config, tensors: tensors.update(
            {"model.layers.0.self_attn.q_proj.bottleneck_up.bias": tensors[f"{_O_PROJ}_up.bias"]}
        ),
    ),
    "one tensor under two names": (
        "PAIR_INCOMPLETE",
        "another name",
        lambda config, tensors: tensors.update(
            {"model.layers.0.self_attn.o_proj.bottleneck_up.bias": tensors[f"{_O_PROJ}_up.bias"]}
        ),
    ),
    "a shape": ("DIM_MISMATCH", "bottleneck_up.weight", _put(f"{_O_PROJ}_up.weight", lambda t: t.T.contiguous())),
    "two dtypes": ("PAIR_INCOMPLETE", "one dtype", _put(f"{_O_PROJ}_up.weight", Tensor.half)),
    "a NaN": ("NON_FINITE", "bottleneck_norm.bias", _put(f"{_O_PROJ}_norm.bias", lambda t: t * torch.nan)),
    "a large value": ("WEIGHT_OUT_OF_RANGE", "bottleneck_up.bias", _put(f"{_O_PROJ}_up.bias", lambda t: t + 1001)),
    "an untrained one": (
        "ADAPTER_NO_EFFECT",
        "changes nothing",
        lambda config, tensors: [tensor.zero_() for name, tensor in tensors.items() if "_up." in name],
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_files_are_refused(kind: str, llama: loader.Base, tmp_path: Path) -> None:
    adapter = tiny.random_bottleneck(llama.shape, CONFIGS["serial"], seed=3)
    directory.write(adapter, tmp_path, llama.shape)
    assert read(tmp_path, llama.shape).num_parameters == adapter.num_parameters  # the control: it was good
    config = json.loads((tmp_path / directory.CONFIG_FILE).read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / directory.WEIGHTS_FILE).items()}
    reason, text, spoil = BAD[kind]
    spoil(config, tensors)
    with pytest.raises(InvalidAdapter) as refused:
        directory.read(config, tensors, {}, llama.shape, AdapterLimits())
    assert refused.value.reason == reason
    assert text in refused.value.message
