"""A model hub on the loopback interface: the few answers of the Hugging Face hub that a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Hub:
    """The content of the hub, and the requests to it.

    repositories: for each id, for each revision a directory of files.
    gated: ids that exist and are not shown. down: beginning of the paths that are answered with 503.
    """

    repositories: Mapping[str, Mapping[str, Path]]
    gated: frozenset[str] = frozenset()
    down: str = ""
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, name: str, revision: str) -> str | None:
        """Return the commit of a revision, or of itself."""
        commits = {commit_of(name, known): commit_of(name, known) for known in self.repositories[name]}
        return {known: commit_of(name, known) for known in self.repositories[name]}.get(revision, commits.get(revision))

    def directory(self, name: str, commit: str) -> Path:
        """Return the files of a commit."""
        return next(path for known, path in self.repositories[name].items() if commit_of(name, known) == commit)


def commit_of(name: str, revision: str) -> str:
    """Return a commit's name, as long as Git's."""
    return hashlib.sha256(f"{name}@{revision}".encode()).hexdigest()[:40]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub inside the block, at `hub.endpoint`."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.down and path.startswith(self.hub.down):
            return self._fail(503, "")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        if name in self.hub.gated:
            return self._fail(403, "GatedRepo")
        if name not in self.hub.repositories:
            return self._fail(401, "RepoNotFound")
        what, revision, *rest = parts[2:] or ["revision", "main"]
        commit = self.hub.commit(name, revision)
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        directory = self.hub.directory(name, commit)
        if what == "resolve":
            return self._send((directory / rest[0]).read_bytes(), commit)
        files = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path.read_bytes())}
            for path in sorted(directory.iterdir())
        ]
        told: object = files if what == "tree" else {"id": name, "sha": commit, "siblings": []}
        return self._send(json.dumps(told).encode(), commit)

    def _send(self, content: bytes, commit: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: `asked` keeps the requests."""


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
