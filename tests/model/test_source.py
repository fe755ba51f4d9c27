"""Sources of a base, and one sentence for every other argument."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from weft.config import typed_path
from weft.model import checkpoint_files, source
from weft.settings import load


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_base(tmp_path / "base")


def test_a_directory_is_itself_and_named_by_its_last_part(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.resolve(base) == (base, "base")
    monkeypatch.chdir(base)
    assert source.resolve(Path(".")).name == "base"


@pytest.mark.parametrize(
    ("made", "removed", "said"),
    [
        ("", "config.json", "holds no config.json"),
        ("", "model.safetensors", "holds no safetensors weights"),
        ("pytorch_model.bin", "model.safetensors", "weights as pickle (.bin), which can run code when it is read"),
        ("", "tokenizer.json", "holds no tokenizer.json; write it beside the weights"),
    ],
)
def test_a_directory_without_what_a_base_is_read_from(base: Path, made: str, removed: str, said: str) -> None:
    _require(base)
    (base / removed).unlink()
    if made:
        (base / made).write_bytes(b"x")
    with pytest.raises(FileNotFoundError) as refused:
        _require(base)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def _require(base: Path) -> None:
    checkpoint_files.require_config(base)
    checkpoint_files.require_files(base)


def test_what_is_no_base_is_refused(base: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a model directory, a \.gguf file or a hub id"):
        source.resolve(base / "typo" / "deeper")
    with pytest.raises(ValueError, match=r"is a file, and no \.gguf"):
        source.resolve(base / "config.json")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"x.gguf cannot be read by transformers .*; serve the model's safetensors"):
        source.resolve(tmp_path / "x.gguf")
    assert [path.name for path in (tmp_path / "cache/weft/gguf").iterdir()] == [".lock"]  # nothing half-made is left


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"x.gguf cannot be converted into .*; make room there, or set XDG_CACHE_HOME"):
        source.resolve(tmp_path / "x.gguf")


_IMPORT_TRAINERS = ("trainer", "checkpoint", "history", "joint")
_RESOLVE = (
    "import sys; from pathlib import Path; from weft.model import source; print(source.resolve(Path(sys.argv[1])))"
)


def _resolved(model: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads the environment once."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", _RESOLVE, model],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_hub_id_is_found_in_the_cache_and_nothing_is_asked_of_the_network(base: Path, tmp_path: Path) -> None:
    cached = tmp_path / "home/hub/models--org--name"
    (cached / "snapshots").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    base.rename(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    found = _resolved("org/name", tmp_path / "home")
    assert f"snapshots/{commit}" in found.stdout, found.stderr
    assert "name='org/name'" in found.stdout
    missing = _resolved("org/other", tmp_path / "home")
    assert "org/other is no path, is not in the hub's cache, and HF_HUB_OFFLINE is set" in missing.stderr


@pytest.mark.parametrize(
    "module", ["weft.methods.bnb", "weft.api.serve", *(f"weft_training.{name}" for name in _IMPORT_TRAINERS)]
)
def test_bitsandbytes_fetches_no_code(module: str, tmp_path: Path) -> None:
    """An installed package `kernels` would be asked for code: it is not called, and it is restored afterwards."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    print('fetched', flush=True)\n")
    code = f"import {module}, kernels; print(kernels.__file__)"
    said = _import(code, tmp_path)
    assert str(tmp_path) in said
    assert "fetched" not in said


def test_bitsandbytes_alone_would_fetch(tmp_path: Path) -> None:
    """Negative control."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    print('fetched', flush=True)\n")
    said = _import("import bitsandbytes.backends.cpu.ops as ops; print(ops.has_avx512bf16())", tmp_path)
    if said.split()[-1] in ("False", "0"):
        pytest.skip("bitsandbytes asks only on a CPU with AVX512-BF16")
    assert "fetched" in said


def _import(code: str, packages: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("typed", ["./models/typo", "models/typo/", "../models/typo", "~/typo", "/models/typo"])
def test_what_is_typed_as_a_path_is_no_hub_id(typed: str) -> None:
    """Otherwise a typo would be looked up in the network, and downloaded if such a model existed."""
    path = typed_path(typed)
    assert path.is_absolute()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        source.resolve(path)
    assert load({"model": typed}).model.path == path
    assert typed_path("org/name") == Path("org/name")
