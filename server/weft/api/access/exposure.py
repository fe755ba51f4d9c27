"""Addresses that other machines reach: a server listens there only if it is protected or `insecure_public` is set."""

import ipaddress
import socket

from weft.api.access.secret_file import UnusableAccess
from weft.config import AccessConfig, ServerConfig

_REMEDY = """\
weft tokens add tokens.json --tenant acme --role generate --role register
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \\
    -keyout server.key -out server.crt -subj /CN=weft -addext subjectAltName=DNS:weft.example.org
weft serve … --tls-cert-file server.crt --tls-key-file server.key --token-file tokens.json"""
_METRICS_REMEDY = """\
(umask 077; openssl rand -hex 32 > scrape-token)
weft serve … --metrics-token-file scrape-token"""
_ANYWAY = "(--insecure-public listens without; then every machine that reaches the address may do everything)"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`: an address, or a name of which every address is loopback.

    A name without addresses is not: it could get one that is public.
    """
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), None) if host else []
    except (OSError, UnicodeError):
        return False
    addresses = [ipaddress.ip_address(address[0]) for *_, address in found]
    return bool(addresses) and all(_is_loopback(address) for address in addresses)


def _is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def require_safe(server: ServerConfig, access: AccessConfig) -> list[str]:
    """Return warnings about addresses that are open because `insecure_public` is set.

    Raises UnusableAccess for an address that is open otherwise, and for TLS settings that go together and are not.
    """
    if (access.tls_cert_file is None) != (access.tls_key_file is None):
        given, absent = ("cert", "key") if access.tls_key_file is None else ("key", "cert")
        raise UnusableAccess(f"tls_{absent}_file must be given with tls_{given}_file")
    if access.tls_client_ca_file is not None and access.tls_cert_file is None:
        raise UnusableAccess("tls_client_ca_file needs tls_cert_file and tls_key_file")
    warnings = []
    lacks = [
        what
        for what, file in (("TLS (tls_cert_file)", access.tls_cert_file), ("tokens (token_file)", access.token_file))
        if file is None
    ]
    if lacks and not is_loopback(server.host):
        text = f"host: {server.host} is reachable from other machines, and has no {' and no '.join(lacks)}"
        if not access.insecure_public:
            raise UnusableAccess(f"{text}; make it safe, or listen on 127.0.0.1:", hint=f"{_REMEDY}\n{_ANYWAY}")
        warnings.append(text)
    if access.metrics_token_file is None and not is_loopback(server.metrics_host):
        text = f"metrics_host: {server.metrics_host} is reachable from other machines, and has no metrics_token_file"
        if not access.insecure_public:
            hint = f"{_METRICS_REMEDY}\n{_ANYWAY}"
            raise UnusableAccess(f"{text}; give one, or listen on 127.0.0.1:", hint=hint)
        warnings.append(text)
    return warnings
