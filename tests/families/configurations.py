"""Tiny configurations of causal language models, one or more of each family that transformers has and people serve.

All are random, with weights drawn wide enough that logits are spread and no token ends a text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 320
_WINDOW = 16
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# For classes that have as many KV heads as heads, or a head size that follows from the others.
_OWN_HEADS = {name: value for name, value in _COMMON.items() if name not in ("num_key_value_heads", "head_dim")}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 128,
    "rotary_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SLIDING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a family by transformers' name, its particular options, and its configuration."""

    family: str
    variant: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=lambda: _COMMON)

    @property
    def name(self) -> str:
        return f"{self.family} {self.variant}".strip()

    def make(self) -> PreTrainedConfig:
        """Return transformers' configuration."""
        return CONFIG_MAPPING[self.family](**(self.common | self.knobs))


def _plain(*families: str) -> Iterator[Configuration]:
    return (Configuration(family) for family in families)


def _moe(*families: str, **knobs: Any) -> Iterator[Configuration]:
    return (Configuration(family, knobs=_EXPERTS | knobs) for family in families)


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGURATIONS: tuple[Configuration, ...] = (
    *_plain("llama", "mistral", "ministral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text"),
    *_plain("olmo", "olmo2", "olmo3", "cohere", "cohere2", "granite", "glm", "glm4", "starcoder2", "smollm3", "helium"),
    *_plain("arcee", "apertus", "ernie4_5", "exaone4", "hunyuan_v1_dense", "seed_oss", "bitnet"),
    *_plain("nemotron", "stablelm", "diffllama", "doge", "internlm3", "jais2", "mellum", "minicpm3"),
    *_plain("ministral3", "nanochat", "vaultgemma", "youtu", "iquestcoder"),
    *_moe(
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "minimax_m2", "dots1", "ernie4_5_moe", "granitemoe"
    ),
    *_moe("phimoe", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe", "flex_olmo", "granitemoeshared", "afmoe", "jetmoe"),
    *_moe("gpt_oss", "solar_open", "exaone_moe"),
    Configuration("llama", "tied", {"tie_word_embeddings": True}),
    Configuration("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    Configuration("llama", "llama3 rope", {"rope_parameters": _LLAMA3}),
    Configuration(
        "llama", "linear rope", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    Configuration(
        "llama", "dynamic rope", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    ),
    Configuration(
        "llama",
        "yarn",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Configuration("mistral", "sliding", {"sliding_window": _WINDOW}),
    Configuration("qwen2", "sliding", {"sliding_window": _WINDOW, "use_sliding_window": True, "layer_types": _SLIDING}),
    Configuration("phi3", "longrope", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    Configuration(
        "phi3",
        "partial rope",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    Configuration("gemma2", "sliding", {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    Configuration("gemma3_text", "sliding", {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    Configuration("cohere2", "sliding", {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    Configuration("olmo3", "sliding", {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    Configuration("gemma4_text", knobs={"global_head_dim": 32, "vocab_size_per_layer_input": VOCAB_SIZE}),
    Configuration("gemma4_text", "one head size", {"global_head_dim": 16, "vocab_size_per_layer_input": VOCAB_SIZE}),
    Configuration("gpt2", common=_GPT),
    Configuration("gpt_bigcode", common=_GPT),
    Configuration("gptj", common=_GPT),
    Configuration("gpt_neo", knobs={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Configuration("opt", knobs={"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1}, common=_OWN_HEADS),
    Configuration(
        "xglm", knobs={"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "pad_token_id": 1}
    ),
    Configuration("biogpt", knobs={"pad_token_id": 1}, common=_OWN_HEADS),
    Configuration("bloom", knobs={"n_layer": 2, "n_head": 4}),
    Configuration("codegen", common=_GPT),
    Configuration("falcon", knobs={"new_decoder_architecture": True, "num_kv_heads": 2}, common=_OWN_HEADS),
    Configuration("falcon", "multi-query", {"new_decoder_architecture": False}, common=_OWN_HEADS),
    Configuration("gpt_neox", common=_OWN_HEADS),
    Configuration("gpt_neox_japanese", common=_OWN_HEADS),
    Configuration("persimmon", common=_OWN_HEADS),
    Configuration("cwm", knobs={"bos_token_id": 0}),
    Configuration("qwen2", "biases and nothing tied", {"tie_word_embeddings": False}),
    Configuration("mpt", knobs={"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    Configuration("lfm2", knobs={"layer_types": ["conv", "full_attention"]}),
    Configuration("llama4_text", knobs=_EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": _WINDOW}),
    Configuration("qwen3_next", knobs=_EXPERTS | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    Configuration("qwen3_5_text", knobs={"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    Configuration("granitemoehybrid", knobs=_EXPERTS | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8}),
    Configuration("jamba", knobs=_EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Configuration("mamba2", knobs={"num_heads": 8, "head_dim": 16, "state_size": 16}),
    Configuration("falcon_h1", knobs={}),
    Configuration("bamba", knobs={}),
    Configuration("rwkv", knobs={}),
    Configuration("recurrent_gemma", knobs={}),
)
