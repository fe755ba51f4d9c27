"""The HTTP port beside gRPC: /metrics for Prometheus, /livez and /readyz for probes.

prometheus_client's own server gives every connection a thread for as long as it stays open, and answers every path.
Here a connection has a time limit, and a bounded number is open at a time; further ones are closed at once.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

_CONNECTIONS_MAX = 32
_CONNECTION_S = 10.0  # from accepting it to its end, whatever its client does


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: requests are too many to be news."""


class Exposition(ThreadingMixIn, WSGIServer):
    """A listening HTTP server; `start` serves until `close`.

    is_ready: whether requests would be answered now; /readyz answers 503 while it returns False.
    admits: whether a scrape with this Authorization header may read the metrics; probes need none, and learn nothing.
    """

    daemon_threads = True
    request_queue_size = _CONNECTIONS_MAX

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        is_ready: Callable[[], bool],
        admits: Callable[[str | None], bool] = lambda authorization: True,
    ) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._places = threading.BoundedSemaphore(_CONNECTIONS_MAX)
        super().__init__((host, port), _Handler)
        self._metrics: Any = make_wsgi_app(registry)
        self._is_ready = is_ready
        self._admits = admits
        self.set_app(self._answer)
        self._thread = threading.Thread(target=self.serve_forever, name="weft-exposition", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Connections that are open end by their time limit."""
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, unless too many have one."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        cut = threading.Timer(_CONNECTION_S, _cut, [request])
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors of a connection: its client went away, or sent something else than HTTP."""

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _text(start_response, "405 Method Not Allowed", "only GET is answered")
        match environ["PATH_INFO"]:
            case "/metrics" if self._admits(environ.get("HTTP_AUTHORIZATION")):
                return self._metrics(environ, start_response)
            case "/metrics":
                challenge = ("WWW-Authenticate", "Bearer")
                return _text(start_response, "401 Unauthorized", "the metrics need their bearer token", challenge)
            case "/livez":
                return _text(start_response, "200 OK", "ok")
            case "/readyz" if self._is_ready():
                return _text(start_response, "200 OK", "ok")
            case "/readyz":
                return _text(start_response, "503 Service Unavailable", "not serving")
            case _:
                return _text(start_response, "404 Not Found", "the paths are /metrics, /livez and /readyz")


def _text(start_response: Any, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [text.encode() + b"\n"]


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)
