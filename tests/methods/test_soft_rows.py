"""Soft rows on unusual bases: an embedding that scales, and a base whose results on them are not finite."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from tests import tiny
from tests.bases import Bases, load
from tests.serving import Row, Step
from weft.errors import AdapterUnusable
from weft.kernels.selection import REFERENCE, select
from weft.methods.checkpoint import directory


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_a_base_that_scales_inside_its_embedding_does_not_scale_soft_rows(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma multiplies embeddings by the root of the hidden size; PEFT's rows come after that."""
    config = {**tiny._SIZES, "head_dim": 16, "sliding_window": 24, "bos_token_id": 2, "eos_token_id": 1}
    monkeypatch.setitem(tiny.ARCHITECTURES, "gemma2", lambda: Gemma2Config(**config))
    path = tiny.save_base(tmp_path / "base", "gemma2")
    base = load(path)
    adapter = tiny.random_prompt(base.shape, length=5, seed=1)
    directory.write(adapter, tmp_path / "adapter", base.shape)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager"),
        str(tmp_path / "adapter"),
    ).eval()
    tokens = list(range(40, 52))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]
    step = Step(base, REFERENCE if kernels == "reference" else select(base.device, base.dtype))
    (got,) = step.logits([Row(tokens, adapter)])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    scaled = adapter.prefix._replace(embeddings=adapter.prefix.embeddings * 8)  # the control: √64
    (other,) = step.logits([Row(tokens, replace(adapter, prefix=scaled))])
    assert (other - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_rows_that_make_no_numbers_are_refused(kernels: str, bases: Bases) -> None:
    base = bases.fresh()
    step = Step(base, REFERENCE if kernels == "reference" else select(base.device, base.dtype))
    adapter = tiny.random_prompt(base.shape, length=5, seed=1)
    step.logits([Row([5], adapter)])  # the control: on this base it does
    with torch.no_grad():
        base.model.model.layers[1].self_attn.v_proj.base.weight.mul_(1e39)
    with pytest.raises(AdapterUnusable, match="not finite"):
        step.logits([Row([5], adapter)])
