"""Packed rows give the loss and the gradients of the same rows unpacked; a base that mixes them is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from tests.bases import Bases
from torch import nn

from weft.config import ModelConfig, Quantization
from weft_training import adapter, base, data, packing
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import Example, encode
from weft_training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example(f"{text} = ", text[::-1]) for text in ("abc", "dragon", "w", "loom", "weave")]


def test_groups_hold_every_row_once_and_fit() -> None:
    rows = [data.Row([index] * length, 0) for index, length in enumerate((7, 3, 5, 2, 2, 9, 1))]
    groups = packing.pack(rows, 10)
    assert sorted(row.input_ids for group in groups for row in group) == sorted(row.input_ids for row in rows)
    assert all(sum(len(row.input_ids) for row in group) <= 10 for group in groups)
    assert len(groups) == 3  # 29 tokens: fewer is impossible
    assert packing.pack(rows, 10) == groups


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_loss_and_gradients_are_those_of_the_rows_alone(architecture: str, bases: Bases) -> None:
    config = ModelConfig(path=bases.path(architecture), quantization=Quantization.NONE, device="cpu", dtype="float32")
    ours = base.load(config)
    packing.require_apart(ours.model)
    ours.tokenizer.eos_token = "\x03"
    model = AdaptedModel(ours, tiny.random_lora(ours.shape, rank=3, seed=1))
    rows = encode(EXAMPLES, ours.tokenizer, max_length=64)
    groups = packing.pack(rows, 40)
    assert len(groups) < len(rows)
    losses, gradients = [], []
    for batch in (data.collate(rows, pad_token_id=0), packing.collate(groups, pad_token_id=0)):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)

    batch = packing.collate(groups, pad_token_id=0)  # the control: one long example would be seen
    batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    assert (model(**batch).loss - losses[0]).abs() > 1e-3


def test_a_base_that_mixes_rows_is_refused() -> None:
    class Mixes(nn.Module):
        device = torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=input_ids.float().cumsum(1)[..., None])

    class Apart(Mixes):
        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=input_ids.float()[..., None])

    packing.require_apart(Apart())
    with pytest.raises(ValueError, match="packing: the attention of Mixes lets examples"):
        packing.require_apart(Mixes())


def test_packing_trains_and_virtual_positions_refuse_it(tiny_base: Path, tmp_path: Path) -> None:
    knobs = {"model": ModelConfig(path=tiny_base, device="cpu"), "num_steps": 2, "batch_size": 1, "packing": True}
    result = train(TrainConfig(adapter=USUAL["lora"], output=tmp_path / "a", **knobs), examples=EXAMPLES)
    assert len(result.losses) == 2
    with pytest.raises(ValueError, match="packing must be false for prefix"):
        train(TrainConfig(adapter=USUAL["prefix"], output=tmp_path / "b", **knobs), examples=EXAMPLES)
    assert adapter.read(tmp_path / "a", base.load(knobs["model"]).shape).num_parameters > 0
