"""Which base an adapter or a mixture was trained on, by digest, and whether that is the one here.

Other weights are refused. The same weights held in another quantization serve: the answers differ by the base's
rounding, and how the base was held in training is reported.
"""

from weft.errors import AdapterUnusable
from weft.methods.protocol import BaseShape


def held_as(digest: object, base: BaseShape, *, file: str, name: object = None) -> str:
    """How the base was held in training where that differs from here, else "".

    digest: of the base trained on, None where the file names none. file: where it stands.
    name: what the file calls that base, if anything. Raises AdapterUnusable where its weights are others.
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


def base_name(given: object) -> str:
    """A base as a file names it: a hub id, or the last part of a local path, whose rest is nobody's business."""
    text = str(given).rstrip("/")[:256]
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "~", "/"))
    return text if is_hub_id else text.rpartition("/")[2] or "?"
