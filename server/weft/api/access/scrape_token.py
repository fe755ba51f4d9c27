"""The bearer token of whoever scrapes the metrics."""

import hashlib
import hmac
from pathlib import Path

from weft.api.access.secret_file import UnusableAccess, read

_KNOB = "metrics_token_file"
_CHARACTERS_MIN = 16
_SCHEME = "bearer"


class ScrapeToken:
    """The token in the first line of a file. Raises UnusableAccess if there is none, or others can read it."""

    def __init__(self, path: Path) -> None:
        first = read(path, _KNOB).split(b"\n", 1)[0].strip()
        if len(first) < _CHARACTERS_MIN:
            rule = f"{path} must have a token of at least {_CHARACTERS_MIN} characters in its first line"
            raise UnusableAccess(f"{_KNOB}: {rule}, given {len(first)}; make one with openssl rand -hex 32")
        self._sha256 = hashlib.sha256(first).digest()

    def admits(self, authorization: str | None) -> bool:
        """Return whether a value of the HTTP header Authorization is `Bearer` and the token, in constant time."""
        scheme, _, given = (authorization or "").partition(" ")
        is_token = hmac.compare_digest(hashlib.sha256(given.strip().encode("utf-8", "replace")).digest(), self._sha256)
        return is_token and scheme.lower() == _SCHEME
