"""Common fixtures of the tests of mixing: two architectures as served, and the same in transformers, in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bases import Bases
from tests.serving import Step, selected
from weft.config import Quantization
from weft.methods.inject import AdaptedLinear
from weft.methods.protocol import SiteKind
from weft.model.loader import Base

_TOLERANCES = {  # of `error` between the same row in two batch shapes
    (Quantization.NONE, "float32"): 1e-5,
    (Quantization.NF4, "bfloat16"): 0.03,
    (Quantization.INT8, "bfloat16"): 0.03,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(path: Path) -> Any:
    """Return transformers' own model in float64."""
    return _stock(path)


@pytest.fixture(scope="module")
def exact(bases: Bases, architecture: str) -> Base:
    """Return the base as it is served, in float64."""
    held = bases.fresh(architecture)
    return replace(held, model=held.model.double(), dtype=torch.float64)


@pytest.fixture(scope="module", params=list(_TOLERANCES), ids=lambda key: f"{key[0].value}-{key[1]}")
def step_and_tolerance(bases: Bases, request: pytest.FixtureRequest) -> tuple[Step, float]:
    """Return steps of a Llama with the fast kernels, and how far a row's logits may differ in two batch shapes."""
    base = bases("llama", *request.param)
    return Step(base, selected(base), num_kv_blocks=1024), _TOLERANCES[request.param]


@pytest.fixture(scope="session")
def nf4_and_stock(bases: Bases) -> tuple[Base, Any]:
    """Return a Llama in NF4, and transformers' own model in float64 with its weights dequantized."""
    nf4, stock = bases.fresh("llama", Quantization.NF4), _stock(bases.path("llama"))
    for name, module in nf4.model.named_modules():
        if isinstance(module, AdaptedLinear) and module.site.kind is SiteKind.LINEAR:
            weight = module.base.weight
            assert isinstance(module.base, bnb.nn.Linear4bit)
            dequantized = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            stock.get_submodule(name).weight.data.copy_(dequantized.double())
    return nf4, stock


def _stock(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return model.double().eval().requires_grad_(False)
