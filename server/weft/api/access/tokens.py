"""The tokens of a running server, which follow their file."""

import hmac
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from weft.api.access.principal import Principal
from weft.api.access.secret_file import UnusableAccess, stamp_of
from weft.api.access.token import Token
from weft.api.access.token_file import load

_log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_END_TIMEOUT_S = 5.0
_NO_SHA256 = "0" * 64  # of no secret: compared for an unknown id, so that it takes as long as a known one


class Tokens:
    """The tokens of a file. `refresh` and `identify` may be called by different threads.

    Raises UnusableAccess if the file cannot be used; a file that breaks later leaves the tokens as they are.
    """

    def __init__(self, path: Path, *, now_s: Callable[[], float] = time.time) -> None:
        self._path, self._now_s = path, now_s
        self._stamp = stamp_of(path)
        self._by_id = load(path)

    def __len__(self) -> int:
        return len(self._by_id)

    def identify(self, token: Token) -> Principal | None:
        """Return the caller that a token identifies; None if its id is unknown, its secret wrong, or its time over."""
        stored = self._by_id.get(token.token_id)
        has_secret = hmac.compare_digest(token.sha256, _NO_SHA256 if stored is None else stored.sha256)
        if stored is None or not has_secret or stored.has_expired(self._now_s()):
            return None
        return stored.principal

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether its tokens were taken over."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._by_id = load(self._path)
        except UnusableAccess as fault:
            _log.error("%s; the %d tokens read before stay valid", fault, len(self))
            return False
        _log.info("token_file: read again, %d tokens", len(self))
        return True


class Following:
    """A thread that refreshes tokens once a second, and at once when `hurry` is called."""

    def __init__(self, tokens: Tokens, refreshed: Callable[[], None]) -> None:
        self._tokens, self._refreshed = tokens, refreshed
        self._wake = threading.Event()
        self._has_ended = False
        self._thread = threading.Thread(target=self._follow, name="weft-tokens", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Look at the file now."""
        self._wake.set()

    def end(self) -> None:
        """Stop the thread."""
        self._has_ended = True
        self._wake.set()
        self._thread.join(_END_TIMEOUT_S)  # a file system that hangs must not keep the server from ending

    def _follow(self) -> None:
        while not self._has_ended:
            self._wake.wait(_PERIOD_S)
            self._wake.clear()
            try:
                if not self._has_ended and self._tokens.refresh():
                    self._refreshed()
            except Exception:  # a bug must not end the thread: tokens that are removed would stay valid
                _log.exception("token_file: reading it again failed")
