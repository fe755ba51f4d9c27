"""The names and the order of rows in a GGUF file, against what each side's rotation means."""

import numpy as np
import pytest
from benchmarks.backends import gguf_layout

_HEADS, _DIM, _IN = 3, 8, 5
_COS, _SIN = np.cos(np.arange(_DIM // 2) + 0.5), np.sin(np.arange(_DIM // 2) + 0.5)  # an angle for each pair


def _halves_turned(x: np.ndarray) -> np.ndarray:
    """Hugging Face's rotation of one head: j turns with j + D/2."""
    first, second = x[: _DIM // 2], x[_DIM // 2 :]
    return np.concatenate([first * _COS - second * _SIN, second * _COS + first * _SIN])


def _neighbours_turned(x: np.ndarray) -> np.ndarray:
    """llama.cpp's: 2j turns with 2j + 1."""
    turned = np.empty_like(x)
    turned[0::2] = x[0::2] * _COS - x[1::2] * _SIN
    turned[1::2] = x[1::2] * _COS + x[0::2] * _SIN
    return turned


def test_scores_stay_what_they_were() -> None:
    dice = np.random.default_rng(0)
    query, key = dice.normal(size=(2, _HEADS * _DIM, _IN))
    x = dice.normal(size=_IN)

    def scores(query: np.ndarray, key: np.ndarray, turned) -> list[float]:
        pairs = zip((query @ x).reshape(_HEADS, _DIM), (key @ x).reshape(_HEADS, _DIM), strict=True)
        return [float(turned(q) @ k) for q, k in pairs]  # the key stands at position 0

    wanted = scores(query, key, _halves_turned)
    stored = [gguf_layout.interleaved(rows, _HEADS) for rows in (query, key)]
    assert scores(*stored, _neighbours_turned) == pytest.approx(wanted)
    assert scores(query, key, _neighbours_turned) != pytest.approx(wanted), "rows that were not reordered"


def test_the_factor_b_of_a_lora_is_ordered_like_the_weight() -> None:
    dice = np.random.default_rng(1)
    a, b = dice.normal(size=(2, _IN)), dice.normal(size=(_HEADS * _DIM, 2))
    np.testing.assert_allclose(
        gguf_layout.interleaved(b, _HEADS) @ a, gguf_layout.interleaved(b @ a, _HEADS), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("model.embed_tokens", "token_embd.weight"),
        ("model.norm", "output_norm.weight"),
        ("lm_head", "output.weight"),
        ("model.layers.0.input_layernorm", "blk.0.attn_norm.weight"),
        ("model.layers.11.self_attn.q_proj", "blk.11.attn_q.weight"),
        ("model.layers.2.self_attn.o_proj", "blk.2.attn_output.weight"),
        ("model.layers.2.post_attention_layernorm", "blk.2.ffn_norm.weight"),
        ("model.layers.2.mlp.down_proj", "blk.2.ffn_down.weight"),
    ],
)
def test_names(module: str, name: str) -> None:
    assert gguf_layout.tensor_name(module) == name


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_norm", "model.layers.x.mlp.up_proj", "visual.proj"])
def test_another_module_is_refused(module: str) -> None:
    with pytest.raises(ValueError, match="no module of a Llama"):
        gguf_layout.tensor_name(module)


def test_keys_of_a_lora() -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert gguf_layout.lora_module(key) == ("model.layers.0.mlp.up_proj", "b")
    with pytest.raises(ValueError, match="no factor of a LoRA"):
        gguf_layout.lora_module("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector")


def test_only_queries_and_keys_are_rotated() -> None:
    heads = {
        module: gguf_layout.rotated_heads(f"model.layers.0.self_attn.{module}", num_heads=12, num_kv_heads=4)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert heads == {"q_proj": 12, "k_proj": 4, "v_proj": None, "o_proj": None}
