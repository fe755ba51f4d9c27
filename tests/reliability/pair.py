"""Two real server processes that share one store, on the demo base."""

from collections.abc import Sequence
from pathlib import Path

import grpc

from tests.server.live import Client
from tests.server.test_serve_process import Nursery, ServerProcess
from weft.adapters.catalog import Manifest, find_manifest
from weft.adapters.identifiers import AdapterId
from weft.adapters.versions import digest_at
from weft.v1 import adapter_pb2

ROOT = Path(__file__).parents[2]
BASE, DEMO = ROOT / "models" / "weft-demo", ROOT / "adapters_store" / "demo"
ACTIVE = adapter_pb2.ADAPTER_STATE_ACTIVE
SEEN_WITHIN_S = 1.0  # a change of one server shows on the other


def source(name: str) -> Path:
    """Return the directory of a demo adapter, such as "upper-lora"."""
    return DEMO / name


def digest(name: str) -> str:
    return digest_at(source(name))


class Pair:
    """Servers `a` and `b` over `store`; each can be restarted or killed."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self._all: list[ServerProcess] = []
        self.store = directory / "store"
        self.a, self.b = (self.begin() for _ in "ab")
        for server in (self.a, self.b):
            server.wait_ready()

    def begin(self, flags: Sequence[str] = ()) -> ServerProcess:
        """Start a server on the store, without waiting for it."""
        addresses = ("--port", "0", "--metrics-port", "0", "--device", "cpu", "--num-threads", "1")
        sources = ("--store", str(self.store), "--allowed-source", str(DEMO))
        log = self._directory / f"log-{len(self._all)}"
        server = ServerProcess(self._nursery, log, [str(BASE), *addresses, *sources, *flags])
        self._all.append(server)
        return server

    def restart_b(self, *flags: str) -> None:
        self.b.end()
        self.b = self.begin(flags)
        self.b.wait_ready()

    def manifest(self, adapter_id: str) -> Manifest | None:
        """Return what the store says, without either server."""
        return find_manifest(self.store / "catalog", AdapterId(adapter_id))

    def end(self) -> None:
        for server in self._all:
            server.end()


def listed(client: Client, adapter_id: str) -> adapter_pb2.Adapter | None:
    """Return an adapter as a server shows it, or None if the server does not know it."""
    try:
        return client.get(adapter_id)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:  # pyright: ignore[reportAttributeAccessIssue]
            return None
        raise
