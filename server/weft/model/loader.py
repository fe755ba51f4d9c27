"""Read the base model and wrap it. Only this module calls `from_pretrained`.

A base is a Hugging Face causal-LM directory that passes model/gate.py. Its weights come from safetensors only, and no
code of the directory runs. `read` returns the model as transformers has it, and `wrap` makes a base of it, in which
linear modules, the output head and norms with a bias are wrapped (methods/inject.py). Servers and trainers run the
self-test between the two and after them (model/self_test.py).
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from weft.methods.bnb import Int8Params, Params4bit

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert

from weft.config import ModelConfig, Quantization
from weft.methods import sublayers
from weft.methods.inject import AdapterContext, adapter_sites, inject
from weft.methods.protocol import BaseShape
from weft.model import checkpoint_files, gate, packed, source


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A loaded base model, with everything that the rest of the program needs from it."""

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


class WeightBytes(NamedTuple):
    """Bytes that the weights of a base take: those held quantized, and all others, `experts` among them.

    experts: weights of experts that transformers holds as bare parameters, which bitsandbytes does not quantize.
    """

    quantized: int
    unquantized: int
    experts: int

    @classmethod
    def of(cls, model: nn.Module) -> "WeightBytes":
        """Count the parameters of a model, without the scales of quantized ones."""
        quantized = unquantized = experts = 0
        for name, parameter in model.named_parameters():
            if isinstance(parameter, Params4bit | Int8Params):
                quantized += parameter.nbytes
            else:
                unquantized += parameter.nbytes
                experts += parameter.nbytes if parameter.dim() == 3 and "experts" in name else 0
        return cls(quantized, unquantized, experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model that was read and not changed yet; `wrap` makes a Base of it."""

    model: Any
    tokenizer: Any
    name: str
    digest: str
    quantization: Quantization
    dtype: torch.dtype
    held_as: str = ""
    same_weights: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    rope_factors: str = ""  # of `model`, once fixed (model/rope.py)

    @property
    def max_model_len(self) -> int:
        """Number of positions that the model was made for."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def cache_shape(self) -> dict[str, int]:
        """Shape of one token's keys, and of its values, by the names in BaseShape."""
        text_config = self.model.config.get_text_config()
        num_heads = text_config.num_attention_heads
        return {
            "num_layers": text_config.num_hidden_layers,
            "num_kv_heads": getattr(text_config, "num_key_value_heads", None) or num_heads,
            "head_dim": getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads,
        }

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * math.prod(self.cache_shape.values()) * self.dtype.itemsize


def load(config: ModelConfig, *, attention: str) -> Base:
    """Read the base and wrap it without its self-test, for commands that compute no requests with it."""
    return wrap(read(config, attention=attention))


def read(config: ModelConfig, *, attention: str) -> Checkpoint:
    """Read the base from disk. `attention` names a registered attention implementation.

    Raises FileNotFoundError or ValueError for a directory without a whole checkpoint, BaseRefused for a kind of model
    that is not served (model/gate.py) or cannot be read, and ValueError if the model does not fit the settings.
    """
    path, name = source.resolve(Path(config.path))
    given = checkpoint_files.require_config(path)
    if config.double_quant and config.quantization is not Quantization.NF4:
        raise ValueError(f"double_quant: needs quantization nf4, given {config.quantization.value}")
    device = resolve_device(config.device)
    hf_config = _read_config(path, name, given)
    skeleton = gate.require_served(hf_config, name)
    checkpoint_files.require_files(path)
    tokenizer = _read_tokenizer(path, name)
    dtype = _resolve_dtype(config, device, hf_config)
    _require_alignment(config.quantization, device, hf_config)
    transformers_logging.disable_progress_bar()
    with gate.refusing(name, "read by transformers"):
        read: Any = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            config=hf_config,
            dtype=dtype,
            quantization_config=_quantization_config(config, dtype, _unaligned(skeleton, device)),
            device_map={"": device},
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model, loading = read  # its type does not cover output_loading_info
    _require_all_read(name, loading["missing_keys"])
    held_as = config.quantization.value + ("-double" if config.double_quant else "")
    digests = fingerprints(path)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        name=name,
        digest=digests.pop(held_as),
        quantization=config.quantization,
        dtype=dtype,
        held_as=held_as,
        same_weights={digest: holding for holding, digest in digests.items()},
    )


