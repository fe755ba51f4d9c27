"""Adapters as PEFT saves them: each kind of a served type loads, every other one is refused in one sentence.

PEFT makes every directory on a tiny Llama, with its trainable tensors changed; the server's own ingest reads it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from weft.adapters.ingest import CONFIG_FILE, Ingest
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.model import loader

_QV = ["q_proj", "v_proj"]
_VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}


def _lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": _QV, "r": 4, **options})


class _Refused(NamedTuple):
    """The content of the refusal: the key, and the remedy."""

    make: Callable[[], peft.PeftConfig]
    says: tuple[str, ...]


# By name: the configuration, and the method as which it is served.
_SERVED: Mapping[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "trl-quick-start": (lambda: peft.LoraConfig(), "lora"),
    "lora-without-task-type": (lambda: _lora(task_type=None), "lora"),
    "ia3-without-task-type": (lambda: peft.IA3Config(), "ia3"),
    "lora": (lambda: _lora(), "lora"),
    "lora-all-linear": (lambda: _lora(target_modules="all-linear"), "lora"),
    "lora-regex": (lambda: _lora(target_modules=r".*\.1\.self_attn\.(q|k)_proj"), "lora"),
    "lora-one-layer": (lambda: _lora(layers_to_transform=[1], layers_pattern="layers"), "lora"),
    "lora-excluding": (lambda: _lora(target_modules="all-linear", exclude_modules=["down_proj"]), "lora"),
    "lora-patterns": (lambda: _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), "lora"),
    "lora-r128": (lambda: _lora(r=128, lora_alpha=128), "lora"),
    "lora-r256": (lambda: _lora(r=256, lora_alpha=256), "lora"),
    "rslora-r128": (lambda: _lora(r=128, lora_alpha=32, use_rslora=True), "lora"),
    "lora-dropout": (lambda: _lora(lora_dropout=0.1), "lora"),
    "lora-gaussian": (lambda: _lora(init_lora_weights="gaussian"), "lora"),
    "lora-orthogonal": (lambda: _lora(init_lora_weights="orthogonal"), "lora"),
    "lora-bias-only": (lambda: _lora(bias="lora_only"), "lora"),
    "lora-bias-all": (lambda: _lora(bias="all"), "lora"),
    "lora-own-bias": (lambda: _lora(lora_bias=True), "lora"),
    "lora-head": (lambda: _lora(target_modules=[*_QV, "lm_head"]), "lora"),
    "dora": (lambda: _lora(use_dora=True), "dora"),
    "dora-rslora": (lambda: _lora(use_dora=True, use_rslora=True), "dora"),
    "activated-lora": (lambda: _lora(alora_invocation_tokens=[5, 6]), "lora"),
    "vera": (lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=_QV, r=4), "vera"),
    "vera-r256": (lambda: peft.VeraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]), "vera"),
    "adalora": (
        lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=_QV, init_r=6, target_r=4, total_step=10),
        "lora",
    ),
    "ia3": (lambda: peft.IA3Config(task_type="CAUSAL_LM"), "ia3"),
    "ia3-named": (
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3",
    ),
    "beft": (lambda: peft.BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]), "bitfit"),
    "prefix": (lambda: peft.PrefixTuningConfig(**_VIRTUAL), "prefix"),
    "prefix-projected": (
        lambda: peft.PrefixTuningConfig(**_VIRTUAL, prefix_projection=True, encoder_hidden_size=32),
        "prefix",
    ),
    "cartridge": (lambda: peft.CartridgeConfig(**_VIRTUAL), "prefix"),
    "prompt": (lambda: peft.PromptTuningConfig(**_VIRTUAL), "prompt"),
    "ptuning": (lambda: peft.PromptEncoderConfig(**_VIRTUAL, encoder_hidden_size=32), "ptuning"),
    "ptuning-lstm": (
        lambda: peft.PromptEncoderConfig(**_VIRTUAL, encoder_hidden_size=32, encoder_reparameterization_type="LSTM"),
        "ptuning",
    ),
}
# Served types, with options that a server does not support yet.
_LATER: Mapping[str, _Refused] = {
    "modules-to-save": _Refused(lambda: _lora(modules_to_save=["lm_head"]), ("modules_to_save", "target_modules")),
    "trainable-tokens": _Refused(
        lambda: _lora(trainable_token_indices=[3, 4]), ("trainable_token_indices", "train without it")
    ),
    "embedding": _Refused(lambda: _lora(target_modules=["q_proj", "embed_tokens"]), ("embed_tokens", "target_modules")),
    "pissa": _Refused(
        lambda: _lora(init_lora_weights="pissa"), ("init_lora_weights", "path_initial_model_for_weight_conversion")
    ),
    "olora": _Refused(
        lambda: _lora(init_lora_weights="olora"), ("init_lora_weights", "path_initial_model_for_weight_conversion")
    ),
    "target-parameters": _Refused(
        lambda: _lora(target_parameters=["q_proj.weight"], target_modules=["v_proj"]),
        ("target_parameters", "target_modules"),
    ),
    "vera-without-projection": _Refused(
        lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=_QV, r=4, save_projection=False),
        ("adapter_config.save_projection", "save it again with save_projection=True"),
    ),
    "vera-with-biases": _Refused(
        lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=_QV, r=4, bias="vera_only"),
        ("adapter_config.bias", "unset or 'none'"),
    ),
    "seq-cls": _Refused(lambda: _lora(task_type="FEATURE_EXTRACTION"), ("task_type", "CAUSAL_LM")),
    "rank-512": _Refused(lambda: _lora(r=512), ("adapter_config.r", "limit 256", "--adapter-rank-max")),
    "large-scale": _Refused(lambda: _lora(r=1, lora_alpha=65), ("lora_alpha", "limit 64", "--adapter-scaling-max")),
}
# Other types; if PEFT can convert one to a LoRA, the refusal names the conversion.
_OTHER_TYPES: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "LOHA": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=_QV, r=4),
    "LOKR": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=_QV, r=4),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8),
    "BOFT": lambda: peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], boft_block_size=4),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[3]
    ),
    "VBLORA": lambda: peft.VBLoRAConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], num_vectors=16, vector_length=16, r=2, topk=2
    ),
    "FOURIERFT": lambda: peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_frequency=8),
    "HRA": lambda: peft.HRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "ROAD": lambda: peft.RoadConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], group_size=8),
    "C3A": lambda: peft.C3AConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], block_size=8),
    "MISS": lambda: peft.MissConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "RANDLORA": lambda: peft.RandLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "DELORA": lambda: peft.DeloraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "HIRA": lambda: peft.HiraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "SHIRA": lambda: peft.ShiraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "WAVEFT": lambda: peft.WaveFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_frequency=64),
    "GRALORA": lambda: peft.GraloraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, gralora_k=2),
}


def _saved(config: peft.PeftConfig, path: Path, output: Path) -> Any:
    """Return the model, after PEFT has saved it to `output` with every trainable tensor changed."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(output))
    return model


