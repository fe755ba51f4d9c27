"""Publishes a finished adapter to a server or a store, through the same ingest as any tenant's."""

import re
from pathlib import Path
from typing import NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from weft.adapters.identifiers import AdapterId, check_adapter_id
from weft.adapters.ingest import Ingest
from weft.adapters.store import AdapterStore
from weft.client import Client
from weft.config import CHECKS, AdapterLimits, ModelConfig
from weft.model import loader
from weft.v1.adapter_files import pair_of

_SERVER = re.compile(r"[^/\s]+:\d{1,5}")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class PublishConfig:
    """Destination of a finished adapter."""

    publish: str = Field(description="HOST:PORT of a server, to which it is uploaded, or the directory of a store.")
    adapter_id: str | None = Field(
        default=None, description="The adapter's id; by default the name of the output directory."
    )
    replace: bool = Field(default=False, description="Whether the id may be bound to other content already.")


class Published(NamedTuple):
    """The adapter's id and digest, and a command that uses it."""

    adapter_id: str
    digest: str
    call: str


def check(config: PublishConfig, output: Path) -> AdapterId:
    """Return the id that `output` will get. Raises InvalidRequest for an invalid one, before training and not after."""
    return check_adapter_id(config.adapter_id or output.name)


def publish(config: PublishConfig, output: Path, model: ModelConfig) -> Published:
    """Publish the directory `output`. A mixture's experts are published individually, before the mixture.

    Raises weft.client.RpcFailure if the server refuses, and WeftError if the store does.
    """
    adapter_id = check(config, output)
    if _SERVER.fullmatch(config.publish):
        with Client(config.publish) as client:
            digest = client.upload(adapter_id, output, replace=config.replace).adapter.digest
        call = f'weft generate "…" --adapter {adapter_id} --server {config.publish}'
    else:
        digest = _register(Path(config.publish), adapter_id, output, model, replace=config.replace)
        call = f'weft serve {model.path} --store {config.publish}, then weft generate "…" --adapter {adapter_id}'
    return Published(adapter_id, digest, call)


def _register(root: Path, adapter_id: AdapterId, output: Path, model: ModelConfig, *, replace: bool) -> str:
    """Register the directory and return its digest in the store. It is checked against the base, as by a server."""
    base = loader.load(model, attention="eager")
    limits = AdapterLimits()
    parent = output.resolve().parent
    store = AdapterStore(root, limits, allowed_sources=(parent,))
    store.recover()
    with store.stage_copy(str(parent / output.name)) as staging:
        staged = staging.seal()
        files = pair_of(file.name for file in staged.files)
        assert files is not None, "what is copied is a pair"
        with staged.open(files.config) as config_file, staged.open(files.weights) as weights_file:
            ingested = Ingest(base.shape, limits, base.dtype).read(
                config_file, weights_file, size_bytes=staged.size_bytes, files=files
            )
        manifest = store.commit(staged, adapter_id=adapter_id, method=ingested.info.method, replace=replace)
    return manifest.digest
