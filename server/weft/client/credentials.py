"""How a client proves who it is, and checks who the server is."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

_VARIABLES = {"ca_file": "WEFT_TLS_CA", "cert_file": "WEFT_TLS_CERT", "key_file": "WEFT_TLS_KEY", "token": "WEFT_TOKEN"}
_PLAINTEXT = "WEFT_PLAINTEXT"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The credentials of a connection. Without any, it is in plain text.

    token: sent with every call. To another machine it is sent over TLS only, unless `plaintext` is set; without
        `ca_file`, the certificate must then be of an authority that gRPC knows by itself.
    ca_file: PEM certificates of which one must have signed the server's; given, the connection is TLS.
    cert_file, key_file: the client's own certificate, for a server that requires one (mTLS).
    plaintext: send the token even in plain text to another machine.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    plaintext: bool = False

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together (WEFT_TLS_CERT, WEFT_TLS_KEY)")
        if self.plaintext and (self.ca_file or self.cert_file):
            raise ValueError("plaintext must not be given with files of TLS (WEFT_PLAINTEXT, WEFT_TLS_…)")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ValueError("token must be printable ASCII, as `weft tokens add` printed it (WEFT_TOKEN)")

    @classmethod
    def from_environment(cls) -> Self:
        """Return the credentials in WEFT_TOKEN, WEFT_TLS_CA, WEFT_TLS_CERT, WEFT_TLS_KEY and WEFT_PLAINTEXT."""
        given: dict[str, Any] = {name: os.environ.get(variable) or None for name, variable in _VARIABLES.items()}
        plaintext = os.environ.get(_PLAINTEXT, "").lower()
        if plaintext not in (*_TRUE, *_FALSE):
            raise ValueError(f"{_PLAINTEXT} must be true or false, given {plaintext!r}")
        return cls(**given, plaintext=plaintext in _TRUE)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call sends beside its request."""
        return () if self.token is None else (("authorization", f"Bearer {self.token.strip()}"),)

    def for_channel(self, server: str) -> grpc.ChannelCredentials | None:
        """Return gRPC's credentials of a connection to `server`, or None for one in plain text.

        Raises OSError for a file that cannot be read.
        """
        has_files = bool(self.ca_file or self.cert_file)
        if not has_files and (self.token is None or self.plaintext or is_this_machine(server)):
            return None
        files = (self.ca_file, self.key_file, self.cert_file)
        return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))


def is_this_machine(server: str) -> bool:
    """Return whether "host:port" is a loopback address, localhost or a socket of this machine. No name is looked up."""
    scheme, separator, rest = server.partition(":")
    if separator and scheme in ("unix", "unix-abstract"):
        return True
    host = rest.removeprefix("///") if scheme in ("dns", "ipv4", "ipv6") else server
    host = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    host = host.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
