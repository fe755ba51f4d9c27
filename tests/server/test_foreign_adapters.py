"""Directories of other libraries are refused in one sentence that names the remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.tools import adapterhub_files
from weft.adapters.store import AdapterStore
from weft.client.calls import upload
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.methods.protocol import BaseShape

NO_BASE = BaseShape(sites={}, num_layers=1, num_kv_heads=1, head_dim=1, embedding_size=1, digest="", name="none")
CONVERT = "AdapterHub's directories are converted first: `weft adapters convert DIR OUT --base MODEL`"


def refusal(config: dict[str, object]) -> str:
    with pytest.raises(InvalidAdapter) as raised:
        directory.read(config, {}, {}, NO_BASE, AdapterLimits())
    assert raised.value.reason == "FEATURE_UNSUPPORTED"
    return raised.value.message


def test_x_lora() -> None:
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "hidden_size": 64,
        "adapters": {"0": "./0", "1": "./1"},
        "xlora_depth": 1,
        "layerwise_scalings": False,
        "softmax_temperature": 1.0,
    }
    said = refusal(config)
    for part in ("X-LoRA", "a first pass through the whole base", "weft adapters arrow", "mixture"):
        assert part in said
    assert "X-LoRA" not in refusal({**config, "peft_type": "LOHA"})  # the control: any other type is refused plainly


def test_the_config_of_an_adapterhub_directory() -> None:
    config, _, _ = adapterhub_files.made("double_seq_bn", "model.layers")
    assert CONVERT in refusal(config)
    assert CONVERT not in refusal({"model_type": "llama"})  # the control: nothing identifies the library


def _of_a_store(path: Path, root: Path) -> None:
    store = AdapterStore(root / "store", AdapterLimits(), allowed_sources=(root,))
    store.recover()
    store.stage_copy(str(path))


def _of_a_caller(path: Path, root: Path) -> None:
    upload("reverse", path)


@pytest.mark.parametrize("read", [_of_a_store, _of_a_caller])
@pytest.mark.parametrize("name", ["pytorch_adapter.bin", "adapter.safetensors"])
def test_the_files_of_an_adapterhub_directory(read: Callable[[Path, Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / "hub"
    path.mkdir()
    config, _, _ = adapterhub_files.made("double_seq_bn", "model.layers")
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, path / name)
    with pytest.raises((InvalidAdapter, FileNotFoundError), match=CONVERT):
        read(path, tmp_path)
    (path / name).unlink()
    with pytest.raises((InvalidAdapter, FileNotFoundError)) as raised:  # the control: nothing identifies the library
        read(path, tmp_path)
    assert CONVERT not in str(raised.value)
