"""TLS and mTLS by real handshakes, certificates that change, and files that cannot be used."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.access.conftest import Authority, openssl
from tests.server.live import WAIT_S, LiveServer, Loop
from weft.api.access.secret_file import UnusableAccess
from weft.api.access.tls import Certificates
from weft.api.access.token import Token
from weft.client import AsyncClient, Client, Credentials, RpcFailure
from weft.config import AccessConfig, EngineConfig, ModelConfig, ServerConfig, WeftConfig

HEALTH = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()


def secure(port: int, ca: Authority, client: tuple[Path, Path] | None = None) -> grpc.Channel:
    cert, key = (None, None) if client is None else (path.read_bytes() for path in client)
    credentials = grpc.ssl_channel_credentials(ca.certificate.read_bytes(), key, cert)
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials)


def health(channel: grpc.Channel) -> str:
    """Return SERVING, or how the call failed."""
    with channel:
        try:
            answer = channel.unary_unary(HEALTH)(b"", timeout=WAIT_S)
        except grpc.RpcError as error:
            return error.code().name  # pyright: ignore[reportAttributeAccessIssue]
    assert answer == SERVING
    return "SERVING"


def started(loop: Loop, base_path: Path, directory: Path, **access: Any) -> LiveServer:
    config = WeftConfig(
        model=ModelConfig(path=base_path, device="cpu", dtype="bfloat16"),
        engine=EngineConfig(stream_interval_s=0.0),
        store=directory / "store",
        server=ServerConfig(port=0, metrics_port=0),
        access=AccessConfig(**access),
    )
    return LiveServer(loop, config)


@pytest.fixture(scope="module")
def files(ca: Authority, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of the server, which tests replace."""
    directory = tmp_path_factory.mktemp("server")
    for source, name in zip(ca.sign("server"), ("tls.crt", "tls.key"), strict=True):
        shutil.copy(source, directory / name)
    return directory / "tls.crt", directory / "tls.key"


