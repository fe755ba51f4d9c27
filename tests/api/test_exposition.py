"""The HTTP port: its paths, its probes, and connections that do nothing."""

import http.client
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Counter

from weft.api import exposition
from weft.api.exposition import Exposition


@dataclass
class _Served:
    port: int
    is_ready: bool = True

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text


@pytest.fixture
def served() -> Iterator[_Served]:
    registry = CollectorRegistry()
    Counter("weft_things", "Things.", registry=registry).inc()
    served = _Served(0)
    server = Exposition("127.0.0.1", 0, registry, lambda: served.is_ready)
    served.port = server.server_address[1]
    server.start()
    yield served
    server.close()


def test_paths(served: _Served) -> None:
    status, text = served.get("/metrics")
    assert status == 200
    assert "weft_things_total 1.0" in text
    assert served.get("/livez") == (200, "ok\n")
    assert served.get("/")[0] == served.get("/metrics/x")[0] == 404
    assert served.get("/metrics", "POST")[0] == 405


def test_a_scrape_may_need_a_token_and_a_probe_never_does() -> None:
    server = Exposition("127.0.0.1", 0, CollectorRegistry(), lambda: True, lambda header: header == "Bearer right")
    server.start()
    served = _Served(server.server_address[1])
    assert served.get("/metrics")[0] == served.get("/metrics", authorization="Bearer wrong")[0] == 401
    assert served.get("/metrics", authorization="Bearer right")[0] == 200
    assert served.get("/readyz")[0] == served.get("/livez")[0] == 200
    server.close()


def test_readiness_is_that_of_the_server(served: _Served) -> None:
    assert served.get("/readyz")[0] == 200
    served.is_ready = False
    assert served.get("/readyz") == (503, "not serving\n")
    assert served.get("/livez")[0] == 200


def test_what_is_not_http_gets_no_answer_and_hurts_nobody(served: _Served, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01" + b"\xff" * 5000 + b"\r\n\r\n")
        while connection.recv(4096):
            pass
    assert served.get("/livez")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_connection_ends_by_its_time_even_if_its_client_goes_on(
    served: _Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "_CONNECTION_S", 0.5)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        started_s, is_open = time.monotonic(), True
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        while is_open:
            try:
                connection.sendall(b"X: 1\r\n")
            except OSError:
                is_open = False
            assert time.monotonic() < started_s + 10
            time.sleep(0.05)
    assert served.get("/livez")[0] == 200


def test_connections_beyond_the_limit_are_closed_at_once(served: _Served) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(exposition._CONNECTIONS_MAX)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        assert connection.recv(1) == b""
    for connection in idle:
        connection.close()
    time.sleep(0.2)
    assert served.get("/livez")[0] == 200
