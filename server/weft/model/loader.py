"""The base model: the only place that calls `from_pretrained`.

Any Hugging Face causal-LM directory whose attention goes through transformers' AttentionInterface; weights from
safetensors only, no code from the directory. Its linear modules, its output head and its norms with a bias come wrapped
(methods/inject.py).
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from weft.config import ModelConfig, Quantization
from weft.methods import sublayers
from weft.methods.inject import AdapterContext, adapter_sites, inject
from weft.methods.protocol import BaseShape

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A loaded base model and what the rest of the program must know of it."""

    model: Any  # transformers' PreTrainedModel; its forward is typed too loosely to help
    context: AdapterContext
    tokenizer: PreTrainedTokenizerBase
    shape: BaseShape
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def load(config: ModelConfig, *, attention: str) -> Base:
    """Load the base in evaluation mode, frozen. `attention` names a registered attention implementation.

    Raises FileNotFoundError for a directory without a checkpoint and ValueError where the model does not fit the knobs.
    """
    path = Path(config.path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: {path} holds no config.json; give a Hugging Face model directory")
    if config.double_quant and config.quantization is not Quantization.NF4:
        raise ValueError(f"double_quant: needs quantization nf4, given {config.quantization.value}")
    device = resolve_device(config.device)
    hf_config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    dtype = _resolve_dtype(config, device, hf_config)
    _require_alignment(config.quantization, device, hf_config)
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=hf_config,
        dtype=dtype,
        quantization_config=_quantization_config(config, dtype),
        device_map={"": device},
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    held_as = config.quantization.value + ("-double" if config.double_quant else "")
    digests = fingerprints(path)
    return wrap(
        model,
        AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False),
        name=Path(os.path.abspath(path)).name,
        digest=digests.pop(held_as),
        quantization=config.quantization,
        dtype=dtype,
        held_as=held_as,
        same_weights={digest: holding for holding, digest in digests.items()},
    )


def wrap(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    digest: str,
    quantization: Quantization,
    dtype: torch.dtype,
    held_as: str = "",
    same_weights: Mapping[str, str] = MappingProxyType({}),
) -> Base:
    """A transformers model as a base, changed in place: frozen, in evaluation mode, its sites wrapped."""
    model.eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    context = AdapterContext()
    sites = sublayers.mark(model, adapter_sites(model, head=model.get_output_embeddings()))
    inject(model, sites, context, sublayers.layers_of(model, sites))
    num_heads = text_config.num_attention_heads
    embedding: Any = model.get_input_embeddings()  # its width is not the hidden size everywhere (OPT)
    shape = BaseShape(
        sites={site.name: site for site in sites},
        num_layers=text_config.num_hidden_layers,
        num_kv_heads=getattr(text_config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads,
        embedding_size=embedding.weight.shape[1],
        digest=digest,
        name=name,
        held_as=held_as,
        same_weights=same_weights,
    )
    return Base(
        model=model,
        context=context,
        tokenizer=tokenizer,
        shape=shape,
        device=model.device,
        dtype=dtype,
        quantization=quantization,
        vocab_size=text_config.vocab_size,
        max_model_len=text_config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(model),
    )


def resolve_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda) means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch sees no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def fingerprints(path: Path) -> dict[str, str]:
    """The base's digest for each way to hold its weights: sha256 over that way and the digests of the weight files.

    An adapter names the one that it was trained on, so every base with its weights knows that digest as one of its own.
    The architecture is in it through config.json's bytes.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model: {path} holds no safetensors weights; other formats are not loaded")
    files.append(path / "config.json")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_digest, files))
    weights = "".join(f"{file.name}\n{digest}\n" for file, digest in zip(files, digests, strict=True))
    return {
        held_as: hashlib.sha256(f"weft-base-1\n{held_as}\n{weights}".encode()).hexdigest()
        for held_as in (*Quantization, f"{Quantization.NF4}-double")
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quantization_config(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    match config.quantization:
        case Quantization.NF4:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=config.double_quant,
            )
        case Quantization.INT8:
            # LLM.int8's outlier columns are taken over all rows of a batch: a threshold would let neighbours change
            # a request's numbers.
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case Quantization.NONE:
            return None


def _resolve_dtype(config: ModelConfig, device: torch.device, hf_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        dtype = _DTYPES[config.dtype]
        if dtype is torch.float16 and device.type == "cpu":
            raise ValueError("dtype: float16 runs on cuda only; take bfloat16 or float32 on a CPU")
        return dtype
    if config.quantization is Quantization.NONE and getattr(hf_config, "dtype", None) is torch.float32:
        return torch.float32
    return torch.bfloat16


def _require_alignment(quantization: Quantization, device: torch.device, hf_config: Any) -> None:
    """bitsandbytes' packed CPU kernel needs in % 64 = 0 and out % 32 = 0, and says so only by crashing."""
    if quantization is not Quantization.NF4 or device.type != "cpu":
        return
    text_config = hf_config.get_text_config()
    for knob in ("hidden_size", "intermediate_size"):
        value = getattr(text_config, knob, None)
        if value is not None and value % 64:
            raise ValueError(f"quantization: nf4 on a CPU needs {knob} to be a multiple of 64, given {value}")


def _eos_token_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
