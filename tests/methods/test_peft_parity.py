"""Every method on every architecture equals Hugging Face PEFT: its files, its logits.

PEFT is the oracle: an adapter is written by Weft, loaded by PEFT, and both compute the same prompts in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.serving import Row, Step
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.kernels.selection import REFERENCE, select
from weft.methods.checkpoint import directory
from weft.methods.lora import files as lora_files
from weft.methods.protocol import Adapter, BaseShape, SiteKind
from weft.model import loader


def _with_head(base: BaseShape) -> tuple[str, ...]:
    return tuple(sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR, SiteKind.HEAD)}))


def _unequal(base: BaseShape) -> tuple[str, ...]:
    """Return modules that differ in both of their sizes."""
    suffixes = {site.suffix for site in base.of_kind(SiteKind.LINEAR)}
    return tuple(sorted(suffixes & {"v_proj", "qkv_proj", "c_attn", "down_proj", "c_proj"}))


_ADAPTERS: dict[str, Callable[[BaseShape], Adapter]] = {
    "lora-r1": lambda base: tiny.random_lora(base, rank=1, seed=1),
    "lora-r8": lambda base: tiny.random_lora(base, rank=8, seed=2),
    "lora-bias": lambda base: tiny.random_lora(base, rank=3, seed=7, lora_bias=True),
    "dora-r1": lambda base: tiny.random_dora(base, rank=1, seed=8),
    "dora-r8": lambda base: tiny.random_dora(base, rank=8, seed=9),
    "lora-head": lambda base: tiny.random_lora(base, rank=3, seed=10, targets=("lm_head",)),
    "lora-all-and-head": lambda base: tiny.random_lora(base, rank=2, seed=11, targets=_with_head(base)),
    "dora-head": lambda base: tiny.random_dora(base, rank=2, seed=12, targets=_with_head(base)),
    "vera-r3": lambda base: tiny.random_vera(base, rank=3, seed=13),
    "vera-unequal": lambda base: tiny.random_vera(base, rank=40, seed=14, targets=_unequal(base)),
    "ia3": lambda base: tiny.random_ia3(base, seed=3),
    "prefix-5": lambda base: tiny.random_prefix(base, length=5, seed=4),
    "prefix-16": lambda base: tiny.random_prefix(base, length=16, seed=5),
    "prefix-19": lambda base: tiny.random_prefix(base, length=19, seed=6),
    "prompt-3": lambda base: tiny.random_prompt(base, length=3, seed=7),
    "prompt-33": lambda base: tiny.random_prompt(base, length=33, seed=8),  # beyond Mistral's window
    "ptuning-16": lambda base: tiny.random_ptuning(base, length=16, seed=9),
}
_TOLERANCE = 1e-4
_PROMPTS = [[5, 9, 77, 3, 120, 64, 2], list(range(40, 73)), [1]]


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def _peft_logits(base_path: Path, adapter_path: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter_path)).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([prompt])).logits[0, -len(prompt) :] for prompt in _PROMPTS]


@pytest.mark.parametrize("kind", sorted(_ADAPTERS))
@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_served_logits_equal_peft(kind: str, kernels: str, base: loader.Base, path: Path, tmp_path: Path) -> None:
    adapter = _ADAPTERS[kind](base.shape)
    directory.write(adapter, tmp_path, base.shape)
    wanted = _peft_logits(path, tmp_path)
    chosen = REFERENCE if kernels == "reference" else select(base.device, base.dtype)
    got = Step(base, chosen).logits([Row(prompt, adapter) for prompt in _PROMPTS])
    plain = Step(base, chosen).logits([Row(prompt) for prompt in _PROMPTS])
    for mine, peft_s, without in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)
        # Negative control: the comparison would detect an adapter without effect.
        assert (without - peft_s).abs().max() > 100 * _TOLERANCE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_made_lora_with_patterns_is_read_exactly(
    base: loader.Base, path: Path, tmp_path: Path, use_rslora: bool
) -> None:
    """A file that PEFT wrote: unequal ranks and alphas by pattern, rsLoRA."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    first = next(name for name, site in base.shape.sites.items() if site.suffix == suffixes[0])
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=suffixes,
        use_rslora=use_rslora,
        rank_pattern={suffixes[-1]: 7, first: 2},
        alpha_pattern={suffixes[-1]: 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=path.name == "gpt2",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    model.save_pretrained(str(tmp_path))
    adapter = _read(tmp_path, base.shape)
    assert adapter.sites[first].rank == 2
    wanted = _peft_logits(path, tmp_path)
    got = Step(base, REFERENCE).logits([Row(prompt, adapter) for prompt in _PROMPTS])
    for mine, peft_s in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_made_dora_with_patterns_is_read_exactly(
    base: loader.Base, path: Path, tmp_path: Path, use_rslora: bool
) -> None:
    """A file that PEFT wrote: DoRA with unequal ranks and alphas, and all values changed from the initial ones."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_dora=True,
        use_rslora=use_rslora,
        target_modules=suffixes,
        rank_pattern={suffixes[-1]: 7},
        alpha_pattern={suffixes[0]: 3},
        task_type="CAUSAL_LM",
        fan_in_fan_out=path.name == "gpt2",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    model.save_pretrained(str(tmp_path))
    _assert_read_exactly(tmp_path, base, path, "dora")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_peft_made_lora_with_trained_base_biases_is_read_exactly(
    base: loader.Base, path: Path, tmp_path: Path, bias: str, lora_bias: bool
) -> None:
    """The base keeps its biases; the difference of PEFT's is added. GPT-2 also has biases at norms."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    config = peft.LoraConfig(r=3, bias=bias, lora_bias=lora_bias, target_modules=suffixes, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path))
    if (path.name, bias) == ("gpt2", "all"):
        with pytest.raises(InvalidAdapter, match="outside of target_modules") as refused:
            _read(tmp_path, base.shape)
        assert refused.value.reason == "FEATURE_UNSUPPORTED"
        return
    adapter = _assert_read_exactly(tmp_path, base, path, "lora")
    has_biases = path.name in ("gpt2", "qwen2")
    assert any("base_layer.bias" in key for key in load_file(tmp_path / directory.WEIGHTS_FILE)) is has_biases
    # It is written with a bias beside B, and is the same again.
    directory.write(adapter, tmp_path / "again", base.shape)
    _assert_read_exactly(tmp_path / "again", base, path, "lora")


def test_base_biases_that_do_not_fit_are_refused(base: loader.Base) -> None:
    site = base.shape.of_kind(SiteKind.LINEAR)[0]
    config, tensors = lora_files.write(tiny.random_lora(base.shape, rank=2, seed=13), base.shape)
    key = f"base_model.model.{site.name}.base_layer.bias"
    assert site.read_base is not None
    has_bias = site.read_base(lambda held: held.bias) is not None
    size = site.out_features
    for added, form, reason in (
        ({key: torch.zeros(size)}, "lora_only", "" if has_bias else "TENSOR_UNKNOWN"),
        ({key: torch.zeros(size)}, "none", "TENSOR_UNKNOWN"),
        ({key: torch.zeros(size + 1)}, "lora_only", "DIM_MISMATCH"),
        ({key: torch.full((size,), float("nan"))}, "all", "NON_FINITE"),
        ({key.replace(site.name, "model.other"): torch.zeros(size)}, "all", "PAIR_INCOMPLETE"),
    ):
        if not reason:
            assert lora_files.read({**config, "bias": form}, {**tensors, **added}, base.shape, AdapterLimits())
            continue
        with pytest.raises(InvalidAdapter) as refused:
            lora_files.read({**config, "bias": form}, {**tensors, **added}, base.shape, AdapterLimits())
        assert refused.value.reason == reason


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_made_lora_on_the_head_is_read_beside_the_head_it_saved(
    base: loader.Base, path: Path, tmp_path: Path, use_dora: bool
) -> None:
    """PEFT also saves the frozen head, whose only valid value is the base's own; GPT-2's is tied to its embedding."""
    first = base.shape.of_kind(SiteKind.LINEAR)[0].suffix
    config = peft.LoraConfig(r=3, use_dora=use_dora, target_modules=[first, "lm_head"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    model.save_pretrained(str(tmp_path))
    _assert_read_exactly(tmp_path, base, path, "dora" if use_dora else "lora")
    weights = load_file(tmp_path / directory.WEIGHTS_FILE)
    saved = [name for name in weights if name.endswith("lm_head.base_layer.weight")]
    assert saved == ["base_model.model.lm_head.base_layer.weight"]
    config_read = json.loads((tmp_path / directory.CONFIG_FILE).read_text())
    # Another head is refused, even if one number differs; the same one in bfloat16 is not.
    other = weights[saved[0]].clone()
    other[-1, -1] += 0.25
    with pytest.raises(InvalidAdapter, match="adapters do not replace the head") as refused:
        directory.read(config_read, {**weights, saved[0]: other}, {}, base.shape, AdapterLimits())
    assert refused.value.reason == "FEATURE_UNSUPPORTED"
    rounded = {**weights, saved[0]: weights[saved[0]].bfloat16()}
    assert directory.read(config_read, rounded, {}, base.shape, AdapterLimits())


@pytest.mark.parametrize("is_pruned", [False, True])
def test_peft_made_adalora_is_read_as_the_lora_it_is(
    base: loader.Base, path: Path, tmp_path: Path, is_pruned: bool
) -> None:
    """Also after rows were removed: the divisor is still the initial rank."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        total_step=10,
        lora_alpha=24,
        target_modules=suffixes,
        task_type="CAUSAL_LM",
        fan_in_fan_out=path.name == "gpt2",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    pruned = next(name for name, site in base.shape.sites.items() if site.suffix == suffixes[0])
    if is_pruned:
        kept = {pruned: [True, False, True, False, True, True]}
        model.peft_config["default"].rank_pattern = {
            f"{name}.lora_E": kept.get(name, [True] * 6)
            for name in base.shape.sites
            if name.rpartition(".")[2] in suffixes
        }
    model.save_pretrained(str(tmp_path))
    adapter = _assert_read_exactly(tmp_path, base, path, "lora")
    assert adapter.sites[pruned].rank == (4 if is_pruned else 6)
    # It is written as LoRA, and is the same again.
    directory.write(adapter, tmp_path / "lora", base.shape)
    _assert_read_exactly(tmp_path / "lora", base, path, "lora")


def test_peft_made_vera_is_read_exactly(base: loader.Base, path: Path, tmp_path: Path) -> None:
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    config = peft.VeraConfig(r=6, target_modules=suffixes, task_type="CAUSAL_LM", fan_in_fan_out=path.name == "gpt2")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    model.save_pretrained(str(tmp_path))
    adapter = _assert_read_exactly(tmp_path, base, path, "vera")
    assert adapter.num_parameters == model.get_nb_trainable_parameters()[0]  # the projection is not trained
    # It is written with its projection, and is the same again.
    directory.write(adapter, tmp_path / "again", base.shape)
    _assert_read_exactly(tmp_path / "again", base, path, "vera")


def test_peft_made_beft_is_read_exactly(base: loader.Base, path: Path, tmp_path: Path) -> None:
    if path.name == "gpt2":
        pytest.skip("PEFT's BEFT knows no Conv1D; test_bitfit.py has GPT-2")
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    config = peft.BeftConfig(target_modules=suffixes, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    _move(model)
    model.save_pretrained(str(tmp_path))
    _assert_read_exactly(tmp_path, base, path, "bitfit")


def test_peft_made_cartridge_is_read_exactly(base: loader.Base, path: Path, tmp_path: Path) -> None:
    """It is prefix tuning under another name, even with positions that stayed frozen."""
    config = peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "prompt_encoder" in name):
            parameter.normal_()
    model.save_pretrained(str(tmp_path))
    adapter = _assert_read_exactly(tmp_path, base, path, "prefix")
    assert adapter.num_virtual_tokens == 5


def _move(model: peft.PeftModel) -> None:
    """Move every parameter of an adapter away from its initial value, in place."""
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if ".default" in name):
            parameter.add_(0.2 * torch.randn_like(parameter))


def _assert_read_exactly(made: Path, base: loader.Base, path: Path, method: str) -> Adapter:
    adapter = _read(made, base.shape)
    assert adapter.method.name == method
    wanted = _peft_logits(path, made)
    got = Step(base, select(base.device, base.dtype)).logits([Row(prompt, adapter) for prompt in _PROMPTS])
    plain = Step(base, REFERENCE).logits([Row(prompt) for prompt in _PROMPTS])
    for mine, peft_s, without in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)
        assert (without - peft_s).abs().max() > 100 * _TOLERANCE
    return adapter


@pytest.mark.parametrize("kind", sorted(_ADAPTERS))
def test_save_and_load_is_bit_equal(kind: str, base: loader.Base, tmp_path: Path) -> None:
    adapter = _ADAPTERS[kind](base.shape)
    directory.write(adapter, tmp_path, base.shape)
    again = _read(tmp_path, base.shape)
    assert again.method is adapter.method
    assert again.num_parameters == adapter.num_parameters
    for one, other in zip(adapter.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)


def _read(path: Path, base: BaseShape) -> Adapter:
    weights = path / directory.WEIGHTS_FILE
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    config = json.loads((path / directory.CONFIG_FILE).read_text())
    return directory.read(config, load_file(weights), metadata, base, AdapterLimits())
