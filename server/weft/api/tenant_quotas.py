"""Quotas of each tenant: what one customer may hold and use, however much the server has."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

from weft.adapters.identifiers import AdapterId, tenant_of
from weft.adapters.registry import Registry
from weft.config import TenantLimits
from weft.errors import Overloaded


class TokenBucket:
    """Tokens that may be used, refilled with time up to those of a minute.

    A use may take more than there is, because the length of an answer is known at its end; then the next use waits
    until it is paid back.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._filled_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until a request may begin, 0 if it may now."""
        gained = (now_s - self._filled_s) * self._per_minute / 60
        self._level, self._filled_s = min(self._level + gained, self._per_minute), now_s
        return max(0.0, -self._level * 60 / self._per_minute)

    def take(self, num_tokens: int) -> None:
        self._level -= num_tokens


class TenantQuotas:
    """The quotas of one server's tenants; used on the event loop. Callers without a tenant have none."""

    def __init__(self, limits: TenantLimits, registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._registry = registry
        self._clock = clock
        self._uploads: Counter[str] = Counter()
        self._buckets: dict[str, TokenBucket] = {}

    def require_adapter(self, adapter_id: AdapterId, size_bytes: int) -> None:
        """Raise Overloaded if a tenant may not have an adapter of this size under this id, which replaces its own."""
        tenant, limits = tenant_of(adapter_id), self._limits
        if not tenant or (limits.adapters_max is None and limits.adapter_bytes_max is None):
            return
        others = [one for one in self._registry.of_tenant(tenant) if one.adapter_id != adapter_id]
        _require("adapters", limits.adapters_max, len(others) + 1, "unregister one")
        given = sum(one.info.size_bytes for one in others) + size_bytes
        _require("adapter_bytes", limits.adapter_bytes_max, given, "unregister one")

    def require_pin(self, adapter_id: AdapterId, num_bytes: int) -> None:
        """Raise Overloaded if a tenant may not pin so many bytes more."""
        tenant, most = tenant_of(adapter_id), self._limits.pinned_bytes_max
        if tenant and most is not None:
            pinned = sum(
                one.info.packed_bytes
                for one in self._registry.of_tenant(tenant)
                if one.pinned and one.adapter_id != adapter_id
            )
            _require("pinned_bytes", most, pinned + num_bytes, "unpin one")

    @contextlib.contextmanager
    def upload(self, tenant: str) -> Iterator[None]:
        """Hold one of a tenant's uploads inside the block."""
        if tenant:
            _require("uploads", self._limits.uploads_max, self._uploads[tenant] + 1, "wait for one", retry_after_s=1.0)
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1
            self._uploads = +self._uploads

    def require_tokens(self, tenant: str) -> None:
        """Raise Overloaded if a tenant has used up its tokens."""
        bucket = self._bucket(tenant)
        wait_s = 0.0 if bucket is None else bucket.wait_s(self._clock())
        if wait_s > 0:
            most = self._limits.tokens_per_minute_max
            text = f"tokens_per_minute: used up (limit {most} of a tenant)"
            metadata = {"quota": "tenant_tokens_per_minute", "limit": most}
            raise Overloaded("TENANT_QUOTA", text, metadata=metadata, retry_after_s=wait_s)

    def take_tokens(self, tenant: str, num_tokens: int) -> None:
        """Count the tokens of a request that has ended: those that were computed, and the new ones."""
        bucket = self._bucket(tenant)
        if bucket is not None:
            bucket.take(num_tokens)

    def _bucket(self, tenant: str) -> TokenBucket | None:
        most = self._limits.tokens_per_minute_max
        if not tenant or most is None:
            return None
        if tenant not in self._buckets:
            self._buckets[tenant] = TokenBucket(most, self._clock())
        return self._buckets[tenant]


def _require(quota: str, most: int | None, given: int, remedy: str, *, retry_after_s: float | None = None) -> None:
    if most is not None and given > most:
        text = f"{quota}: too many (limit {most} of a tenant), given {given}; {remedy}"
        metadata = {"quota": f"tenant_{quota}", "limit": most, "given": given}
        raise Overloaded("TENANT_QUOTA", text, metadata=metadata, retry_after_s=retry_after_s)
