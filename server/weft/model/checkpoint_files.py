"""Check that a checkpoint directory's files are there and whole; if not, say what was found, why not, and what to do.

This runs before a library reads them, since the library's errors name no file or no remedy, and before weights are read
for minutes. A missing tensor shows only when they are read (model/loader.py).
"""

import json
from pathlib import Path
from typing import Any

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # stands in place of a large file in a clone without git-lfs
_HEADER_SIZE_BYTES = 8  # of a safetensors file: the length of its header, little endian
_HEADER_BYTES_MAX = 100 << 20  # the most that safetensors reads
_AGAIN = "download it again"


def require_config(directory: Path) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises FileNotFoundError if there is none, and ValueError if it is not a JSON object.
    """
    if not (directory / _CONFIG).is_file():
        ggufs = sorted(directory.glob("*.gguf"))
        remedy = (
            f" but GGUF files; give the file itself: {ggufs[0]}" if ggufs else "; give a Hugging Face model directory"
        )
        raise FileNotFoundError(f"model: {directory} holds no {_CONFIG}{remedy}")
    return _json_object(directory / _CONFIG)


def require_files(directory: Path) -> None:
    """Raise FileNotFoundError or ValueError unless the directory has weights and a tokenizer that are whole."""
    for path in weights(directory):
        _require_whole(path)
    if not (directory / _TOKENIZER).is_file():
        raise FileNotFoundError(
            f"model: {directory} holds no {_TOKENIZER}; write it beside the weights with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    for path in (directory / _TOKENIZER, directory / "tokenizer_config.json"):
        if path.is_file():
            _json_object(path)


def is_complete(directory: Path) -> bool:
    """Return whether the directory passes `require_config` and `require_files`."""
    try:
        require_config(directory)
        require_files(directory)
    except (OSError, ValueError):
        return False
    return True


def weights(directory: Path) -> list[Path]:
    """Return the weight files to read, sorted by name, without a second copy of them in another layout.

    Raises FileNotFoundError if one is missing, ValueError if their index cannot be read.
    """
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        return _indexed(directory)
    if any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model: {directory} holds safetensors files, but neither {_WEIGHTS} nor the {_INDEX} that lists them; "
            f"download what is missing"
        )
    found = "weights as pickle (.bin), which can run code when it is read" if any(directory.glob("*.bin")) else ""
    raise FileNotFoundError(
        f"model: {directory} holds {found or 'no safetensors weights'}; load it where you trust it and write it "
        "with save_pretrained, which makes safetensors"
    )


def _indexed(directory: Path) -> list[Path]:
    files = _json_object(directory / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(_is_file_name(name) for name in files.values()):
        raise ValueError(f"model: {directory / _INDEX} has no weight_map from weights to files here; {_AGAIN}")
    names = sorted(set(files.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"model: {directory} lacks {missing[0]}, with {len(missing)} of {len(names)} files that {_INDEX} names "
            "missing; download what is missing"
        )
    return [directory / name for name in names]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _json_object(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    _require_no_pointer(path, content)
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(f"model: {path} is no JSON ({reason}); {_AGAIN}") from None
    if not isinstance(given, dict):
        raise ValueError(f"model: {path} holds a JSON {type(given).__name__} where an object is due; {_AGAIN}")
    return given


def _require_no_pointer(path: Path, content: bytes) -> None:
    if content.startswith(_POINTER):
        raise ValueError(
            f"model: {path} is a git-lfs pointer instead of the file; run git lfs pull where it was cloned"
        )


def _require_whole(path: Path) -> None:
    """Raise ValueError unless a safetensors file has all bytes that its header lists."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
        _require_no_pointer(path, head)
        header_size = int.from_bytes(head[:_HEADER_SIZE_BYTES], "little")
        if len(head) < _HEADER_SIZE_BYTES or header_size > min(size - _HEADER_SIZE_BYTES, _HEADER_BYTES_MAX):
            raise ValueError(f"model: {path} is no safetensors file, or the beginning of one ({size} bytes); {_AGAIN}")
        file.seek(_HEADER_SIZE_BYTES)
        header = file.read(header_size)
    try:
        tensors = [about for name, about in json.loads(header).items() if name != "__metadata__"]
        end = max((about["data_offsets"][1] for about in tensors), default=0)
        whole = _HEADER_SIZE_BYTES + header_size + int(end)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"model: {path} has a damaged header and is no safetensors file; {_AGAIN}") from None
    if size != whole:
        raise ValueError(f"model: {path} is not whole: {size} bytes, and its header lists {whole}; {_AGAIN}")
