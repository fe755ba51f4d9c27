"""Two real servers for the whole session, one with the defaults and one with small limits, and their adapters."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.server.files import Good, Parts
from tests.server.live import LiveServer, Loop, wait_until
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.store import AdapterStore
from weft.config import (
    AdapterLimits,
    EngineConfig,
    ModelConfig,
    RequestLimits,
    ResidencyConfig,
    ServerConfig,
    WeftConfig,
)
from weft.methods.protocol import BaseShape

_POISONED = itertools.count(100)
SPECIAL = "<|end|>"
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


class Sources(NamedTuple):
    """Directories of good adapters."""

    root: Path
    base: BaseShape

    def parts(self, name: str) -> Parts:
        """Return the parts of `name`: lora, ia3, prefix, prompt or ptuning, and a number, which varies the content."""
        method, _, number = name.partition("-")
        seed = int(number)
        match method:
            case "lora":
                adapter = tiny.random_lora(self.base, rank=8, seed=seed)
            case "ia3":
                adapter = tiny.random_ia3(self.base, seed=seed)
            case "prompt":
                adapter = tiny.random_prompt(self.base, length=5, seed=seed)
            case "ptuning":
                adapter = tiny.random_ptuning(self.base, length=5, seed=seed)
            case _:
                adapter = tiny.random_prefix(self.base, length=5, seed=seed)
        return Parts.of(adapter, self.base)

    def __call__(self, name: str) -> Path:
        path = self.root / name
        return path if path.exists() else self.parts(name).files().write(path)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with a special token in its vocabulary and a chat template."""
    path = tiny.save_base(tmp_path_factory.mktemp("served") / "tiny-llama")
    characters = {SPECIAL if code == 3 else chr(code): code for code in range(tiny.VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="\x00"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="\x00", eos_token=SPECIAL)
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def config(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> WeftConfig:
    """Return the defaults, except for ports, an allowed source directory, and streams with a message for every step."""
    return WeftConfig(
        model=ModelConfig(path=base_path, device="cpu", dtype="bfloat16"),
        engine=EngineConfig(stream_interval_s=0.0),
        store=tmp_path_factory.mktemp("store"),
        allowed_sources=(tmp_path_factory.mktemp("sources"),),
        server=ServerConfig(port=0, metrics_port=0, uploads_waiting_max=14),
    )


@pytest.fixture(scope="session")
def _server(loop: Loop, config: WeftConfig) -> Iterator[LiveServer]:
    live = LiveServer(loop, config)
    sources = Sources(config.allowed_sources[0], live.model.base.shape)
    for name in ("lora-1", "ia3-1", "prefix-1"):
        live.client.register(name, sources(name))
    live.watch_well((None, "lora-1", "ia3-1", "prefix-1"))
    yield live
    live.stop()


@pytest.fixture
def server(_server: LiveServer) -> Iterator[LiveServer]:
    """The server with the defaults, holding lora-1, ia3-1 and prefix-1. A test leaves it as it found it."""
    yield _server
    _check_left_clean(_server, {"lora-1", "ia3-1", "prefix-1"})


@pytest.fixture(scope="session")
def sources(_server: LiveServer) -> Sources:
    return Sources(_server.config.allowed_sources[0], _server.model.base.shape)


@pytest.fixture(scope="session")
def good(sources: Sources) -> Good:
    return Good(*(sources.parts(f"{method}-7") for method in Good._fields))


@pytest.fixture(scope="session")
def tight_config(config: WeftConfig, tmp_path_factory: pytest.TempPathFactory) -> WeftConfig:
    """Return limits that a test can reach: two requests run, two wait, two LoRAs fit; weights may have any value."""
    return replace(
        config,
        store=tmp_path_factory.mktemp("tight"),
        engine=EngineConfig(
            max_num_seqs=2,
            max_queued_requests=2,
            max_num_batched_tokens=8,
            num_kv_blocks=40,
            max_model_len=240,
            stream_interval_s=0.0,
        ),
        adapters=AdapterLimits(weight_abs_max=1e38),
        residency=ResidencyConfig(device_bytes=80 * 1024, pinned_bytes_max=80 * 1024),
        requests=RequestLimits(stream_bytes_max=16 * 6 * 128, deadline_default_s=30.0),
        server=replace(config.server, upload_idle_timeout_s=0.3, drain_timeout_s=5.0),
    )


@pytest.fixture(scope="session")
def _tight(loop: Loop, tight_config: WeftConfig, sources: Sources) -> Iterator[LiveServer]:
    live = LiveServer(loop, tight_config)
    live.client.register("lora-1", sources("lora-1"))
    live.watch_well((None, "lora-1"))
    yield live
    live.stop()


@pytest.fixture
def tight(_tight: LiveServer) -> Iterator[LiveServer]:
    """The server with small limits, holding lora-1. A test leaves it as it found it."""
    yield _tight
    _check_left_clean(_tight, {"lora-1"})


@pytest.fixture
def poison(tight: LiveServer, sources: Sources) -> Iterator[str]:
    """Yield an adapter on `tight` whose finite weights give values that are not finite, in a directory of its name.

    It has new content each time, since a server quarantines content.
    """
    parts = sources.parts(f"lora-{next(_POISONED)}")
    tensors = {name: t * 1e30 if "lora_B" in name else t for name, t in parts.tensors.items()}
    tight.client.register("poison", parts.with_tensors(tensors).write(sources.root / "poison"))
    yield "poison"
    tight.client.unregister("poison", allow_missing=True)


def _check_left_clean(live: LiveServer, adapters: set[str]) -> None:
    found = {adapter.adapter_id for adapter in live.client.list().adapters}
    for left in found - adapters:  # so that one test's failure does not fail the next one
        live.client.unregister(left, mode="UNREGISTER_MODE_CANCEL", allow_missing=True)
    assert found == adapters
    wait_until(lambda: live.staging() == [])
    wait_until(lambda: live.application.requests.admission.num_requests == 0)
    store = AdapterStore(live.config.store, live.config.adapters)
    digests = {manifest.digest for manifest in store.read_catalog().manifests.values()}
    # A removal whose caller has gone cleans up a moment after the adapter has left the catalog.
    wait_until(lambda: {path.name for path in (live.config.store / "versions").iterdir()} == digests)
    live.check_well()


@pytest.fixture
def registered(server: LiveServer) -> Iterator[Callable[[str, Path], AdapterDigest]]:
    """Yield a function that registers a source until the test ends, mixtures after experts, and returns the digest."""
    ids: list[str] = []

    def register(adapter_id: str, source: Path) -> AdapterDigest:
        digest = server.client.register(adapter_id, source).adapter.digest
        ids.append(adapter_id)
        return AdapterDigest(digest)

    yield register
    for adapter_id in reversed(ids):
        server.client.unregister(adapter_id, allow_missing=True)
