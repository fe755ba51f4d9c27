"""Weft's adapters in stock PEFT and in serving: the same tensors, logits, gradients and greedy answers."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tests import tiny
from tests.bases import Bases
from tests.serving import Row as Served
from tests.serving import Step
from torch import Tensor
from transformers import AutoModelForCausalLM

from weft.config import ModelConfig, Quantization
from weft.kernels.selection import select
from weft.methods.bitfit.math import BitfitConfig
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.checkpoint import directory
from weft.methods.dora.math import DoraConfig
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.prompt.math import PromptConfig, PromptInit
from weft.methods.protocol import Adapter, BaseShape, MethodConfig
from weft.methods.ptuning.math import Encoder, PtuningConfig
from weft.methods.vera.math import VeraConfig
from weft_training import adapter, base
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import Example, Row, collate, encode
from weft_training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=4, alpha=8.0),
    "lora, two ranks": LoraConfig(rank=4, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 2}),
    "lora, path patterns": LoraConfig(
        rank=4, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 99}
    ),
    "lora, one layer": LoraConfig(rank=4, layers=(1,), exclude=("mlp.gate_proj",)),
    "rslora": LoraConfig(rank=4, alpha=2.0, use_rslora=True, target_modules=("k_proj", "up_proj")),
    "lora, bias": LoraConfig(rank=2, alpha=3.0, lora_bias=True),
    "alora": LoraConfig(rank=4, alpha=8.0, invocation_tokens=tuple(b" = ")),
    "dora": DoraConfig(rank=4, alpha=8.0),
    "dora, two ranks, rslora": DoraConfig(
        rank=4, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 2}, use_rslora=True
    ),
    "lora, head": LoraConfig(rank=4, target_modules=("v_proj", "lm_head")),
    "dora, head": DoraConfig(rank=2, target_modules=("lm_head",)),
    "vera": VeraConfig(rank=6),
    "vera, modules": VeraConfig(rank=5, target_modules=("k_proj", "down_proj"), layers=(1,), d_initial=0.3),
    "bitfit": BitfitConfig(),
    "ia3": Ia3Config(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",)),
    "prefix": PrefixConfig(num_virtual_tokens=5),
    "prefix, MLP": PrefixConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24),
    "prefix, two MLPs": PrefixConfig(num_virtual_tokens=5, prefix_projection=True, separate=True, rows_size=6),
    "prompt": PromptConfig(num_virtual_tokens=3, prompt_init=PromptInit.RANDOM),
    "prompt, text": PromptConfig(num_virtual_tokens=17, prompt_init=PromptInit.TEXT, init_text="Reverse: "),
    "ptuning": PtuningConfig(num_virtual_tokens=7, encoder_hidden_size=48),
    "ptuning, LSTM": PtuningConfig(num_virtual_tokens=4, encoder=Encoder.LSTM, encoder_hidden_size=24),
}
EXAMPLES = [Example(f"{text} = ", text[::-1]) for text in ("abc", "dragon", "w", "loom", "weave", "threads", "hi")]


@pytest.fixture(scope="module")
def exact(tiny_base: Path, one_thread: None) -> ModelConfig:
    """The tiny base as it is stored: float32, not quantized."""
    return ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu")


@pytest.fixture(scope="module", params=list(CONFIGS))
def method_config(request: pytest.FixtureRequest) -> MethodConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def trained(method_config: MethodConfig, exact: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter that a few rough steps have moved far from its initial values."""
    output = tmp_path_factory.mktemp("trained") / "adapter"
    config = TrainConfig(
        model=exact, adapter=method_config, output=output, num_steps=6, batch_size=4, learning_rate=0.05
    )
    return train(config, examples=EXAMPLES).output


def peft_of(path: Path, base_path: Path) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, path).eval()


def test_logits_are_pefts(trained: Path, exact: ModelConfig) -> None:
    ours = base.load(exact)
    model = AdaptedModel(ours, adapter.read(trained, ours.shape))
    batch = collate(encode(EXAMPLES, ours.tokenizer, max_length=64), pad_token_id=0)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits[is_token]
        expected = peft_of(trained, exact.path)(**batch).logits[:, -is_token.shape[1] :][is_token]
        alone = ours.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[is_token]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (alone - expected).abs().max() > 0.1  # the control: without the adapter the comparison would fail


