"""Everything that decides who may do what, from the configuration of a server."""

import logging
from collections.abc import Callable

import grpc.aio

from weft.api.access import exposure
from weft.api.access.audit import AuditInterceptor
from weft.api.access.audit_log import AuditLog
from weft.api.access.gate import AccessGate
from weft.api.access.scrape_token import ScrapeToken
from weft.api.access.tls import Certificates
from weft.api.access.tokens import Following, Tokens
from weft.config import AccessConfig, ServerConfig
from weft.metrics import Metrics

_log = logging.getLogger(__name__)


class Access:
    """The protection of one server; what is not configured is None.

    Raises UnusableAccess if the server must not start with these settings and the files that they name.
    """

    def __init__(self, server: ServerConfig, access: AccessConfig, metrics: Metrics) -> None:
        self._config, self._metrics = access, metrics
        self._warnings = exposure.require_safe(server, access)
        self.tokens = None if access.token_file is None else Tokens(access.token_file)
        self.certificates = Certificates.of(access)
        self.scrape_token = None if access.metrics_token_file is None else ScrapeToken(access.metrics_token_file)
        self._audit = None if access.audit_log_file is None else AuditLog(access.audit_log_file, metrics.audit_lines)
        self._following: Following | None = None

    def start(self) -> None:
        """Write the audit log and follow the token file, until `close`; warn of addresses that are open on purpose."""
        for warning in self._warnings:
            _log.warning("INSECURE (insecure_public is set): %s: whoever reaches it may do everything", warning)
        if self._audit is not None:
            self._audit.start()
        if self.tokens is not None:
            self._following = Following(self.tokens, self._refreshed)

    def interceptors(self, digest_of: Callable[[str], str]) -> list[grpc.aio.ServerInterceptor]:
        """Return the interceptors that let calls in and record changes, in their order.

        digest_of: returns the current digest of an adapter id, or "".
        """
        gate = AccessGate(self.tokens, lambda reason: self._metrics.access_refusals.labels(reason).inc())
        return [gate] if self._audit is None else [gate, AuditInterceptor(self._audit, digest_of)]

    def admits_scrape(self, authorization: str | None) -> bool:
        """Return whether a scrape with this HTTP header may read the metrics."""
        return self.scrape_token is None or self.scrape_token.admits(authorization)

    def record(self, event: str, **facts: object) -> None:
        """Add a line to the audit log, if there is one."""
        if self._audit is not None:
            self._audit.record(event, **facts)

    def hurry(self) -> None:
        """Look at the token file now instead of within a second."""
        if self._following is not None:
            self._following.hurry()

    def close(self) -> None:
        """Stop following, and write what the audit log still has to."""
        if self._following is not None:
            self._following.end()
        if self._audit is not None:
            self._audit.close()

    def described(self) -> str:
        """Return what protects the server, in one line, or "" if nothing does."""
        parts = []
        if self.certificates is not None:
            parts.append("TLS" if self._config.tls_client_ca_file is None else "TLS with client certificates")
        if self.tokens is not None:
            parts.append(f"{len(self.tokens)} tokens")
        if self._audit is not None:
            parts.append(f"audit log {self._config.audit_log_file}")
        return ", ".join(parts)

    def _refreshed(self) -> None:
        self.record("tokens", num_tokens=0 if self.tokens is None else len(self.tokens))
