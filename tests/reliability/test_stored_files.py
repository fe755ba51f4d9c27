"""Stored files that are cut or cannot be read while an adapter is read: a typed error, never the end of the process."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.bases import Bases
from tests.server.conftest import Sources
from weft.adapters import ingest as ingest_module
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.ingest import Ingest
from weft.adapters.loader import AdapterLoader, HostCache
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits
from weft.errors import DataLoss, Unavailable
from weft.methods.protocol import BaseShape
from weft.metrics import Metrics

KEPT_BYTES = 4096  # of a file that is cut


class Stored:
    """One adapter in a store, and a loader that reads it."""

    def __init__(self, root: Path, shape: BaseShape) -> None:
        store = AdapterStore(root / "store", AdapterLimits(), allowed_sources=[root])
        store.recover()
        with store.stage_copy(str(Sources(root, shape)("lora-1"))) as staging:
            self.digest = store.commit(staging.seal(), adapter_id=AdapterId("one"), method="lora").digest
        self.weights = root / "store" / "versions" / self.digest / WEIGHTS_FILE
        self.loader = AdapterLoader(
            store=store,
            ingest=Ingest(shape, AdapterLimits(), torch.float32),
            host=HostCache(1 << 20),
            workers=cast(Any, None),
            metrics=Metrics(),
        )

    def cut(self) -> None:
        os.truncate(self.weights, KEPT_BYTES)


@pytest.fixture
def stored(tmp_path: Path, shape: BaseShape) -> Stored:
    return Stored(tmp_path, shape)


def test_a_file_that_is_cut_between_hash_and_use_is_data_loss(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored.loader.read(stored.digest).info.method == "lora"
    assert stored.weights.stat().st_size > KEPT_BYTES, "cutting changes nothing"
    read_header = cast(Any, ingest_module).read_header

    def cut_after(*arguments: object, **options: object) -> object:
        header = read_header(*arguments, **options)
        stored.cut()
        return header

    monkeypatch.setattr(ingest_module, "read_header", cut_after)
    with pytest.raises(DataLoss, match="was cut") as caught:
        stored.loader.read(stored.digest)
    assert caught.value.reason == "BLOB_CORRUPT"
    with pytest.raises(DataLoss, match="no longer have its digest"):
        stored.loader.read(stored.digest)


def test_a_file_that_is_cut_before_its_header_is_read_is_data_loss(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_header = cast(Any, ingest_module).read_header

    def cut_before(*arguments: object, **options: object) -> object:
        stored.cut()
        return read_header(*arguments, **options)

    monkeypatch.setattr(ingest_module, "read_header", cut_before)
    with pytest.raises(DataLoss, match="changed while they were read"):
        stored.loader.read(stored.digest)


def test_a_disk_that_fails_is_not_the_end(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes, so the adapter is unavailable, not lost."""

    def fail(*arguments: object, **options: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/secret/path")

    monkeypatch.setattr(ingest_module, "read_header", fail)
    with pytest.raises(Unavailable, match="EIO") as caught:
        stored.loader.read(stored.digest)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert "secret" not in caught.value.message


def test_files_that_another_server_removed_are_looked_for_again(stored: Stored) -> None:
    absent = AdapterDigest("0" * 64)
    with pytest.raises(Unavailable) as caught:
        stored.loader.read(absent)
    assert (caught.value.reason, caught.value.retry_after_s) == ("ADAPTER_CHANGED", 0.5)


# T26 as it was run: the weights are cut when the tensors are about to be interpreted

CHILD = """
import sys
from pathlib import Path
from tests.bases import Bases
from tests.reliability import test_stored_files as tests

tests.read_while_cut(Path(sys.argv[1]), Bases(Path(sys.argv[1]) / "bases"))
"""


def read_while_cut(root: Path, bases: Bases) -> None:
    """Read an adapter whose file is cut just before its tensors are checked."""
    stored = Stored(root, bases().shape)
    read = cast(Any, ingest_module).directory.read

    def cut(*arguments: object, **options: object) -> object:
        stored.cut()
        return read(*arguments, **options)

    cast(Any, ingest_module).directory.read = cut
    print(stored.loader.read(stored.digest).info.method)


def test_the_process_outlives_a_file_that_shrinks(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "lora"), ended


def test_a_weights_file_is_held_once(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading needs one buffer of the file's size, of which every tensor is a view."""
    seen: list[torch.Tensor] = []
    read = cast(Any, ingest_module).directory.read

    def note(config: object, tensors: dict[str, torch.Tensor], *arguments: object) -> object:
        seen.extend(tensors.values())
        return read(config, tensors, *arguments)

    monkeypatch.setattr(cast(Any, ingest_module).directory, "read", note)
    stored.loader.read(stored.digest)
    begin = min(tensor.data_ptr() for tensor in seen)
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in seen)
    assert end - begin <= stored.weights.stat().st_size
