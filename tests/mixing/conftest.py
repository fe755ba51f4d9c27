"""Common fixtures of the tests of mixing: two architectures as served, and the same in transformers, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from weft.config import ModelConfig, Quantization
from weft.model import loader, paged_attention


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base of the architecture, on disk."""
    paged_attention.register()
    return tiny.save_base(tmp_path_factory.mktemp("mixing") / request.param, request.param)


@pytest.fixture(scope="module")
def stock(path: Path) -> Any:
    """Return transformers' own model in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base(path: Path) -> loader.Base:
    """Return the base as it is served, in float32."""
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    return loader.load(config, attention=paged_attention.ATTENTION)