RANDOM: dict[str, Callable[[BaseShape], Adapter]] = {
    "lora": lambda shape: tiny.random_lora(shape, rank=3, seed=1),
    "lora, bias": lambda shape: tiny.random_lora(shape, rank=2, seed=4, lora_bias=True),
    "dora": lambda shape: tiny.random_dora(shape, rank=3, seed=5),
    "vera": lambda shape: tiny.random_vera(shape, rank=3, seed=13),
    "head": lambda shape: tiny.random_lora(shape, rank=2, seed=7, targets=("lm_head",)),
    "bitfit": lambda shape: tiny.random_bitfit(shape, seed=6),
    "ia3": lambda shape: tiny.random_ia3(shape, seed=2),
    "prefix": lambda shape: tiny.random_prefix(shape, length=7, seed=3),
    "prompt": lambda shape: tiny.random_prompt(shape, length=5, seed=4),
    "ptuning": lambda shape: tiny.random_ptuning(shape, length=19, seed=5),
    "bottleneck": lambda shape: tiny.random_bottleneck(shape, BottleneckConfig(size=4), seed=9),
    "bottleneck, parallel": lambda shape: tiny.random_bottleneck(shape, BottleneckConfig(form=Form.PARALLEL), seed=10),
    "bottleneck, sum": lambda shape: tiny.random_bottleneck(shape, BottleneckConfig(form=Form.SUM, size=5), seed=12),
    "bottleneck, residual": lambda shape: tiny.random_bottleneck(shape, BottleneckConfig(form=Form.RESIDUAL), seed=11),
}


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_serving_computes_what_training_does(architecture: str, bases: Bases) -> None:
    """Paged attention, slots and kernels beside the module that is trained, on rows of unequal length."""
    config = ModelConfig(path=bases.path(architecture), quantization=Quantization.NONE, device="cpu", dtype="float32")
    ours, served = base.load(config), bases(architecture)
    step = Step(served, select(served.device, served.dtype))
    rows = [Row(list(range(40, 70)), 0), Row([7, 9, 100], 0), Row([5], 0)]
    batch = collate(rows, pad_token_id=0)
    del batch["labels"]
    for make in RANDOM.values():
        made = make(ours.shape)
        with torch.no_grad():
            padded = AdaptedModel(ours, made)(**batch).logits
        found = torch.cat([logits[: len(row.input_ids)] for logits, row in zip(padded, rows, strict=True)])
        torch.testing.assert_close(
            found, torch.cat(step.logits([Served(row.input_ids, made) for row in rows])), atol=1e-4, rtol=0
        )
        alone = torch.cat(step.logits([Served(row.input_ids) for row in rows]))
        assert (found - alone).abs().max() > 0.1  # the control: the comparison would see a missing adapter


@pytest.mark.parametrize("double_quant", [False, True])
def test_serving_computes_what_training_does_on_nf4(double_quant: bool, bases: Bases, tmp_path: Path) -> None:
    """Both hold the same quantized weights. They differ by the rounding of bfloat16, more where the processor lets
    bitsandbytes repack the weights that are served; the base alone shows how much that is."""
    ours = base.load(ModelConfig(path=bases.path(), device="cpu", double_quant=double_quant))
    served = bases("llama", Quantization.NF4, double_quant=double_quant)
    step = Step(served, select(served.device, served.dtype))
    rows = [Row(list(range(40, 70)), 0), Row([7, 9, 100], 0), Row([5], 0)]
    batch = collate(rows, pad_token_id=0)
    del batch["labels"]

    def difference(made: Adapter) -> tuple[float, float]:
        with torch.no_grad():
            padded = AdaptedModel(ours, made)(**batch).logits.float()
        found = torch.cat([logits[: len(row.input_ids)] for logits, row in zip(padded, rows, strict=True)])
        directory.write(made, tmp_path / "adapter", ours.shape)
        read = adapter.read(tmp_path / "adapter", served.shape)  # DoRA is folded with the served base's weight
        there = torch.cat(step.logits([Served(row.input_ids, read) for row in rows])).float()
        alone = torch.cat(step.logits([Served(row.input_ids) for row in rows])).float()
        return ((found - there).abs().mean() / there.std()).item(), ((found - alone).abs().mean() / there.std()).item()

    small = tiny.random_bitfit(ours.shape, seed=8)
    small = adapter.map_tensors(small, lambda t: t * 1e-6)
    rounding, _ = difference(small)
    for name, make in RANDOM.items():
        differs, would_differ = difference(make(ours.shape))
        assert differs < max(3 * rounding, 0.03), name
        assert would_differ > 5 * differs, name  # the control: a missing adapter


