"""Room for pins: pinned adapters stay on the device, so they may never take all of it from the others."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.registry import Registry
from weft.api.tenant_quotas import TenantQuotas
from weft.errors import Overloaded


@dataclass(kw_only=True, eq=False)
class Pins:
    """The bytes that the pinned adapters of one server may take together; used on the event loop."""

    registry: Registry
    tenant_quotas: TenantQuotas
    bytes_max: int
    _coming: dict[AdapterDigest, int] = field(default_factory=dict[AdapterDigest, int])  # being brought to the device

    @contextlib.contextmanager
    def room(self, adapter_id: AdapterId, digest: AdapterDigest, num_bytes: int) -> Iterator[None]:
        """Keep room for a pin inside the block, in which it becomes one.

        Raises Overloaded, PINS_FULL if there is none, TENANT_QUOTA if the tenant has pinned too much already.

        Content that is pinned under several ids counts once; what `adapter_id` had pinned before does not count.
        """
        self.tenant_quotas.require_pin(adapter_id, num_bytes)
        pinned = {
            version.digest: version.info.packed_bytes
            for version in self.registry
            if version.pinned and version.adapter_id != adapter_id
        }
        pinned |= self._coming
        given = sum(pinned.values()) + (0 if digest in pinned else num_bytes)
        if given > self.bytes_max:
            text = f"pinned adapters would take too many bytes (limit {self.bytes_max}), given {given}"
            metadata = {"quota": "pinned_bytes", "limit": self.bytes_max, "given": given}
            raise Overloaded("PINS_FULL", f"pin: {text}; unpin another one", field="pin", metadata=metadata)
        before = self._coming.get(digest)
        self._coming[digest] = num_bytes
        try:
            yield
        finally:
            if before is None:
                self._coming.pop(digest, None)