def _read(output: Path, base: loader.Base, limits: AdapterLimits | None = None) -> Any:
    ingest = Ingest(base.shape, limits or AdapterLimits(), torch.float32)
    with (output / CONFIG_FILE).open("rb") as config, (output / WEIGHTS_FILE).open("rb") as weights:
        return ingest.read(config, weights, size_bytes=1).info


def _refusal(output: Path, base: loader.Base) -> str:
    with pytest.raises(InvalidAdapter) as raised:
        _read(output, base)
    assert "\n" not in raised.value.message
    return raised.value.message


def test_there_are_forty_kinds() -> None:
    assert len(_SERVED) + len(_LATER) + len(_OTHER_TYPES) >= 40


@pytest.mark.parametrize("kind", _SERVED)
def test_a_served_type_loads(kind: str, path: Path, base: loader.Base, tmp_path: Path) -> None:
    make, method = _SERVED[kind]
    _saved(make(), path, tmp_path)
    assert _read(tmp_path, base).method == method


@pytest.mark.parametrize("kind", _LATER)
def test_what_is_not_served_yet_is_refused_with_key_and_remedy(
    kind: str, path: Path, base: loader.Base, tmp_path: Path
) -> None:
    make, says = _LATER[kind]
    _saved(make(), path, tmp_path)
    message = _refusal(tmp_path, base)
    assert all(text in message for text in says), message


@pytest.mark.parametrize("peft_type", _OTHER_TYPES)
def test_another_type_is_refused_by_name(peft_type: str, path: Path, base: loader.Base, tmp_path: Path) -> None:
    """With PEFT's conversion to a LoRA, exactly if PEFT states that it has one."""
    model = _saved(_OTHER_TYPES[peft_type](), path, tmp_path)
    message = _refusal(tmp_path, base)
    assert peft_type in message
    assert ("save_as_lora" in message) == model.supports_lora_conversion(), message


def test_every_type_of_peft_is_served_or_refused_by_name(base: loader.Base) -> None:
    for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        with pytest.raises(InvalidAdapter) as raised:
            directory.read({"peft_type": peft_type.value}, {}, {}, base.shape, AdapterLimits())
        assert "\n" not in raised.value.message


def test_an_unknown_key_may_be_allowed_by_name(path: Path, base: loader.Base, tmp_path: Path) -> None:
    _saved(_lora(), path, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "later_option": 16}))
    message = _refusal(tmp_path, base)
    assert f"peft_version {peft.__version__}" in message
    assert "--adapter-ignored-config-key later_option" in message
    assert _read(tmp_path, base, AdapterLimits(ignored_config_keys=("later_option",))).method == "lora"
    # A key that is known to change the result is never ignored.
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "use_qalora": True}))
    with pytest.raises(InvalidAdapter, match="use_qalora"):
        _read(tmp_path, base, AdapterLimits(ignored_config_keys=("use_qalora",)))


def test_a_converted_adapter_is_served(path: Path, base: loader.Base, tmp_path: Path) -> None:
    """The remedy that the refusal names gives an adapter that loads."""
    model = _saved(_OTHER_TYPES["LOHA"](), path, tmp_path / "loha")
    peft.save_as_lora(tmp_path / "lora", model, rank=8)
    assert _read(tmp_path / "lora", base).method == "lora"
