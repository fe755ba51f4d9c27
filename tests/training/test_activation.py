"""Training an activated LoRA: it acts, and learns, from its invocation on; PEFT's side is in test_parity.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.bases import load
from tests.serving import Row as Served
from tests.serving import Step
from torch import Tensor

from weft.config import ModelConfig, Quantization
from weft.engine.token_ranges import OPEN, TokenRange
from weft.kernels.selection import select
from weft.methods.dora.math import DoraConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.protocol import Adapter, BaseShape
from weft.model import loader
from weft_training import activation, base
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import IGNORED, Conversation, Example, InvalidData, Row, collate
from weft_training.joint import train_many
from weft_training.recompute import recomputing
from weft_training.trainer import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

_INVOCATION = (7, 9)
_BEGINS = {3: [20, 21, 22, 7, 9, 40, 41], 0: [7, 9, 30], 5: [7, 9, 50, 51, 52, 7, 9, 53, 54, 55], None: [60, 61, 9, 7]}


@pytest.fixture(scope="module")
def exact(tiny_base: Path) -> ModelConfig:
    return ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu")


@pytest.fixture(scope="module")
def ours(exact: ModelConfig) -> loader.Base:
    return base.load(exact)


def _activated(shape: BaseShape) -> Adapter:
    made = tiny.random_lora(shape, rank=3, seed=1)
    return replace(made, config=replace(made.config, invocation_tokens=_INVOCATION))


def _batch() -> dict[str, Tensor]:
    batch = collate([Row(tokens, len(tokens)) for tokens in _BEGINS.values()], pad_token_id=0)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def test_tokens_before_the_invocation_are_the_base_s(ours: loader.Base) -> None:
    adapter = _activated(ours.shape)
    with torch.no_grad():
        found = AdaptedModel(ours, adapter)(**_batch()).logits
        plain = ours.model(**_batch()).logits
        always = AdaptedModel(ours, replace(adapter, config=LoraConfig()))(**_batch()).logits
    for row, (begin, tokens) in enumerate(_BEGINS.items()):
        before = len(tokens) if begin is None else begin
        torch.testing.assert_close(found[row, :before], plain[row, :before], atol=1e-5, rtol=0)
        for index in range(before, len(tokens)):
            assert (found[row, index] - plain[row, index]).abs().max() > 0.1, (begin, index)
        if begin:  # an adapter that acts late answers differently from one that always acts
            assert (found[row, begin] - always[row, begin]).abs().max() > 0.01


def test_serving_computes_what_training_does(exact: ModelConfig, ours: loader.Base) -> None:
    served = load(exact.path)
    adapter = _activated(ours.shape)
    rows = [
        Served(tokens) if begin is None else Served(tokens, adapters=[(adapter, 1.0)], ranges=[_from(begin)])
        for begin, tokens in _BEGINS.items()
    ]
    with torch.no_grad():
        padded = AdaptedModel(ours, adapter)(**_batch()).logits
    there = Step(served, select(served.device, served.dtype)).logits(rows)
    for mine, logits, tokens in zip(padded, there, _BEGINS.values(), strict=True):
        torch.testing.assert_close(mine[: len(tokens)], logits, atol=1e-4, rtol=0)


def _from(begin: int) -> tuple[TokenRange, ...]:
    return (TokenRange(begin, OPEN),) if begin else ()


def test_what_is_learned_or_hidden_is_no_invocation() -> None:
    ids = torch.tensor([[7, 9, 1, 7, 9, 2]])
    labels = torch.tensor([[IGNORED] * 4 + [9, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    assert activation.counts(_INVOCATION, ids).tolist() == [3]
    assert activation.counts(_INVOCATION, ids, labels=labels).tolist() == [6], "the second one is half an answer"
    assert activation.counts(_INVOCATION, ids, mask, labels).tolist() == [0], "and the first one is half padding"


def test_recomputed_layers_have_the_same_gradients(ours: loader.Base) -> None:
    """The backward pass of a batch comes after another batch's forward pass: the gates are its own."""
    first = {**_batch(), "labels": _batch()["input_ids"].clone()}
    first["labels"][:, :6] = IGNORED

    def gradients(recomputes: bool) -> list[Tensor]:
        model = AdaptedModel(ours, _activated(ours.shape))
        if recomputes:
            with recomputing(model):
                loss = model(**first).loss
                with torch.no_grad():
                    model(input_ids=torch.full((1, 5), 8))
                loss.backward()
        else:
            model(**first).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    wanted = gradients(False)
    assert max(gradient.abs().max() for gradient in wanted) > 0
    for found, one in zip(gradients(True), wanted, strict=True):
        torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-4)


def _config(exact: ModelConfig, tmp_path: Path, **knobs: object) -> TrainConfig:
    lora = LoraConfig(rank=2, invocation_tokens=tuple(b" = "))
    return TrainConfig(model=exact, adapter=lora, output=tmp_path / "a", num_steps=1, batch_size=1, **knobs)  # type: ignore[arg-type]


def test_rows_without_an_invocation_are_refused(exact: ModelConfig, tmp_path: Path) -> None:
    good = Example("abc = ", "cba")
    prepare(_config(exact, tmp_path), examples=[good])
    for bad in (Example("abc: ", "cba"), Example("abc: ", "cba = "), Example("", "abc = cba")):
        with pytest.raises(InvalidData, match=r"examples\[1\]: its prompt must hold the adapter's invocation_tokens"):
            prepare(_config(exact, tmp_path), examples=[good, bad])


def test_what_shares_rows_or_passes_is_refused(exact: ModelConfig, tmp_path: Path) -> None:
    examples: list[Example | Conversation] = [Example("abc = ", "cba")]
    with pytest.raises(ValueError, match="packing must be false"):
        prepare(_config(exact, tmp_path, packing=True), examples=examples)
    with pytest.raises(ValueError, match="invocation_tokens"):
        train_many([_config(exact, tmp_path)], examples=[examples])
    with pytest.raises(ValueError, match="invocation_tokens"):
        DoraConfig(invocation_tokens=_INVOCATION)
