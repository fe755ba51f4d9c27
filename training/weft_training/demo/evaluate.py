"""Exact match on the demo's tasks: the greedy answer equals the expected one, character by character."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft_training.demo.tasks import Example, prompt


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 20
) -> list[str]:
    """The greedy continuation of each prompt up to the end-of-text token, in one padded batch."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    generated = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)  # [B, P + N]
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, tagged: bool = False
) -> float:
    """Share of the examples answered exactly, 0 to 1."""
    found = answers(model, tokenizer, [prompt(example, tagged=tagged) for example in examples])
    right = sum(answer == example.output for answer, example in zip(found, examples, strict=True))
    return right / len(examples)