def test_gradients_are_pefts(trained: Path, exact: ModelConfig) -> None:
    ours = base.load(exact)
    model = AdaptedModel(ours, adapter.read(trained, ours.shape))
    peft_model = peft_of(trained, exact.path)
    theirs = [p for name, p in peft_model.named_parameters() if "default" in name]  # PEFT's name for the adapter
    for parameter in theirs:
        parameter.requires_grad_()
    batch = collate(encode(EXAMPLES, ours.tokenizer, max_length=64), pad_token_id=0)
    loss = model(**batch).loss
    loss.backward()
    expected = peft_model(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    found = _sorted_by_size(p.grad for p in model.parameters())
    wanted = _sorted_by_size(p.grad for p in theirs)
    assert len(found) == len(wanted) > 0
    for ours_grad, peft_grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_grad, peft_grad, atol=1e-5, rtol=1e-3)


def _sorted_by_size(grads: Iterable[Tensor | None]) -> list[Tensor]:
    """Gradients flattened, in an order that both sides share without sharing names."""
    flat = [grad.reshape(-1) for grad in grads if grad is not None]
    return sorted(flat, key=lambda grad: (grad.numel(), grad.norm().item()))


def test_greedy_answers_are_pefts(trained: Path, exact: ModelConfig) -> None:
    """Prompts of different lengths, padded on the left, with a cache; PEFT's one by one.

    In a padded batch PEFT counts the padding between a soft prompt and its tokens as positions.
    """
    ours = base.load(exact)
    ours.tokenizer.padding_side = "left"
    prompts = ours.tokenizer([example.prompt for example in EXAMPLES], return_tensors="pt", padding=True)
    inputs = {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
    model = AdaptedModel(ours, adapter.read(trained, ours.shape))
    found = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    theirs = peft_of(trained, exact.path)
    for row, is_token, prompt in zip(found, inputs["attention_mask"], inputs["input_ids"], strict=True):
        alone = prompt[is_token.bool()][None]
        (wanted,) = theirs.generate(
            input_ids=alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=12
        ).tolist()
        answer = row.tolist()[len(prompt) - alone.shape[1] :]
        assert answer[: len(wanted)] == wanted
        assert not any(answer[len(wanted) :]), "padding after the end of the text"


def test_tensors_survive_disk_and_peft_bit_for_bit(
    method_config: MethodConfig, exact: ModelConfig, tmp_path: Path
) -> None:
    ours = base.load(exact)
    generator = torch.Generator().manual_seed(1)
    made = adapter.initial(method_config, ours.shape, generator)
    made = adapter.map_tensors(made, lambda t: torch.randn(t.shape, generator=generator))
    directory.write(made, tmp_path, ours.shape)
    back = adapter.read(tmp_path, ours.shape)
    assert back.sites.keys() == made.sites.keys()
    assert all(torch.equal(a, b) for a, b in zip(made.tensors(), back.tensors(), strict=True))
    in_peft = get_peft_model_state_dict(peft_of(tmp_path, exact.path), save_embedding_layers=False)
    on_disk = load_file(tmp_path / directory.WEIGHTS_FILE)
    assert in_peft.keys() == on_disk.keys()
    assert all(torch.equal(in_peft[name], on_disk[name]) for name in on_disk)
