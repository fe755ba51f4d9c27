"""The two files that each kind of adapter has: what it is, as JSON, and its tensors."""

from collections.abc import Iterable
from typing import NamedTuple

from weft.adapters.config_file import CONFIG_FILE
from weft.adapters.safetensors_header import WEIGHTS_FILE


class FilePair(NamedTuple):
    """Names of an adapter's files."""

    config: str
    weights: str


PEFT_FILES = FilePair(CONFIG_FILE, WEIGHTS_FILE)
MIXTURE_FILES = FilePair("mixture_config.json", "mixture_router.safetensors")
PAIRS = (PEFT_FILES, MIXTURE_FILES)
CONFIG_FILES = frozenset(pair.config for pair in PAIRS)


def pair_of(names: Iterable[str]) -> FilePair | None:
    """The pair that these files are, no more and no less."""
    listed = sorted(names)
    return next((pair for pair in PAIRS if sorted(pair) == listed), None)
