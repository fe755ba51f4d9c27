"""X-LoRA directories, PEFT's and the authors', are refused by name, with the reason and what to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.methods.protocol import BaseShape

NO_BASE = BaseShape(sites={}, num_layers=1, num_kv_heads=1, head_dim=1, embedding_size=1, digest="", name="none")


def assert_told(error: InvalidAdapter) -> None:
    assert error.reason == "FEATURE_UNSUPPORTED"
    for said in ("X-LoRA is not served", "a first pass through the whole base", "weft adapters arrow", "mixture"):
        assert said in error.message


def test_pefts_layout(tmp_path: Path) -> None:
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "hidden_size": 64,
        "adapters": {"0": "./0", "1": "./1"},
        "xlora_depth": 1,
        "layerwise_scalings": False,
        "softmax_temperature": 1.0,
    }
    tensors = {"base_model.internal_xlora_classifier.layers.0.weight": torch.zeros(2, 64)}
    with pytest.raises(InvalidAdapter) as raised:
        directory.read(config, tensors, {}, NO_BASE, AdapterLimits())
    assert_told(raised.value)
    with pytest.raises(InvalidAdapter) as raised:  # the control: any other type is told plainly
        directory.read({**config, "peft_type": "LOHA"}, tensors, {}, NO_BASE, AdapterLimits())
    assert "X-LoRA" not in raised.value.message


def test_the_authors_layout(tmp_path: Path) -> None:
    source = tmp_path / "xlora"
    (source / "adapters" / "adapter_1").mkdir(parents=True)
    (source / "xlora_config.json").write_text(json.dumps({"hidden_size": 64, "xlora_depth": 1, "base_model_id": "b"}))
    save_file({"inner.0.weight": torch.zeros(2, 64)}, source / "xlora_classifier.safetensors")
    store = AdapterStore(tmp_path / "store", AdapterLimits(), allowed_sources=(tmp_path,))
    store.recover()
    with pytest.raises(InvalidAdapter) as raised:
        store.stage_copy(str(source))
    assert_told(raised.value)
    (source / "xlora_config.json").unlink()
    with pytest.raises(InvalidAdapter) as raised:  # the control: nothing else looks like one
        store.stage_copy(str(source))
    assert raised.value.reason == "SOURCE_NOT_FOUND"
