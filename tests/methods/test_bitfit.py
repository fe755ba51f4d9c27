"""BitFit against the base with other biases: both have the same effect."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.bases import Bases
from tests.serving import Row, Step
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.kernels.selection import REFERENCE, select
from weft.methods import bitfit
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, SiteKind
from weft.model import loader
from weft_training import adapter as adapters

_PROMPT = [5, 9, 77, 3, 120, 64, 2]
_NORM = "base_model.model.transformer.h.0.ln_1.weft_norm_bias"


@pytest.fixture(scope="module")
def architecture() -> str:
    """GPT-2: biases at every linear module but the head, and at every norm."""
    return "gpt2"


def _with_biases(path: Path, adapter: Adapter) -> nn.Module:
    """The base as BitFit's authors train it: its own biases, changed."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, params in adapter.sites.items():
            module = model.get_submodule(name)
            assert isinstance(module, nn.LayerNorm | Conv1D)
            module.bias += params.bias
    return model.eval()


@pytest.mark.parametrize("kernels", ["reference", "selected"])
@pytest.mark.parametrize("kinds", [(SiteKind.LINEAR,), (SiteKind.NORM,), (SiteKind.LINEAR, SiteKind.NORM)])
def test_an_added_bias_is_a_changed_bias(
    kernels: str, kinds: tuple[SiteKind, ...], base: loader.Base, path: Path
) -> None:
    adapter = tiny.random_bitfit(base.shape, seed=1, kinds=kinds)
    with torch.no_grad():
        wanted = _with_biases(path, adapter)(input_ids=torch.tensor([_PROMPT])).logits[0]  # pyright: ignore
    step = Step(base, REFERENCE if kernels == "reference" else select(base.device, base.dtype))
    (got,) = step.logits([Row(_PROMPT, adapter)])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    (without,) = step.logits([Row(_PROMPT)])
    assert (without - wanted).abs().max() > 1e-2


def test_the_norms_of_a_base_are_sites_only_where_they_have_a_bias(base: loader.Base, llama: loader.Base) -> None:
    assert {site.suffix for site in base.shape.of_kind(SiteKind.NORM)} == {"ln_1", "ln_2", "ln_f"}
    assert not llama.shape.of_kind(SiteKind.NORM)
    # Only BitFit accepts them.
    for usual in adapters.USUAL.values():
        if adapters.method_of(usual).pack is None or usual is adapters.USUAL["ia3"]:
            continue
        made = adapters.initial(usual, base.shape, torch.Generator())
        kinds = {base.shape.sites[name].kind for name in made.sites}
        assert kinds == ({SiteKind.LINEAR, SiteKind.NORM} if usual is adapters.USUAL["bitfit"] else {SiteKind.LINEAR})


def test_a_file_with_norm_biases_is_bit_equal_and_flagged(base: loader.Base, tmp_path: Path) -> None:
    made = tiny.random_bitfit(base.shape, seed=2)
    directory.write(made, tmp_path, base.shape)
    assert '"weft_norm_biases": true' in (tmp_path / directory.CONFIG_FILE).read_text()
    again = adapters.read(tmp_path, base.shape)
    assert again.sites.keys() == made.sites.keys()
    assert all(torch.equal(a, b) for a, b in zip(made.tensors(), again.tensors(), strict=True))
    directory.write(tiny.random_bitfit(base.shape, seed=2, kinds=(SiteKind.LINEAR,)), tmp_path, base.shape)
    assert "weft_norm_biases" not in (tmp_path / directory.CONFIG_FILE).read_text()


def test_peft_loads_a_file_with_a_norm_bias_without_the_norm(bases: Bases, tmp_path: Path) -> None:
    """The linear part is PEFT's own form. A base of the Llama type has no such norm, so one is written by hand."""
    path, shape = bases.path("llama"), bases("llama").shape
    made = tiny.random_bitfit(shape, seed=3)
    norm = {"model.norm": bitfit.math.BitfitParams(torch.ones(64), is_norm=True)}
    logits = []
    for name, sites in (("plain", made.sites), ("norm", {**made.sites, **norm})):
        directory.write(Adapter(method=bitfit.METHOD, config=made.config, sites=sites), tmp_path / name, shape)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / name)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([_PROMPT])).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("changes", "flag", "reason"),
    [
        ({}, False, "CONFIG_INVALID"),  # the file has norm biases and the config does not say so
        ({_NORM: torch.ones(1, 64)}, True, "DIM_MISMATCH"),
        ({_NORM.replace("weft_norm_bias", "beft_bias"): torch.ones(1, 64)}, True, "TENSOR_UNKNOWN"),
        ({_NORM.replace("ln_1", "attn.c_attn"): torch.ones(192)}, True, "TENSOR_UNKNOWN"),
        ({_NORM.replace("h.0", "h.7"): torch.ones(64)}, True, "MODULE_UNKNOWN"),
        ({_NORM: torch.full((64,), float("nan"))}, True, "NON_FINITE"),
        ({_NORM: torch.full((64,), 1e30)}, True, "WEIGHT_OUT_OF_RANGE"),
        ({_NORM.removeprefix("base_model.model."): torch.ones(64)}, True, "PAIR_INCOMPLETE"),
        ({_NORM.replace("weft_norm_bias", "bias"): torch.ones(64)}, True, "TENSOR_UNKNOWN"),
    ],
)
def test_wrong_files_are_refused(changes: dict[str, torch.Tensor], flag: bool, reason: str, base: loader.Base) -> None:
    config, tensors = bitfit.files.write(tiny.random_bitfit(base.shape, seed=4), base.shape)
    if any("ln_1.beft_bias" in key or "c_attn.weft" in key for key in changes):  # in place of the right tensor
        right = next(k for k in tensors if k.rpartition(".")[0] == next(iter(changes)).rpartition(".")[0])
        del tensors[right]
    config["weft_norm_biases"] = flag
    with pytest.raises(InvalidAdapter) as refused:
        bitfit.files.read(config, {**tensors, **changes}, base.shape, AdapterLimits())
    assert refused.value.reason == reason
    config["weft_norm_biases"] = True  # the control: the unchanged file is right
    _, tensors = bitfit.files.write(tiny.random_bitfit(base.shape, seed=4), base.shape)
    assert bitfit.files.read(config, tensors, base.shape, AdapterLimits())


def test_biases_that_are_all_zero_have_no_effect(base: loader.Base) -> None:
    made = tiny.random_bitfit(base.shape, seed=5)
    config, tensors = bitfit.files.write(made, base.shape)
    with pytest.raises(InvalidAdapter) as refused:
        bitfit.files.read(config, {k: torch.zeros_like(t) for k, t in tensors.items()}, base.shape, AdapterLimits())
    assert refused.value.reason == "ADAPTER_NO_EFFECT"
