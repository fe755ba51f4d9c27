"""GGUF layout of a Llama: the names of its tensors, and the order of the rows that are rotated.

llama.cpp rotates the neighbours (2j, 2j + 1) of a head by one angle, Hugging Face the halves (j, j + D/2). So the rows
of the query and key projections are reordered once, when the file is written. Attention scores do not change.
"""

import re

import numpy as np

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def tensor_name(module: str) -> str:
    """Return the GGUF name of `module`'s weight. Raises ValueError for a module that a Llama lacks."""
    inside = _LAYER.fullmatch(module)
    if inside and inside[2] in _INSIDE:
        return f"blk.{inside[1]}.{_INSIDE[inside[2]]}.weight"
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    raise ValueError(f"{module}: no module of a Llama")


def lora_module(key: str) -> tuple[str, str]:
    """Return the module that a tensor of a PEFT file adapts, and its factor, "a" or "b". Raises ValueError if none."""
    found = _LORA.fullmatch(key)
    if not found:
        raise ValueError(f"{key}: no factor of a LoRA")
    return found[1], found[2].lower()


def rotated_heads(module: str, *, num_heads: int, num_kv_heads: int) -> int | None:
    """Return the number of heads in which `module`'s outputs are rotated, or None if they are not."""
    if module.endswith(".q_proj"):
        return num_heads
    return num_kv_heads if module.endswith(".k_proj") else None


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return `rows` [H * D, I] with the two halves of each head's D rows interleaved."""
    num_rows = rows.shape[0]
    halves = rows.reshape(num_heads, 2, num_rows // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
