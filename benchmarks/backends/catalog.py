"""Every backend of the suite: which module it is, and in which environment it runs. Standard library alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.environments import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One backend.

    label: its name in tables.
    module: run as `python -m benchmarks.backends.<module>`.
    environment: None is the project's own.
    """

    label: str
    module: str
    environment: Environment | None = None


BACKENDS: Mapping[str, Entry] = MappingProxyType(
    {
        "weft": Entry(label="Weft", module="weft_grpc"),
        "weft-in-process": Entry(label="Weft, in process", module="weft_in_process"),
        "peft": Entry(label="PEFT, mixed batch", module="peft_mixed"),
        "peft-grouped": Entry(label="PEFT, one adapter at a time", module="peft_grouped"),
        "transformers": Entry(label="transformers generate_batch", module="transformers_paged"),
    }
)
