"""Addresses that other machines reach end the start unless they are protected; protected servers as processes."""

import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.access.conftest import Authority, bearer, stored
from tests.server.live import WAIT_S, wait_until
from tests.server.test_serve_process import ServerProcess, Started
from weft.api.access import token_file
from weft.api.access.access import Access
from weft.api.access.exposure import is_loopback, require_safe
from weft.api.access.scrape_token import ScrapeToken
from weft.api.access.secret_file import UnusableAccess
from weft.api.access.token import Token
from weft.config import AccessConfig, ServerConfig
from weft.metrics import Metrics
from weft.v1 import adapter_service_pb2 as pb
from weft.v1.adapter_service_pb2_grpc import AdapterServiceStub

TLS: dict[str, Any] = {"tls_cert_file": "/x.crt", "tls_key_file": "/x.key"}
SAFE: dict[str, Any] = {**TLS, "token_file": "/tokens.json"}


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::]", False),
        ("::ffff:0.0.0.0", False),
        ("10.1.2.3", False),
        ("fe80::1", False),
        ("", False),
        ("0", False),  # the C library reads this as 0.0.0.0
        ("no.such.name.invalid", False),
        ("\ud800", False),
    ],
)
def test_which_addresses_are_loopback(host: str, wanted: bool) -> None:
    assert is_loopback(host) is wanted


def test_a_name_is_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for addresses, wanted in ((("127.0.0.1", "::1"), True), (("127.0.0.1", "10.0.0.1"), False), (("10.0.0.1",), False)):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr("weft.api.access.exposure.socket.getaddrinfo", lambda *_, found=found: found)
        assert is_loopback("weft.example.org") is wanted


@pytest.mark.parametrize(
    ("server", "access", "says"),
    [
        ({"host": "0.0.0.0"}, {}, r"host: 0\.0\.0\.0 is reachable .* no TLS \(tls_cert_file\) and no tokens"),
        ({"host": "::"}, TLS, r"host: :: is reachable .* has no tokens \(token_file\)"),
        ({"host": "0.0.0.0"}, {"token_file": "/t"}, r"has no TLS \(tls_cert_file\);"),
        ({"metrics_host": "0.0.0.0"}, {}, "metrics_host: .* no metrics_token_file"),
        ({"host": "0.0.0.0", "metrics_host": "0.0.0.0"}, SAFE, "metrics_host: "),
        ({}, {"tls_cert_file": "/x"}, "tls_key_file must be given with tls_cert_file"),
        ({}, {"tls_key_file": "/x"}, "tls_cert_file must be given with tls_key_file"),
        ({}, {"tls_client_ca_file": "/x"}, "tls_client_ca_file needs"),
    ],
)
def test_what_is_refused(server: dict[str, str], access: dict[str, Any], says: str) -> None:
    with pytest.raises(UnusableAccess, match=says):
        require_safe(ServerConfig(**server), AccessConfig(**access))
    if server:
        is_open = AccessConfig(**access, insecure_public=True)
        assert require_safe(ServerConfig(**server), is_open), "there is a warning"


@pytest.mark.parametrize("knob", ["token_file", "metrics_token_file", "audit_log_file"])
def test_a_file_that_is_not_there_is_refused_by_name(knob: str, tmp_path: Path) -> None:
    access = AccessConfig(**{knob: tmp_path / "absent" / "file"})
    with pytest.raises(UnusableAccess, match=rf"^{knob}: .*file cannot be .*: No such file"):
        Access(ServerConfig(), access, Metrics())


def test_what_is_not_refused() -> None:
    everywhere = ServerConfig(host="0.0.0.0", metrics_host="0.0.0.0")
    assert require_safe(everywhere, AccessConfig(**SAFE, metrics_token_file=Path("/scrape"))) == []
    assert require_safe(ServerConfig(), AccessConfig()) == []


def test_an_address_that_is_open_on_purpose_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing listens here: tests open no port to other machines."""
    everywhere = ServerConfig(host="0.0.0.0", metrics_host="0.0.0.0")
    access = Access(everywhere, AccessConfig(insecure_public=True), Metrics())
    access.start()
    access.close()
    assert caplog.text.count("INSECURE") == 2
    caplog.clear()
    Access(ServerConfig(), AccessConfig(insecure_public=True), Metrics()).start()
    assert caplog.text == ""


def test_the_scrape_token(tmp_path: Path) -> None:
    path = tmp_path / "scrape-token"
    path.write_text("f00f" * 8 + "\nthe second line is a remark\n")
    path.chmod(0o600)
    token = ScrapeToken(path)
    assert token.admits("Bearer " + "f00f" * 8)
    assert token.admits("bearer " + "f00f" * 8)
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "f00f" * 8,
        "Basic " + "f00f" * 8,
        "Bearer " + "f00f" * 7,
        "Bearer \ud800",
    ):
        assert not token.admits(wrong), wrong
    path.write_text("short\n" + "f" * 64)
    with pytest.raises(
        UnusableAccess, match=r"metrics_token_file: .* at least 16 characters in its first line, given 5"
    ):
        ScrapeToken(path)


# Real processes.


def test_an_open_address_ends_the_start(start: Started) -> None:
    """Nothing is loaded before, and the text shows what makes it safe."""
    process = start("--host", "0.0.0.0")
    assert process.exit_code() == 2, process.log
    for text in (
        "host: 0.0.0.0 is reachable",
        "weft tokens add",
        "openssl req",
        "--tls-cert-file",
        "--insecure-public",
    ):
        assert text in process.log
    assert "Traceback" not in process.log
    assert "loading" not in process.log


def listing(process: ServerProcess, ca: Authority, metadata: Any = ()) -> str:
    credentials = grpc.ssl_channel_credentials(ca.certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{process.port}", credentials) as channel:
        try:
            AdapterServiceStub(channel).ListAdapters(pb.ListAdaptersRequest(), timeout=WAIT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name  # pyright: ignore[reportAttributeAccessIssue]
    return "OK"


def test_a_protected_server(start: Started, ca: Authority, tmp_path: Path) -> None:
    """TLS, tokens and an audit log in a process of its own; SIGHUP, SIGKILL and a start after it."""
    cert, key = ca.sign("process")
    token, path, audit = Token.new(), tmp_path / "tokens.json", tmp_path / "audit.log"
    token_file.add(path, stored(token))
    files = ("--tls-cert-file", cert, "--tls-key-file", key, "--token-file", path, "--audit-log-file", audit)
    process = start(*map(str, files))
    process.wait_ready()
    assert "access   TLS, 1 tokens, audit log" in process.log
    assert listing(process, ca) == "UNAUTHENTICATED"
    assert listing(process, ca, bearer(token)) == "OK"
    second = Token.new()
    token_file.add(path, stored(second))
    process.signal(signal.SIGHUP)
    wait_until(lambda: listing(process, ca, bearer(second)) == "OK")
    assert process.is_alive
    wait_until(lambda: '"event":"tokens"' in audit.read_text())
    process.signal(signal.SIGKILL)
    process.exit_code()
    with audit.open("ab") as torn:
        torn.write(b'{"seq":3,"ti')
    again = start(*map(str, files))
    again.wait_ready()
    again.signal(signal.SIGTERM)
    assert again.exit_code() == 0
    events = [line.partition('"event":"')[2].partition('"')[0] for line in audit.read_text().splitlines()]
    assert events == ["start", "tokens", "", "repair", "start", "stop"]
