"""Lines of an audit log, which make a chain.

Each is a JSON object that ends in two hashes:

    {"seq": 7, "time": "…", "event": "rpc", …, "previous": "<digest of line 6>", "digest": "<sha256 of this line>"}

`digest` is the sha256 of the line up to it. A changed byte breaks its own line; a line that was removed, inserted or
moved breaks the next one. Whoever can write the file can also write a new chain: to detect that, or lines cut off at
the end, keep a digest elsewhere.

A server that is killed can leave the beginning of a line. It stays there, and the next start appends a line of the
event "repair" that gives its sha256 in `torn`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_SEALED = re.compile(rb'(\{"seq":[1-9]\d*,.*,"previous":"[0-9a-f]{64}"),"digest":"([0-9a-f]{64})"\}')


class Head(NamedTuple):
    """The end of a chain: number and digest of its last line."""

    seq: int
    digest: str


BEGINNING = Head(0, "0" * 64)


class BrokenChain(ValueError):
    """A file that is no unbroken chain; `line` is the number of the first wrong line, counted from 1."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")
        self.line = line


def sealed(head: Head, facts: Mapping[str, object]) -> tuple[Head, bytes]:
    """Return the line that continues the chain, with its line break, and the new end."""
    whole = {"seq": head.seq + 1, **facts, "previous": head.digest}
    content = json.dumps(whole, separators=(",", ":"))[:-1].encode()
    digest = hashlib.sha256(content).hexdigest()
    return Head(head.seq + 1, digest), content + f',"digest":"{digest}"}}\n'.encode()


def opened(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line without its line break, or None if it is not exactly one that `sealed` made."""
    found = _SEALED.fullmatch(line)
    if found is None or hashlib.sha256(found[1]).hexdigest() != found[2].decode():
        return None
    return json.loads(line)


def sha256_of(line: bytes) -> str:
    """Return the name by which a repair lists a torn line."""
    return hashlib.sha256(line).hexdigest()


def verify(lines: Iterable[bytes]) -> Head:
    """Return the end of the chain that the lines of a file make. Raises BrokenChain for the first wrong line."""
    head, torn, number = BEGINNING, [], 0
    for number, line in enumerate(lines, 1):
        content = opened(line.removesuffix(b"\n"))
        if content is None:
            torn.append(sha256_of(line.removesuffix(b"\n")))
            continue
        if torn != content.get("torn", []):
            raise BrokenChain(number - len(torn), "it was changed" if torn else "the torn lines before it are gone")
        torn = []
        if content["previous"] != head.digest or content["seq"] != head.seq + 1:
            text = (
                "the first lines are gone" if head == BEGINNING else "lines before it were removed, moved or inserted"
            )
            raise BrokenChain(number, text)
        head = Head(content["seq"], content["digest"])
    if torn:
        text = "it was changed, or a server that was killed left it and has not been started since"
        raise BrokenChain(number - len(torn) + 1, text)
    return head


def digests(lines: Iterable[bytes]) -> set[str]:
    """Return the digests of all lines, to look for one that was kept elsewhere."""
    return {content["digest"] for line in lines if (content := opened(line.removesuffix(b"\n"))) is not None}
