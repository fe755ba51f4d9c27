"""The table of model families: those served as transformers and PEFT compute them, and those refused.

It is measured, never written by hand: `make families` makes it, and tests/families checks it.
"""

import json
from dataclasses import dataclass
from importlib.resources import files

_FILE = "families.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One tiny configuration of a family and its outcome.

    family, variant: transformers' model type, and what is particular about the configuration.
    base: "equal" or "refused".
    lora: "equal", "equal on attention" or "refused": PEFT's LoRA on all linear modules, or on those of attention alone.
    note: the refusal, as one sentence; "" if base and LoRA are equal.
    """

    family: str
    variant: str
    model_class: str
    base: str
    lora: str
    note: str


def table() -> tuple[Family, ...]:
    """Read the table that belongs to this version."""
    rows = json.loads(files("weft.model").joinpath(_FILE).read_text(encoding="utf-8"))
    return tuple(Family(**row) for row in rows)
