"""A store of many small adapters, made fast."""

import json
from pathlib import Path
from unittest import mock

from weft import durable
from weft.adapters.identifiers import AdapterId
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits
from weft.v1.adapter_files import PEFT_FILES


def make(root: Path, source: Path, count: int, *, info: str = "", checked_for: str = "", method: str = "ia3") -> None:
    """Bind `count` ids to copies of `source`, each with content of its own; power losses are not waited for."""
    store = AdapterStore(root, AdapterLimits())
    store.recover()
    config = json.loads((source / PEFT_FILES.config).read_bytes())
    weights = (source / PEFT_FILES.weights).read_bytes()
    nothing = mock.Mock()
    with mock.patch.object(durable, "sync", nothing), mock.patch.object(durable, "sync_directory", nothing):
        for number in range(count):
            with store.stage() as staging:
                for name, data in (
                    (PEFT_FILES.config, json.dumps({**config, "revision": str(number)}).encode()),
                    (PEFT_FILES.weights, weights),
                ):
                    with staging.open_file(name) as file:
                        file.write(data)
                store.commit(
                    staging.seal(),
                    adapter_id=AdapterId(f"many-{number:05}"),
                    method=method,
                    info=info,
                    checked_for=checked_for,
                )
