"""Dropout: at PEFT's places, only in training, and the same for the same seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from weft.config import ModelConfig, Quantization
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.checkpoint import directory
from weft.methods.dora.math import DoraConfig
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.methods.protocol import MethodConfig
from weft.methods.vera.math import VeraConfig
from weft_training import adapter, base, data
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import Example, collate
from weft_training.recipe import load, options
from weft_training.run import TrainResult
from weft_training.trainer import prepare, train

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example(f"{word} = ", word[::-1]) for word in ("abc", "dragon", "loom", "weave", "threads", "hi", "warp")]
CONFIGS: dict[str, Callable[[float], MethodConfig]] = {
    "lora": lambda dropout: LoraConfig(rank=4, dropout=dropout),
    "dora": lambda dropout: DoraConfig(rank=4, dropout=dropout),
    "vera": lambda dropout: VeraConfig(rank=4, dropout=dropout),
    **{f"bottleneck, {form}": lambda dropout, form=form: BottleneckConfig(form=form, dropout=dropout) for form in Form},
}


def exact(tiny_base: Path) -> ModelConfig:
    return ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu", dtype="float32")


def moved(config: MethodConfig, config_of: ModelConfig) -> AdaptedModel:
    """An adapter far from its start, where dropout has nothing to act on."""
    on = base.load(config_of)
    generator = torch.Generator().manual_seed(1)
    made = adapter.initial(config, on.shape, generator)
    made = adapter.map_tensors(made, lambda t: t + 0.3 * torch.randn(t.shape, generator=generator))
    return AdaptedModel(on, made)


def batch_of(model: AdaptedModel) -> dict[str, Tensor]:
    return dict(collate(data.encode(EXAMPLES, model.base.tokenizer, max_length=64), pad_token_id=0))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_it_acts_in_training_mode_alone(kind: str, tiny_base: Path) -> None:
    dropping, plain = (moved(CONFIGS[kind](share), exact(tiny_base)) for share in (0.5, 0.0))
    batch = batch_of(plain)
    wanted = plain(**batch).logits
    assert torch.equal(plain.eval()(**batch).logits, wanted)
    assert torch.equal(dropping.eval()(**batch).logits, wanted)
    dropping.train()
    torch.manual_seed(0)
    first = dropping(**batch).logits
    assert (first - wanted).abs().max() > 0.01
    assert not torch.equal(dropping(**batch).logits, first)
    torch.manual_seed(0)
    assert torch.equal(dropping(**batch).logits, first)
    ids = batch["input_ids"][:1, :4]
    answers = [one.generate(ids, torch.ones_like(ids), max_new_tokens=6, do_sample=False) for one in (dropping, plain)]
    assert torch.equal(*answers)
    assert dropping.training


def test_a_loras_is_pefts(tiny_base: Path, tmp_path: Path) -> None:
    """The same seed drops the same numbers: logits and gradients are equal, and PEFT finds the share in the config."""
    model = moved(LoraConfig(rank=4, dropout=0.25), exact(tiny_base))
    directory.write(model.adapter, tmp_path, model.base.shape)
    assert json.loads((tmp_path / directory.CONFIG_FILE).read_text())["lora_dropout"] == 0.25
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="eager")
    theirs: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True).train()
    batch = batch_of(model)
    losses = []
    for one in (model, theirs):
        torch.manual_seed(0)
        losses.append(one(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, params in model.adapter.sites.items():
        for tensor, letter in ((params.a, "A"), (params.b, "B")):
            wanted = grads[f"base_model.model.{name}.lora_{letter}.default.weight"]
            torch.testing.assert_close(tensor.grad, wanted, atol=1e-5, rtol=1e-3)


def run(tiny_base: Path, output: Path, config: MethodConfig, **changes: Any) -> TrainResult:
    knobs = {"num_steps": 4, "batch_size": 4, "learning_rate": 1e-2, **changes}
    return train(TrainConfig(model=exact(tiny_base), adapter=config, output=output, **knobs), examples=EXAMPLES)


def test_a_run_repeats_and_evaluates_whole(tiny_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(rank=4, dropout=0.5)
    knobs = {"evaluation_share": 0.3, "evaluate_every": 2}
    one, same = (run(tiny_base, tmp_path / name, config, **knobs) for name in ("one", "same"))
    assert one.losses == same.losses
    files = [(made.output / directory.WEIGHTS_FILE).read_bytes() for made in (one, same)]
    assert files[0] == files[1]
    assert run(tiny_base, tmp_path / "other", config, seed=1).losses != one.losses
    assert run(tiny_base, tmp_path / "plain", LoraConfig(rank=4), **knobs).losses[1:] != one.losses[1:]

    # The evaluated adapter is the one that a server would use.
    whole = TrainConfig(model=exact(tiny_base), adapter=config, output=tmp_path / "x", **knobs)
    rows = prepare(whole, examples=EXAMPLES).evaluation
    on = base.load(exact(tiny_base))
    served = AdaptedModel(on, adapter.read(one.output, on.shape)).eval()
    loss = served(**collate(rows, pad_token_id=0)).loss.item()
    assert one.evaluations[one.best_step] == pytest.approx(loss, abs=1e-5)


def test_layers_that_are_computed_again_drop_the_same(tiny_base: Path, tmp_path: Path) -> None:
    kept, again = (
        run(tiny_base, tmp_path / str(flag), LoraConfig(rank=4, dropout=0.5), gradient_checkpointing=flag)
        for flag in (False, True)
    )
    assert again.losses == pytest.approx(kept.losses, rel=1e-5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_is_at_least_0_and_below_1(share: float) -> None:
    for config in CONFIGS.values():
        with pytest.raises(ValueError, match="dropout: must be at least 0 and below 1, given"):
            config(share)


def test_only_methods_with_an_update_of_their_own_have_it(tiny_base: Path, tmp_path: Path) -> None:
    line = f"--base={tiny_base} --data={tmp_path} --output={tmp_path / 'x'} --dropout=0.1"
    found = load(*options([*line.split(), "--method=lora"])).train.adapter
    assert isinstance(found, LoraConfig)
    assert found.dropout == 0.1
    with pytest.raises(ValueError, match="dropout: the method ia3 has none"):
        load(*options([*line.split(), "--method=ia3"]))
    assert not hasattr(Ia3Config(), "dropout")
