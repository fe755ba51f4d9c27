"""Quotas: what calls may hold together, so that no number of callers takes all of it."""

import contextlib
from collections.abc import Iterator

from weft.config import ServerConfig
from weft.errors import Overloaded


class Quota:
    """An amount that calls share: places or bytes. Used on the event loop.

    name: what it bounds, in errors. reason: that of the error. in_use: what is held now.
    """

    def __init__(self, name: str, most: int, reason: str) -> None:
        self._name = name
        self._most = most
        self._reason = reason
        self.in_use = 0

    @contextlib.contextmanager
    def held(self, amount: int = 1) -> Iterator[None]:
        """Hold `amount` inside the block. Raises Overloaded if it is too much, unless nothing is held."""
        if self.in_use and self.in_use + amount > self._most:
            raise Overloaded(
                self._reason,
                f"{self._name}: too many at a time (limit {self._most}), given {self.in_use + amount}; try again later",
                metadata={"quota": self._name, "limit": self._most, "given": self.in_use + amount},
                retry_after_s=1.0,
            )
        self.in_use += amount
        try:
            yield
        finally:
            self.in_use -= amount


class Quotas:
    """The quotas of one server, beside the places of generate requests (api/admission.py)."""

    def __init__(self, config: ServerConfig) -> None:
        self.prompt_bytes = Quota("prompt_bytes_waiting", config.prompt_bytes_waiting_max, "PROMPTS_FULL")
        self.tokenize_calls = Quota("tokenize_calls", config.tokenize_calls_max, "CALLS_FULL")
        self.register_calls = Quota("register_calls", config.register_calls_max, "CALLS_FULL")
        self.load_calls = Quota("load_calls", config.load_calls_max, "CALLS_FULL")
        self.watches = Quota("watches", config.watches_max, "CALLS_FULL")
        self.uploads = Quota("uploads", config.uploads_max + config.uploads_waiting_max, "UPLOADS_FULL")
        self.staging_bytes = Quota("staging_bytes", config.staging_bytes_max, "STAGING_FULL")
