"""The output head is computed where a next token is learned; loss and gradients are those of all positions."""

from pathlib import Path

import pytest
import torch
from tests import tiny

from weft.config import ModelConfig, Quantization
from weft.methods.lora import LoraConfig
from weft_training import adapter
from weft_training import base as bases
from weft_training.data import IGNORED, learned_positions


def _labels(ids: torch.Tensor) -> torch.Tensor:
    """Of three rows: one learned from 5, one from 8, one not at all."""
    labels = ids.clone()
    labels[0, :5] = labels[1, :8] = labels[2] = IGNORED
    return labels


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_loss_and_gradients_are_those_of_all_positions(architecture: str, tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base", architecture)
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    base = bases.load(config, max_model_len=None)
    adapted = adapter.begin(LoraConfig(rank=2), base, torch.Generator().manual_seed(1))
    for parameter in adapted.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    labels, inputs = _labels(ids), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    few = adapted(labels=labels, num_items_in_batch=11, **inputs)
    every = adapted(**inputs).logits
    assert few.logits.equal(every[:, 4:11]), "position t predicts the token at t + 1"
    loss = base.model.loss_function(every, labels, base.vocab_size, num_items_in_batch=11)
    torch.testing.assert_close(few.loss, loss, rtol=1e-6, atol=0)
    parameters = list(adapted.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(few.loss, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_positions_before_a_learned_token_are_kept() -> None:
    labels = _labels(torch.ones(3, 12, dtype=torch.int64))
    assert learned_positions(labels).tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert learned_positions(torch.full((2, 4), IGNORED)).tolist() == []