def _read_config(path: Path, name: str, given: Mapping[str, Any]) -> Any:
    """Read config.json, whose contents are `given`.

    Raises BaseRefused if transformers has no such model, or has it only through code in the directory, or not with
    these values.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the configuration classes of some hundred models may raise anything
        if "auto_map" in given:
            raise gate.BaseRefused(name, "brings model code of its own, which Weft does not run") from error
        kind = given.get("model_type", "nameless")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            raise gate.BaseRefused(
                name, f"has a config.json that transformers cannot read ({gate.reason(error)})", "download it again"
            ) from error
        raise gate.BaseRefused(name, f"is a {kind} model, which the installed transformers does not know") from error


def _read_tokenizer(path: Path, name: str) -> Any:
    """Read the tokenizer before the weights, which take minutes. Raises BaseRefused if transformers cannot read it."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own errors are bare Exceptions
        raise gate.BaseRefused(
            name,
            f"has a tokenizer that transformers cannot read ({gate.reason(error)})",
            "write tokenizer.json and tokenizer_config.json again, with AutoTokenizer's save_pretrained",
        ) from error


def _require_all_read(name: str, missing: Collection[str]) -> None:
    """Raise BaseRefused if transformers filled weights with random numbers because no file has them."""
    if missing:
        raise gate.BaseRefused(
            name,
            f"lacks {len(missing)} of its weights, {min(missing)} among them, which would be random numbers",
            "download it again",
        )


def wrap(checkpoint: Checkpoint) -> Base:
    """Make a base of a checkpoint, changing its model in place: frozen, in evaluation mode, its sites wrapped."""
    model = checkpoint.model
    model.eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    context = AdapterContext()
    with gate.refusing(checkpoint.name, "run on two tokens"):
        sites = sublayers.mark(model, adapter_sites(model, head=model.get_output_embeddings()))
    inject(model, sites, context, sublayers.layers_of(model, sites))
    embedding: Any = model.get_input_embeddings()  # its width is not always the hidden size (OPT)
    shape = BaseShape(
        sites={site.name: site for site in sites},
        **checkpoint.cache_shape,
        embedding_size=embedding.weight.shape[1],
        digest=checkpoint.digest,
        name=checkpoint.name,
        held_as=checkpoint.held_as,
        same_weights=checkpoint.same_weights,
        rope_factors=checkpoint.rope_factors,
    )
    return Base(
        model=model,
        context=context,
        tokenizer=checkpoint.tokenizer,
        shape=shape,
        device=model.device,
        dtype=checkpoint.dtype,
        quantization=checkpoint.quantization,
        vocab_size=text_config.vocab_size,
        max_model_len=text_config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(model),
    )


def resolve_device(name: str) -> torch.device:
    """Return the device that `name` (auto, cpu, cuda) means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch sees no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def fingerprints(path: Path) -> dict[str, str]:
    """Return the base's digest for each way to hold its weights: sha256 over that way and the weight files' digests.

    An adapter names the digest of the base that it was trained on, so a base recognizes the digests of all ways to hold
    its weights. The architecture is included through the bytes of config.json.
    """
    files = [*checkpoint_files.weights(path), path / "config.json"]
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


def _quantization_config(
    config: ModelConfig, dtype: torch.dtype, unaligned: Sequence[str]
) -> BitsAndBytesConfig | None:
    """Return the quantization for transformers; modules that NF4 cannot hold (`unaligned`) stay as they are."""
    match config.quantization:
        case Quantization.NF4:
            return BitsAndBytesConfig(
                llm_int8_skip_modules=list(unaligned) or None,
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=config.double_quant,
            )
        case Quantization.INT8:
            # LLM.int8 finds outlier columns over all rows of a batch: with a threshold, neighbours would change a
            # request's numbers.
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case Quantization.NONE:
            return None


def _resolve_dtype(config: ModelConfig, device: torch.device, hf_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        if dtype is torch.float16 and device.type == "cpu":
            raise ValueError("dtype: float16 runs on cuda only; take bfloat16 or float32 on a CPU")
        return dtype
    if config.quantization is Quantization.NONE and getattr(hf_config, "dtype", None) is torch.float32:
        return torch.float32
    if device.type == "cpu" and not packed.multiplies_bfloat16():
        return torch.float32
    return torch.bfloat16


def _unaligned(skeleton: nn.Module, device: torch.device) -> list[str]:
    """Return the linear modules that bitsandbytes' NF4 on a CPU cannot multiply with, such as a gate with one output.

    If there are any, those that transformers leaves out by default follow, because our list replaces its own.
    """
    if device.type != "cpu":
        return []
    found = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and (module.in_features % 64 or module.out_features % 32)
    ]
    return [*found, *get_keys_to_not_convert(skeleton)] if found else []


def _require_alignment(quantization: Quantization, device: torch.device, hf_config: Any) -> None:
    """Raise ValueError if bitsandbytes' packed CPU kernel would crash: it needs in % 64 = 0 and out % 32 = 0."""
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
