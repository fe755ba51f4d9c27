"""GGUF files of a Llama and of its LoRAs, made from Hugging Face and PEFT directories. Needs the package `gguf`.

A file is stored beside its directory, and so written only once for all runs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from benchmarks.backends import gguf_layout, lora_directory, tensor_file, vocabulary

_ARCHITECTURE = "llama"


def base_file(model: Path, dtype: gguf.GGMLQuantizationType) -> Path:
    """Return `model`'s weights as a GGUF file, written if it is outdated: matrices as `dtype`, vectors as float32."""
    path = model.with_name(f"{model.name}.{dtype.name.lower()}.gguf")
    return _written(path, model, lambda unfinished: _write_base(model, dtype, unfinished))


def lora_file(adapter: Path, model: Path) -> Path:
    """Return the LoRA `adapter` as such a file, in its own float32. Raises Cannot for another method."""
    path = adapter.with_name(f"{adapter.name}.gguf")
    return _written(path, adapter, lambda unfinished: _write_lora(adapter, model, unfinished))


def _written(path: Path, source: Path, write: Callable[[Path], None]) -> Path:
    newest_s = max(file.stat().st_mtime for file in source.iterdir())
    if not path.exists() or path.stat().st_mtime < newest_s:
        unfinished = path.with_suffix(".unfinished")
        write(unfinished)
        unfinished.replace(path)
    return path


def _write_base(model: Path, dtype: gguf.GGMLQuantizationType, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # A vocabulary of this kind has no end-of-sequence token, like the bench models; the answers need no text.
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(vocabulary.words(config["vocab_size"]))
    for name, values in tensor_file.read(model):
        module = name.removesuffix(".weight")
        stored = _ordered(module, values, config)
        kind = dtype if stored.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_layout.tensor_name(module), gguf.quants.quantize(stored, kind), raw_dtype=kind)
    _close(writer)


def _write_lora(adapter: Path, model: Path, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_directory.config(adapter)["lora_alpha"])
    for key, values in tensor_file.read(adapter):
        module, factor = gguf_layout.lora_module(key)
        stored = _ordered(module, values, config) if factor == "b" else values
        writer.add_tensor(f"{gguf_layout.tensor_name(module)}.lora_{factor}", np.ascontiguousarray(stored))
    _close(writer)


def _ordered(module: str, rows: np.ndarray, config: dict[str, int]) -> np.ndarray:
    heads = gguf_layout.rotated_heads(
        module, num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"]
    )
    return rows if heads is None else np.ascontiguousarray(gguf_layout.interleaved(rows, heads))


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
