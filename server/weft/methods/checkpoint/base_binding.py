"""Checks which base an adapter or a mixture was trained on, by digest and rotary factors, against the base served.

Other weights are refused. The same weights held in another quantization are served: the answers differ by the base's
rounding, and how the base was held in training is reported.
"""

from collections.abc import Mapping

from weft.errors import AdapterUnusable
from weft.methods.protocol import BaseShape

ROPE_FACTORS = "weft_rope_factors"
_ROPE_FACTORS_CHARACTERS_MAX = 64


def held_as(digest: object, base: BaseShape, *, file: str, name: object = None) -> str:
    """Return how the base was held in training if that differs from here, else "".

    digest: of the base trained on; None if the file names none. file: where it is recorded.
    name: the file's name for that base, if any. Raises AdapterUnusable if the weights differ.
    """
    if digest is None or digest == base.digest:
        return ""
    if isinstance(digest, str) and digest in base.same_weights:
        return base.same_weights[digest]
    trained_on = f"{base_name(name)} ({str(digest)[:12]}…)" if name else f"base {str(digest)[:12]}…"
    raise AdapterUnusable(
        "BASE_MISMATCH",
        f"{file}: trained on other weights: on {trained_on}, and this server holds {base.name} ({base.digest[:12]}…); "
        "serve the base that it was trained on, or train it on this one",
        field=file,
        metadata={"limit": base.digest, "given": digest},
    )


def rope_metadata(base: BaseShape) -> dict[str, str]:
    """Return the metadata of a weights file on the base's rotary factors: none if they do not depend on the length."""
    return {ROPE_FACTORS: base.rope_factors} if base.rope_factors else {}


def rope_factors(metadata: Mapping[str, str]) -> str:
    """Return the base's rotary factors in training if they depend on the length, else ""."""
    return metadata.get(ROPE_FACTORS, "")[:_ROPE_FACTORS_CHARACTERS_MAX]


def trained_rope_factors(metadata: Mapping[str, str], base: BaseShape) -> str:
    """Return `rope_factors` if they differ from `base`'s, else ""."""
    given = rope_factors(metadata)
    return given if base.rope_factors and given != base.rope_factors else ""


def base_name(given: object) -> str:
    """Return a base's name as a file may give it: a hub id, or just the last part of a local path, for privacy."""
    text = str(given).rstrip("/")[:256]
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "~", "/"))
    return text if is_hub_id else text.rpartition("/")[2] or "?"