@pytest.fixture(scope="module")
def tls(
    loop: Loop, base_path: Path, files: tuple[Path, Path], tokens_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    cert, key = files
    made = tmp_path_factory.mktemp("tls")
    live = started(loop, base_path, made, tls_cert_file=cert, tls_key_file=key, token_file=tokens_path)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def mtls(
    loop: Loop, base_path: Path, ca: Authority, tokens_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    cert, key = ca.sign("mtls-server")
    files = {"tls_cert_file": cert, "tls_key_file": key, "tls_client_ca_file": ca.certificate}
    live = started(loop, base_path, tmp_path_factory.mktemp("mtls"), token_file=tokens_path, **files)
    yield live
    live.stop()


def test_only_tls_is_spoken_and_only_with_a_trusted_certificate(
    tls: LiveServer, ca: Authority, other_ca: Authority
) -> None:
    port = tls.serving.port
    assert health(secure(port, ca)) == "SERVING"
    assert health(secure(port, other_ca)) == "UNAVAILABLE"
    assert health(grpc.insecure_channel(f"127.0.0.1:{port}")) == "UNAVAILABLE"
    assert tls.serving.access.described().startswith("TLS, ")


def test_a_client_certificate_is_required(mtls: LiveServer, ca: Authority, other_ca: Authority) -> None:
    """Row 96: no certificate, an expired one, one of another authority. No RPC is seen by the server."""
    port = mtls.serving.port

    def num_rpcs() -> float:
        return sum(sample.value for sample in mtls.scrape()["weft_rpcs"].samples)

    assert health(secure(port, ca, ca.sign("client"))) == "SERVING"
    before = num_rpcs()
    assert health(secure(port, ca)) == "UNAVAILABLE"
    assert health(secure(port, ca, ca.sign("ended", days=-1))) == "UNAVAILABLE"
    assert health(secure(port, ca, other_ca.sign("stranger"))) == "UNAVAILABLE"
    assert num_rpcs() == before
    assert health(secure(port, ca, ca.sign("client-2"))) == "SERVING"
    assert num_rpcs() == before + 1


def test_a_client_certificate_is_no_token(mtls: LiveServer, ca: Authority, tokens: dict[str, Token]) -> None:
    cert, key = ca.sign("client-3")
    server = f"127.0.0.1:{mtls.serving.port}"
    files: Any = {"ca_file": ca.certificate, "cert_file": cert, "key_file": key}
    with Client(server, credentials=Credentials(**files)) as client, pytest.raises(RpcFailure) as failure:
        client.adapters()
    assert failure.value.failure.reason == "TOKEN_MISSING"
    credentials = Credentials(**files, token=tokens["generate"].spelled())
    with Client(server, credentials=credentials) as client:
        assert client.adapters() == []
        assert client.generate("warp", max_new_tokens=2).finish.usage.completion_tokens == 2
        with client.stream("warp", max_new_tokens=2) as answer:
            assert list(answer)


async def test_the_client_for_asyncio(tls: LiveServer, ca: Authority, tokens: dict[str, Token], tmp_path: Path) -> None:
    credentials = Credentials(ca_file=ca.certificate, token=tokens["both"].spelled())
    async with AsyncClient(f"127.0.0.1:{tls.serving.port}", credentials=credentials) as client:
        assert await client.adapters() == []
        with pytest.raises(FileNotFoundError):
            await client.upload("any", tmp_path)  # on a connection of its own, in a thread
        stream = client.stream("warp", max_new_tokens=2)
        assert [part async for part in stream]


def test_a_renewed_certificate_is_taken_without_a_restart(
    tls: LiveServer, files: tuple[Path, Path], ca: Authority, other_ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    port, before = tls.serving.port, [path.read_bytes() for path in files]

    def replaced(contents: list[bytes]) -> None:
        for path, content in zip(files, contents, strict=True):
            staged = path.with_suffix(".new")
            staged.write_bytes(content)
            staged.chmod(0o600)
            staged.rename(path)

    assert health(secure(port, ca)) == "SERVING"
    renewed = [path.read_bytes() for path in other_ca.sign("renewed")]
    replaced(renewed)
    assert health(secure(port, other_ca)) == "SERVING"
    assert health(secure(port, ca)) == "UNAVAILABLE"
    replaced([renewed[0], before[1]])  # a certificate and the key of another
    assert health(secure(port, other_ca)) == "SERVING"
    assert "the certificate read before stays in use" in caplog.text
    replaced(before)
    assert health(secure(port, ca)) == "SERVING"


def test_files_that_cannot_be_used_are_named(ca: Authority, other_ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.sign("named")
    _, other_key = other_ca.sign("another")
    encrypted, garbage, shared = tmp_path / "encrypted.key", tmp_path / "garbage", tmp_path / "shared.key"
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", encrypted)
    garbage.write_text("garbage")
    garbage.chmod(0o600)
    shutil.copy(key, shared)
    shared.chmod(0o644)
    started_s = time.monotonic()
    for files, says in (
        ((cert, other_key, None), "tls_cert_file, tls_key_file: .*: key values mismatch"),
        ((cert, encrypted, None), "tls_cert_file, tls_key_file: .* unencrypted"),
        ((garbage, key, None), "tls_cert_file, tls_key_file: .* must be a PEM certificate chain"),
        ((cert, garbage, None), "tls_cert_file, tls_key_file: "),
        ((tmp_path / "absent", key, None), "tls_cert_file: .*absent cannot be read: No such file"),
        ((cert, tmp_path / "absent", None), "tls_key_file: .*absent cannot be read: No such file"),
        ((cert, shared, None), "tls_key_file: .* mode 0644; run chmod 600"),
        ((cert, key, garbage), "tls_client_ca_file: .* must be PEM certificates of authorities"),
        ((cert, key, tmp_path / "absent"), "tls_client_ca_file: .* No such file"),
    ):
        with pytest.raises(UnusableAccess, match=says):
            Certificates(*files)
    assert time.monotonic() - started_s < 5, "OpenSSL asked for a password"
    assert Certificates(cert, key, ca.certificate)  # control
