"""Where a base comes from: a directory, a GGUF file, or a model of the Hugging Face hub.

    path/to/model           a directory with config.json, safetensors and a tokenizer
    path/to/model.gguf      read by transformers, dequantized once into a directory of the user's cache
    org/name[@revision]     downloaded into huggingface_hub's own cache, under its own HF_TOKEN and HF_HUB_OFFLINE

Nothing is downloaded unless the text names a hub model and no such path exists.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_HUB_IGNORED = ["*/*", "*.bin", "*.py"]
_GGUF_FORM = "2"  # of what is cached; another number makes it again


class Source(NamedTuple):
    """A directory that holds a base, and the base's name for people."""

    directory: Path
    name: str


def resolve(model: Path) -> Source:
    """Find the base that `model` names, fetching or converting it where that is needed.

    Raises FileNotFoundError or ValueError with one sentence: what was found, why that is no base, what to do.
    """
    path = model.expanduser()
    if path.is_dir():
        return Source(path, Path(os.path.abspath(path)).name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"model: {path} is a file, and no .gguf; give the directory that it is in")
        return Source(_from_gguf(path), path.stem)
    if _HUB_ID.fullmatch(str(model)):
        return _from_hub(str(model))
    raise FileNotFoundError(
        f"model: {path} does not exist; give a model directory, a .gguf file or a hub id such as org/name"
    )


def require_config(directory: Path) -> None:
    """Raise FileNotFoundError unless the directory says what model it holds."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model: {directory} holds no config.json; give a Hugging Face model directory")


def require_files(directory: Path) -> None:
    """Raise FileNotFoundError, with a remedy, unless the directory has weights and a tokenizer that are read."""
    if not any(directory.glob("*.safetensors")):
        found = "weights as pickle (.bin), which can run code when it is read" if any(directory.glob("*.bin")) else ""
        raise FileNotFoundError(
            f"model: {directory} holds {found or 'no safetensors weights'}; load it where you trust it and write it "
            "with save_pretrained, which makes safetensors"
        )
    if not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"model: {directory} holds no tokenizer.json; write it beside the weights with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def _from_hub(text: str) -> Source:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = text.partition("@")
    try:
        directory = snapshot_download(
            name, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError:
        raise ValueError(f"model: {name} is gated; accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ValueError(f"model: the hub's {name} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"model: {name} is neither a path nor a model that the hub shows you; check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError:
        raise ValueError(f"model: {text} is no path, and no id that the hub allows") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        is_offline = is_offline_mode()
        reason = "HF_HUB_OFFLINE is set" if is_offline else f"the hub gives none ({type(error).__name__})"
        raise ValueError(
            f"model: {name} is no path, is not in the hub's cache, and {reason}; give a model directory, or connect "
            "and try again"
        ) from error
    return Source(Path(directory), name)


def _from_gguf(file: Path) -> Path:
    """Return the directory that the file was dequantized into, which is made where it is not there yet."""
    try:
        import gguf  # noqa: F401  transformers reads with it
    except ImportError:
        raise ValueError(f"model: {file.name} is read with the package gguf; pip install 'weft-serve[gguf]'") from None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    target = _cache() / f"{file.stem}-{digest[:16]}-{_GGUF_FORM}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        _dequantize(file, made)
        try:
            made.rename(target)
        except OSError:  # another process was first, with the same content
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _dequantize(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"model: {file.name} cannot be read by transformers ({reason}); serve the model's safetensors checkpoint"
        ) from error
    vars(model.config).pop("quantization_config", None)  # the weights are plain now
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _forget_version(directory / "config.json")


def _forget_version(config: Path) -> None:
    """Take transformers' version out of a config.json: its bytes are in the base's digest, which is the file's own."""
    keys = json.loads(config.read_text(encoding="utf-8"))
    keys.pop("transformers_version", None)
    config.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cache() -> Path:
    """The user's cache (XDG base directories)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()) / "weft" / "gguf"
