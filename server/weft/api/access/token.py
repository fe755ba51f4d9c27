"""Tokens of callers: `weft_<id>_<secret>`.

The id is public: lists, audit logs and removals name it. The secret is 32 random bytes, so that one sha256 protects it:
a slow hash is for passwords, which can be guessed, and would let callers make the server work before they are known.
"""

import hashlib
import re
import secrets
from typing import NamedTuple, Self

_ID_BYTES, _SECRET_BYTES = 6, 32
_FORM = re.compile(r"weft_([0-9a-f]{12})_([0-9a-f]{64})")
ID_PATTERN = re.compile(r"[0-9a-f]{12}")


class Token(NamedTuple):
    """A token in parts."""

    token_id: str
    secret: str

    @classmethod
    def new(cls) -> Self:
        """Return a random token."""
        return cls(secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the token that `text` spells, or None if it has another form."""
        found = _FORM.fullmatch(text)
        return None if found is None else cls(found[1], found[2])

    @property
    def sha256(self) -> str:
        """What a server keeps of the secret."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def spelled(self) -> str:
        """Return the token as a caller sends it."""
        return f"weft_{self.token_id}_{self.secret}"
