"""Measured text in a document: what stands between `<!-- name -->` and `<!-- /name -->` is made by a command."""

import re


def insert(text: str, document: str, name: str) -> str:
    """The document with `text` between the markers of `name`. Raises ValueError unless they are there, once."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"markdown: must hold {start} and {end} on lines of their own, once, found {count} times")
    return changed
