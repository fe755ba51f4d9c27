"""Certificates and tokens of the tests, and servers in this process that use them."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Sources, base_path, loop  # noqa: F401  (fixtures)
from tests.server.live import LiveServer, Loop
from tests.server.test_serve_process import Nursery, Started
from weft.api.access import token_file
from weft.api.access.principal import Role
from weft.api.access.token import Token
from weft.config import AccessConfig, EngineConfig, ModelConfig, ServerConfig, WeftConfig

ROLES: dict[str, tuple[str, frozenset[Role]]] = {
    "generate": ("acme", frozenset({Role.GENERATE})),
    "register": ("acme", frozenset({Role.REGISTER})),
    "both": ("acme", frozenset({Role.GENERATE, Role.REGISTER})),
    "admin": ("ops", frozenset({Role.ADMIN})),
}


def openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the tests."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    def sign(self, name: str, *, days: int = 2) -> tuple[Path, Path]:
        """Return certificate and key of `name` for 127.0.0.1; with negative days it has expired."""
        cert, key, request = (self.directory / f"{name}.{end}" for end in ("crt", "key", "csr"))
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", *curve, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions = self.directory / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        signer = ("-CA", self.certificate, "-CAkey", self.directory / "ca.key", "-CAcreateserial")
        openssl("x509", "-req", "-in", request, *signer, "-days", str(days), "-extfile", extensions, "-out", cert)
        return cert, key


def authority(directory: Path) -> Authority:
    directory.mkdir()
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    files = ("-keyout", directory / "ca.key", "-out", directory / "ca.crt")
    openssl("req", "-x509", *curve, "-days", "2", *files, "-subj", "/CN=tests")
    return Authority(directory)


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca") / "good")


@pytest.fixture(scope="session")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca") / "other")


def stored(token: Token, tenant: str = "acme", roles: frozenset[Role] = frozenset(Role), **fields: Any) -> Any:
    now = datetime.now(UTC)
    given = {"token_id": token.token_id, "sha256": token.sha256, "created": now, "expires": None}
    return token_file.StoredToken(tenant=tenant, roles=roles, **(given | fields))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Token]:
    """Tokens by the names of `ROLES`, of one that has expired, and of one that is in no file."""
    return {name: Token.new() for name in (*ROLES, "expired", "unknown")}


@pytest.fixture(scope="session")
def tokens_path(tokens: dict[str, Token], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    for name, (tenant, roles) in ROLES.items():
        token_file.add(path, stored(tokens[name], tenant, roles))
    ended = datetime.now(UTC) - timedelta(seconds=1)
    token_file.add(path, stored(tokens["expired"], expires=ended))
    return path


def bearer(token: Token | str) -> tuple[tuple[str, str], ...]:
    """Return the metadata with which a caller presents a token."""
    return (("authorization", f"Bearer {token.spelled() if isinstance(token, Token) else token}"),)


@pytest.fixture(scope="session")
def protected(
    loop: Loop,  # noqa: F811
    base_path: Path,  # noqa: F811
    tokens_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    """A server on loopback with tokens, an audit log, an adapter called lora, and no TLS."""
    directory = tmp_path_factory.mktemp("protected")
    config = WeftConfig(
        model=ModelConfig(path=base_path, device="cpu", dtype="bfloat16"),
        engine=EngineConfig(stream_interval_s=0.0),
        store=directory / "store",
        allowed_sources=(directory / "sources",),
        server=ServerConfig(port=0, metrics_port=0),
        access=AccessConfig(token_file=tokens_path, audit_log_file=directory / "audit.log"),
    )
    (directory / "sources").mkdir()
    live = LiveServer(loop, config)
    Sources(config.allowed_sources[0], live.model.base.shape)("lora-1")
    yield live
    live.stop()


@pytest.fixture(scope="session")
def sources(protected: LiveServer) -> Sources:
    return Sources(protected.config.allowed_sources[0], protected.model.base.shape)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def start(
    nursery: Nursery,
    base_path: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Started]:
    started = Started(nursery, base_path, tmp_path_factory.mktemp("processes"))
    yield started
    started.end()
