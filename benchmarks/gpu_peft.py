"""PEFT's mixed batch on the same weights and device: `generate(adapter_names=…)`, which a user would choose instead."""

import time
import warnings
from typing import Any

import torch

from benchmarks.gpu_base import Shape, make_model
from weft.config import Quantization


def tokens_per_s(
    shape: Shape,
    device: torch.device,
    quantization: Quantization,
    *,
    num_rows: int,
    rank: int,
    prompt: int,
    num_steps: int,
) -> float:
    """Measure decode steps alone, each row with its own LoRA: a long answer's time less a short one's."""
    from peft import LoraConfig, get_peft_model

    model: Any = make_model(shape, device, quantization, attention="sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, adapter_name="0")
        for index in range(1, num_rows):
            model.add_adapter(str(index), config)
    model.eval()
    generator = torch.Generator(device).manual_seed(2)
    ids = torch.randint(1, shape.vocab_size, (num_rows, prompt), generator=generator, device=device)
    names = [str(index) for index in range(num_rows)]

    def seconds(num_new: int) -> float:
        begin = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        ).tolist()
        return time.perf_counter() - begin

    with torch.inference_mode():
        seconds(2)
        return num_steps * num_rows / (seconds(2 + num_steps) - seconds(2))
