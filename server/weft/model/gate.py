"""Refuse, before any weight is read, a base whose kind of model Weft does not compute.

Weft flattens all requests of a step into one sequence and keeps their rows apart in one place: the attention function
that it gives to transformers (model/paged_attention.py). A model is served only if nothing else connects its rows.
Three things are checked: transformers' own statement that a class takes its attention from AttentionInterface, the
types of layers that its configuration lists, and its modules, built without weights. A model that passes is still
compared with its own attention once its weights are loaded (model/self_test.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_REMEDY = "serve a base that `weft families` lists as equal, such as a Llama, Qwen 3 or Gemma 3"
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "sparse", "dense"})
_LAYER_FEATURES = {
    "conv": "convolution layers, which keep a state for each request",
    "linear_attention": "linear attention or state-space layers, which keep a state for each request",
    "mamba": "state-space layers, which keep a state for each request",
    "mamba2": "state-space layers, which keep a state for each request",
    "recurrent": "recurrent layers, which keep a state for each request",
    "hybrid": "layers that combine attention with a state-space state",
    "chunked_attention": "attention in chunks of the sequence, which needs a mask",
}
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")
_REASON_CHARACTERS_MAX = 200
_QUANTIZATION_SERVED = "bitsandbytes"


class BaseRefused(ValueError):
    """A base that cannot be served. The text is one sentence: what was found, why that is not served, what to do."""

    def __init__(self, name: str, found: str, remedy: str = _REMEDY) -> None:
        super().__init__(f"model: {name} {found}; {remedy}")


@contextmanager
def refusing(name: str, attempt: str) -> Iterator[None]:
    """Turn any exception from model code into a BaseRefused, because its traceback would not help the user."""
    try:
        yield
    except (BaseRefused, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BaseRefused(name, f"cannot be {attempt} ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Return what a library raised, on one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_CHARACTERS_MAX]


def require_served(hf_config: Any, name: str) -> nn.Module:
    """Return the model of transformers' `hf_config` without its weights, on the meta device.

    Raises BaseRefused for the first feature that Weft does not compute.
    """
    _require_plain_weights(hf_config, name)
    cls = _causal_class(hf_config, name)
    text_config = hf_config.get_text_config()
    for feature in _configured_features(text_config):
        raise BaseRefused(name, f"({cls.__name__}) has {feature}, which Weft does not serve")
    if not getattr(cls, "_supports_attention_backend", False):
        raise BaseRefused(
            name,
            f"({cls.__name__}) computes attention by itself instead of through transformers' AttentionInterface, so "
            "rows of different requests would attend to one another",
        )
    with refusing(name, "built from its config.json"), torch.device("meta"):
        skeleton = cls._from_config(hf_config) if hasattr(cls, "_from_config") else cls(hf_config)
    for feature in _built_features(skeleton):
        raise BaseRefused(name, f"({cls.__name__}) has {feature}, which Weft does not serve")
    return skeleton


def _require_plain_weights(hf_config: Any, name: str) -> None:
    quantization: Any = getattr(hf_config, "quantization_config", None)
    if quantization is None:
        return
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    if _QUANTIZATION_SERVED not in method:
        raise BaseRefused(
            name,
            f"is a checkpoint quantized as {method}, and Weft quantizes by itself, with bitsandbytes",
            "serve the unquantized checkpoint of the same model with --quant nf4 or int8",
        )


def _causal_class(hf_config: Any, name: str) -> Any:
    model_type = getattr(hf_config, "model_type", "?")
    cls = AutoModelForCausalLM._model_mapping.get(type(hf_config), None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or cls is None:
        raise BaseRefused(name, f"is a {model_type} model, which transformers has no causal language model of")
    if getattr(hf_config, "is_encoder_decoder", False):
        raise BaseRefused(name, f"is a {model_type} model with an encoder and a decoder, and Weft serves decoders only")
    return cls


def _configured_features(text_config: Any) -> Iterator[str]:
    for knob in _LAYER_LISTS:
        for kind in getattr(text_config, knob, None) or ():
            if kind not in _SERVED_LAYERS:
                yield _LAYER_FEATURES.get(kind, f"layers of the type {kind}")
    if getattr(text_config, "kv_lora_rank", None):
        yield "multi-head latent attention (MLA), whose keys and values differ in size"
    if getattr(text_config, "alibi", False):
        yield "ALiBi position biases"
    if getattr(text_config, "use_bidirectional_attention", False) in (True, "all"):
        yield "attention to later tokens"


def _built_features(skeleton: nn.Module) -> Iterator[str]:
    sizes: set[int] = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, nn.Conv1d):
            yield "convolutions over the sequence, which keep a state for each request"
        for parameter, _ in module.named_parameters(recurse=False):
            if parameter in ("sinks", "sink", "attention_sink_bias"):
                yield "attention sinks"
            if parameter in ("A_log", "A_logs"):
                yield "state-space layers, which keep a state for each request"
        size: Any = getattr(module, "head_dim", None)
        if isinstance(size, int) and hasattr(module, "layer_idx") and "attn" in path.rpartition(".")[2]:
            sizes.add(size)
    if len(sizes) > 1:
        yield f"attention heads of {' and '.join(map(str, sorted(sizes)))} features in different layers"
