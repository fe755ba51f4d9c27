"""Bases whose KV cache has the shape of popular models; everything else is tiny."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from tests.tiny import VOCAB_SIZE, save_tokenizer


def _sizes(*, layers: int, kv_heads: int, head_dim: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.2-1b": LlamaConfig(**_sizes(layers=16, kv_heads=8, head_dim=64, positions=131072)),
    "llama-3.1-8b": LlamaConfig(**_sizes(layers=32, kv_heads=8, head_dim=128, positions=131072)),
    "qwen3-0.6b": Qwen3Config(**_sizes(layers=28, kv_heads=8, head_dim=128, positions=40960)),
    "gemma-3-1b": Gemma3TextConfig(**_sizes(layers=26, kv_heads=1, head_dim=256, positions=32768), sliding_window=512),
}


def save(directory: Path, name: str) -> Path:
    """Write the checkpoint of one shape."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[name]).save_pretrained(directory)
    save_tokenizer(directory, VOCAB_SIZE)
    return directory
