"""TLS of the gRPC port, by gRPC's own credentials. Files that change are read before the next handshake."""

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from weft.api.access.secret_file import Stamp, UnusableAccess, read, stamp_of
from weft.config import AccessConfig

_log = logging.getLogger(__name__)


class Certificates:
    """Certificate, key and, for mTLS, the authorities of clients, as the files of a configuration hold them now.

    Raises UnusableAccess if they cannot be used; files that break later leave the certificates as they are.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None) -> None:
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self._stamps = self._stamped()
        self._loaded = self._load()

    @classmethod
    def of(cls, access: AccessConfig) -> "Certificates | None":
        """Return the certificates of a configuration, or None if it has no TLS."""
        if access.tls_cert_file is None or access.tls_key_file is None:
            return None
        return cls(access.tls_cert_file, access.tls_key_file, access.tls_client_ca_file)

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which follow the files."""
        newer: Any = self._newer  # may return None, which the stubs of gRPC do not know
        has_client_ca = self._client_ca_file is not None
        return grpc.dynamic_ssl_server_credentials(self._loaded, newer, require_client_authentication=has_client_ca)

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold if they have changed; called by gRPC before each handshake."""
        stamps = self._stamped()
        if stamps == self._stamps:
            return None
        self._stamps = stamps  # from before reading, so that a change meanwhile is seen at the next handshake
        try:
            self._loaded = self._load()
        except UnusableAccess as fault:
            _log.error("%s; the certificate read before stays in use", fault)
            return None
        _log.info("tls_cert_file: read again")
        return self._loaded

    def _stamped(self) -> list[Stamp | None]:
        files = (self._cert_file, self._key_file, self._client_ca_file)
        return [stamp_of(file) for file in files if file is not None]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        certificates = read(self._cert_file, "tls_cert_file", is_secret=False)
        key = read(self._key_file, "tls_key_file")
        authorities = self._client_ca_file and read(self._client_ca_file, "tls_client_ca_file", is_secret=False)
        _check(self._cert_file, self._key_file, self._client_ca_file)
        return grpc.ssl_server_certificate_configuration([(key, certificates)], authorities)


def _check(cert_file: Path, key_file: Path, client_ca_file: Path | None) -> None:
    """Raise UnusableAccess for files that gRPC would accept, and then fail every handshake with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        rule = "must be a PEM certificate chain and its unencrypted PEM key"
        raise UnusableAccess(f"tls_cert_file, tls_key_file: {cert_file} and {key_file} {rule}: {_why(error)}") from None
    try:
        if client_ca_file is not None:
            context.load_verify_locations(client_ca_file)
    except (ssl.SSLError, OSError) as error:
        rule = "must be PEM certificates of authorities"
        raise UnusableAccess(f"tls_client_ca_file: {client_ca_file} {rule}: {_why(error)}") from None


def _no_password() -> str:
    return ""  # without this, OpenSSL asks at the terminal


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or "unreadable"
    return str(reason).replace("_", " ").lower()
