"""Find a base: a directory, a GGUF file, or a model of the Hugging Face hub.

    path/to/model           a directory with config.json, safetensors and a tokenizer
    path/to/model.gguf      read by transformers, dequantized once into a directory of the user's cache
    org/name[@revision]     downloaded into huggingface_hub's own cache, under its own HF_TOKEN and HF_HUB_OFFLINE

Nothing is downloaded unless the text names a hub model and no such path exists.
"""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from weft.model import cache, checkpoint_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_HUB_IGNORED = ["*/*", "*.bin", "*.py", "consolidated*"]  # the last: the same weights again, in Mistral's own layout
_REQUEST_LOGS = ("httpx", "httpx2")  # they log each request that huggingface_hub makes
_GGUF_FORM = "2"  # of the cached directory; another number makes it again


class Source(NamedTuple):
    """A directory that holds a base, and the base's display name."""

    directory: Path
    name: str


def resolve(model: Path) -> Source:
    """Find the base that `model` names, fetching or converting it if needed.

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


def _from_hub(text: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if logging.root.level > logging.DEBUG:
        for requests in _REQUEST_LOGS:
            logging.getLogger(requests).setLevel(logging.WARNING)
    name, _, revision = text.partition("@")
    try:
        directory = snapshot_download(
            name, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError:
        raise ValueError(f"model: {name} is gated; accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ValueError(f"model: the hub's {name} has no revision {revision or 'main'}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"model: {name} is neither a path nor a model that the hub shows you; check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError:
        raise ValueError(f"model: {text} is no path, and no id that the hub allows") from None
    except Exception as error:  # errors of the hub's client and of its HTTP library have no common base class
        raise ValueError(f"model: {name} is no path, {_unreached(error)}") from error
    return Source(Path(directory), name)


def _unreached(error: BaseException) -> str:
    """Say why the hub gave no model, and what to do, from the causes of the client's error, which itself hides them."""
    from huggingface_hub import is_offline_mode

    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return f"and what the hub gives cannot be written ({os.strerror(error.errno)}); set HF_HOME to where it can be"
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    else:
        causes = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
        status = next((status for status in statuses if status), None)
        reason = f"the hub answers {status}" if status else f"the hub is not reached ({type(causes[-1]).__name__})"
    return f"is not in the hub's cache, and {reason}; give a model directory, or connect and try again"


def _from_gguf(file: Path) -> Path:
    """Return the directory that the file was dequantized into, dequantizing it first if necessary."""
    try:
        import gguf  # noqa: F401  transformers reads with it
    except ImportError:
        raise ValueError(f"model: {file.name} is read with the package gguf; pip install 'weft-serve[gguf]'") from None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    try:
        return cache.directory(
            _cache(),
            f"{file.stem}-{digest[:16]}-{_GGUF_FORM}",
            lambda made: _dequantize(file, made),
            is_complete=checkpoint_files.is_complete,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model: {file.name} cannot be converted into {_cache()} ({error}); make room there, or set XDG_CACHE_HOME"
        ) from error


def _dequantize(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from weft.model import gate

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise ValueError(
            f"model: {file.name} cannot be read by transformers ({gate.reason(error)}); serve the model's safetensors "
            "checkpoint"
        ) from error
    vars(model.config).pop("quantization_config", None)  # the weights are plain now
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _forget_version(directory / "config.json")


def _forget_version(config: Path) -> None:
    """Remove transformers' version from config.json, whose bytes enter a digest that only the GGUF file may change."""
    keys = json.loads(config.read_text(encoding="utf-8"))
    keys.pop("transformers_version", None)
    config.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cache() -> Path:
    """Return the directory for converted files in the user's cache (XDG base directories)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()) / "weft" / "gguf"
