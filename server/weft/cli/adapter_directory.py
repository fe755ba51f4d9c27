"""Read local adapter directories, for commands that work without a server."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weft.config import AdapterLimits

if TYPE_CHECKING:
    from weft.methods.protocol import Adapter, BaseShape

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class AdapterDirectory(NamedTuple):
    """Contents of an adapter directory. base_digest: digest of the base that it names, or None.

    rope_factors: the base's rotary factors in training; "" if they do not depend on the length.
    """

    adapter: "Adapter"
    base_digest: str | None
    rope_factors: str


def read(path: Path, shape: "BaseShape") -> AdapterDirectory:
    """Return the adapter fitted to `shape`, whichever base its file names.

    Raises OSError, or the error with which a server would refuse the adapter.
    """
    from safetensors import safe_open

    from weft.adapters.ingest import read_config
    from weft.adapters.safetensors_header import read_header
    from weft.methods.checkpoint import base_binding, directory

    limits = AdapterLimits()
    keys = read_config((path / CONFIG_FILE).read_bytes(), limits)
    with (path / WEIGHTS_FILE).open("rb") as file:
        metadata = read_header(file, limits).metadata
    with safe_open(path / WEIGHTS_FILE, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    digest = metadata.get(directory.BASE_DIGEST)
    fitted = shape if digest is None else replace(shape, digest=digest)
    adapter = directory.read(keys, tensors, metadata, fitted, limits)
    return AdapterDirectory(adapter, digest, base_binding.rope_factors(metadata))
