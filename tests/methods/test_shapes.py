"""Shape types are checked in every test, and cost the product nothing: it runs without the packages that check them."""

import subprocess
import sys
from typing import Annotated

import jaxtyping
import pytest
import torch

from weft.methods import driver, mixture
from weft.methods.base_weight import ModuleWeight
from weft.methods.lora import math as lora
from weft.methods.mixture import MixtureConfig
from weft.methods.prefix.math import PrefixParams

_WITHOUT = """
import sys
sys.modules.update(jaxtyping=None, beartype=None)
import weft.api.serve
from weft.methods.lora.math import delta
print(delta.__annotations__["x"])
"""


def _lora(rank_in: int = 4, rank_out: int = 4) -> lora.LoraParams:
    return lora.LoraParams(torch.zeros(rank_in, 8), torch.zeros(6, rank_out), 1.0)


def test_axes_that_agree_pass() -> None:
    assert lora.delta(_lora(), torch.zeros(2, 3, 8), torch.zeros(2, 3, 6)).shape == (2, 3, 6)


def test_a_wrong_shape_is_seen() -> None:
    """Negative control: the check is active in functions, in records as they are made, and in results."""
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of weft\.methods\.lora\.math\.delta"):
        lora.delta(_lora(), torch.zeros(3, 8), torch.zeros(1, 6))  # would broadcast to three rows
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'b'"):
        _lora(rank_out=5)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'embeddings'"):
        PrefixParams(torch.zeros(3, 2, 3, 2, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of weft\.methods\.lora\.math\.delta"):
        lora.delta(_lora(), torch.zeros(3, 8), torch.zeros(3, 7))


def test_a_wrong_dtype_is_seen() -> None:
    """Negative control."""
    config = MixtureConfig(num_experts=2, top_k=1)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'hidden'"):
        mixture.gates(config, torch.zeros(2, 8), torch.zeros(3, 8, dtype=torch.int64))


def test_methods_and_properties_are_checked() -> None:
    for function in (
        driver.ReferenceDriver.apply,
        mixture.MixtureParams.at,
        ModuleWeight.bias.fget,
        ModuleWeight.blocks,
    ):
        assert hasattr(function, "__wrapped__")


def test_the_product_runs_without_the_checker() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Annotated[torch.Tensor, "*T I"])
