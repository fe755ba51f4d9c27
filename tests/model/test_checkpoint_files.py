"""A damaged model directory gives one sentence that names the file, the fault and the remedy."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.families.measured import require_sentence
from weft.config import ModelConfig, Quantization
from weft.model import checkpoint_files, loader

_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = "model.safetensors.index.json"


def _write(name: str, content: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text(content)


def _truncate(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _shard(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    parts = (names[:5], names[5:])
    for file, part in zip(_SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
    placed = {name: file for file, part in zip(_SHARDS, parts, strict=True) for name in part}
    (base / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (base / "model.safetensors").unlink()


def _lose_a_shard(base: Path) -> None:
    _shard(base)
    (base / _SHARDS[1]).unlink()


def _lose_the_index(base: Path) -> None:
    _shard(base)
    (base / _INDEX).unlink()


def _point_elsewhere(base: Path) -> None:
    _shard(base)
    (base / _INDEX).write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))


def _lose_a_weight(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _leave_a_gguf(base: Path) -> None:
    for path in base.iterdir():
        path.unlink()
    (base / "x.gguf").write_bytes(b"GGUF")


def _set(key: str, value: object) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        given = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**given, key: value}))

    return change


_DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a tokenizer that is no JSON", _write("tokenizer.json", "{broken"), "tokenizer.json is no JSON"),
    ("a tokenizer of nothing", _write("tokenizer.json", "{}"), "has a tokenizer that transformers cannot read"),
    ("a tokenizer's pointer", _write("tokenizer.json", _POINTER), "tokenizer.json is a git-lfs pointer"),
    ("a configuration that is no JSON", _write("config.json", "{broken"), "config.json is no JSON"),
    ("a configuration that is a list", _write("config.json", "[]"), "config.json holds a JSON list"),
    ("a configuration without a kind", _write("config.json", "{}"), "is a nameless model"),
    ("a kind that is no text", _set("model_type", []), "is a [] model"),
    ("a size that is no number", _set("hidden_size", "many"), "has a config.json that transformers cannot read"),
    ("half of the weights", _truncate, "model.safetensors is not whole: "),
    ("empty weights", _write("model.safetensors", ""), "is no safetensors file, or the beginning of one (0 bytes)"),
    ("other bytes", _write("model.safetensors", "\2\0\0\0\0\0\0\0{]"), "model.safetensors has a damaged header"),
    ("the weights' pointer", _write("model.safetensors", _POINTER), "model.safetensors is a git-lfs pointer"),
    ("a missing shard", _lose_a_shard, f"lacks {_SHARDS[1]}, with 1 of 2 files that {_INDEX} names missing"),
    ("a missing index", _lose_the_index, f"neither model.safetensors nor the {_INDEX}"),
    ("an index out of the directory", _point_elsewhere, "has no weight_map from weights to files here"),
    ("a missing weight", _lose_a_weight, "lacks 1 of its weights, model.norm.weight among them"),
    ("a GGUF file alone", _leave_a_gguf, "give the file itself: "),
]


def _read(base: Path) -> loader.Checkpoint:
    return loader.read(ModelConfig(path=base, device="cpu", quantization=Quantization.NONE), attention="eager")


@pytest.mark.parametrize(("damage", "said"), [damage[1:] for damage in _DAMAGES], ids=[name for name, *_ in _DAMAGES])
def test_a_damaged_directory_ends_in_a_sentence(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    damage(base)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        _read(base)
    text = str(refused.value)
    require_sentence(text)
    assert text.startswith("model: ")
    assert said in text
    assert "; " in text  # the remedy


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    """Negative control, in one file and in shards; a second copy of the weights is neither read nor counted."""
    base = tiny.save_base(tmp_path / "base")
    digest = _read(base).digest
    (base / "consolidated.safetensors").write_bytes(b"in another layout")
    assert _read(base).digest == digest
    _shard(base)
    assert checkpoint_files.is_complete(base)
    assert [path.name for path in checkpoint_files.weights(base)] == list(_SHARDS)
    assert _read(base).digest not in ("", digest)


def test_no_traceback_of_a_damaged_directory_reaches_a_terminal(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    _truncate(base)
    ended = subprocess.run(
        [sys.executable, "-m", "weft", "serve", str(base)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if "model.safetensors" in line]
    assert "is not whole" in line
    require_sentence(line)
