"""Pre-train the demo base: `python -m weft_training.demo.pretrain --output models/weft-demo`.

A Llama-type causal language model of about two million parameters, trained from scratch on `corpus.rows` and stored as
an ordinary Hugging Face checkpoint in bfloat16. The same recipe, thread count and library versions give the same
weights.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from weft_training.data import IGNORED
from weft_training.demo import card
from weft_training.demo.corpus import rows
from weft_training.demo.tokenizer import EOS_ID, PAD, PAD_ID, VOCAB_SIZE, build_tokenizer
from weft_training.progress import ProgressBar, Step

OUTPUT = Path("models/weft-demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings that decide the weights.

    num_batch_tokens: characters of one step, padding included; each step has rows of one length.
    row_lengths, row_length_shares: long rows teach positions, short rows the prompts of real requests.
    """

    seed: int = 0
    num_steps: int = 1600
    num_batch_tokens: int = 3072
    row_lengths: tuple[int, ...] = (64, 160, 448)
    row_length_shares: tuple[float, ...] = (0.5, 0.35, 0.15)
    learning_rate: float = 2e-3
    num_warmup_steps: int = 100
    weight_decay: float = 0.01
    gradient_norm_max: float = 1.0


def demo_config() -> LlamaConfig:
    """Return the model's shape. NF4 on a CPU needs linear layers with inputs in multiples of 64 and outputs of 32."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels of a step, both [B, L]; rows are padded on the right, so causal attention needs no mask."""
    rng = random.Random(recipe.seed)  # noqa: S311  reproducible, not secret
    sources = {length: rows(rng, length=length) for length in recipe.row_lengths}
    while True:
        (length,) = rng.choices(recipe.row_lengths, recipe.row_length_shares)
        batch = list(itertools.islice(sources[length], recipe.num_batch_tokens // length))
        width = max(len(row.text) for row in batch)
        ids, targets = (
            torch.tensor(tokenizer([text.ljust(width, PAD) for text in texts])["input_ids"])
            for texts in zip(*batch, strict=True)
        )
        yield ids, targets.masked_fill(targets == PAD_ID, IGNORED)


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine to zero."""
    if step < recipe.num_warmup_steps:
        return (step + 1) / recipe.num_warmup_steps
    progress = (step - recipe.num_warmup_steps) / (recipe.num_steps - recipe.num_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embeddings and norms.

    Muon reaches in 400 steps the loss that AdamW alone reaches in 700; without it, sums and field extraction would not
    emerge in this time.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, console: Console) -> LlamaForCausalLM:
    """Train in mixed precision: float32 weights, bfloat16 products."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(demo_config())
    optimizers = optimizers_for(model, recipe)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe)) for optimizer in optimizers]
    mean_loss = math.log(VOCAB_SIZE)  # of about the last twenty steps
    with ProgressBar(console, "pre-training") as bar:
        for step, (ids, labels) in enumerate(itertools.islice(batches(recipe, tokenizer), recipe.num_steps), start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm_max)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            mean_loss += 0.05 * (loss.item() - mean_loss)
            bar(Step(step, recipe.num_steps, mean_loss))
            if step % 100 == 0 and not console.is_terminal:  # a log file shows no bar
                console.print(f"step {step} of {recipe.num_steps}, loss {mean_loss:.4f}")
    return model.eval()


def main(
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")] = OUTPUT,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the rows.")] = Recipe.seed,
    num_steps: Annotated[int, typer.Option(min=200, help="Training steps; fewer for a trial.")] = Recipe.num_steps,
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads; the weights depend on them.")] = 2,
) -> None:
    """Pre-train the demo base, measure it, write its checkpoint and model card."""
    torch.set_num_threads(num_threads)
    console = Console()
    recipe = Recipe(seed=seed, num_steps=num_steps)
    tokenizer = build_tokenizer(model_max_length=demo_config().max_position_embeddings)
    began = time.monotonic()
    model = pretrain(recipe, tokenizer, console=console)
    train_s = time.monotonic() - began
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    scores = card.measure(output)
    console.print(card.table(scores))
    facts = {"num_parameters": model.num_parameters(), "num_steps": num_steps, "num_threads": num_threads, "seed": seed}
    (output / "README.md").write_text(card.render(scores, **facts, train_s=train_s), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
