"""A model that cannot be served gives one sentence: the finding, the reason, the remedy. No traceback is printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.families.configurations import CONFIGURATIONS
from tests.families.measured import require_sentence
from weft.config import ModelConfig
from weft.model import gate, loader
from weft.model.gate import BaseRefused


def _config(directory: Path, **keys: object) -> Path:
    """Write only a config.json: a model that it rules out is refused before any weight is looked for."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


def _refusal(path: Path) -> str:
    with pytest.raises(BaseRefused) as refused:
        loader.read(ModelConfig(path=path, device="cpu"), attention="eager")
    require_sentence(str(refused.value))
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bloom", "computes attention by itself"),
        ("codegen", "computes attention by itself"),
        ("falcon", "computes attention by itself"),
        ("lfm2", "convolution layers"),
        ("mamba2", "state-space layers"),
        ("qwen3_next", "linear attention"),
        ("llama4_text", "attention in chunks"),
        ("deepseek_v3", "multi-head latent attention"),
        ("gpt_oss", "attention sinks"),
        ("gemma4_text", "attention heads of 16 and 32 features"),
    ],
)
def test_a_kind_of_model_is_refused_by_the_name_of_its_feature(name: str, found: str, tmp_path: Path) -> None:
    configuration = next(one for one in CONFIGURATIONS if one.name == name)
    configuration.make().save_pretrained(tmp_path)
    text = _refusal(tmp_path)
    assert found in text
    assert "serve a base that `weft families` lists as equal" in text


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "mxfp4", "compressed-tensors"])
def test_a_checkpoint_that_is_quantized_otherwise_is_refused(method: str, tmp_path: Path) -> None:
    config = tiny.ARCHITECTURES["llama"]().to_dict()
    text = _refusal(_config(tmp_path, **{**config, "quantization_config": {"quant_method": method}}))
    assert f"quantized as {method}" in text
    assert "serve the unquantized checkpoint" in text


def test_remote_code_and_unknown_models_are_refused(tmp_path: Path) -> None:
    own = _config(tmp_path / "own", model_type="my_model", auto_map={"AutoConfig": "configuration.MyConfig"})
    assert "brings model code of its own" in _refusal(own)
    assert "is a my_model model, which the installed transformers does not know" in _refusal(
        _config(tmp_path / "unknown", model_type="my_model")
    )


def test_a_model_without_a_causal_head_is_refused(tmp_path: Path) -> None:
    assert "no causal language model" in _refusal(_config(tmp_path, model_type="vit"))


def test_what_model_code_raises_becomes_a_sentence() -> None:
    with (
        pytest.raises(BaseRefused, match="cannot be run on two tokens") as refused,
        gate.refusing("x", "run on two tokens"),
    ):
        raise KeyError("a\nb")
    require_sentence(str(refused.value))
    with pytest.raises(OSError, match="disk"), gate.refusing("x", "read"):
        raise OSError("disk")  # says what is wrong by itself


def test_no_traceback_reaches_a_terminal(tmp_path: Path) -> None:
    """A real process, on a model that passes the gate and fails its self-test."""
    configuration = next(one for one in CONFIGURATIONS if one.name == "nemotron")
    AutoModelForCausalLM.from_config(configuration.make()).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path, 320)
    for command in (["serve", str(tmp_path), "--quant", "none"], _dry_run(tmp_path)):
        ended = subprocess.run(
            [sys.executable, "-m", "weft", *command], capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        [line] = [line for line in ended.stderr.splitlines() if "cannot be computed as one sequence" in line]
        require_sentence(line)


def _dry_run(base: Path) -> list[str]:
    rows = base / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    options = ["--base", str(base), "--method", "lora", "--data", str(rows), "--output", str(base / "out")]
    return ["train", *options, "--quantization", "none", "--dry-run"]
