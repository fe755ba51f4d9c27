"""The two files of each kind of adapter, as an upload names them: its description as JSON, and its tensors."""

from collections.abc import Iterable
from typing import NamedTuple


class FilePair(NamedTuple):
    """Names of an adapter's files."""

    config: str
    weights: str


PEFT_FILES = FilePair("adapter_config.json", "adapter_model.safetensors")
MIXTURE_FILES = FilePair("mixture_config.json", "mixture_router.safetensors")
PAIRS = (PEFT_FILES, MIXTURE_FILES)
# Weights in other libraries' formats, and formerly PEFT's; they are never read here.
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt")
_ADAPTERHUB_FILES = ("pytorch_adapter.bin", "adapter.safetensors")
FOREIGN_FILES = (*_PICKLES, *_ADAPTERHUB_FILES)
CONVERT_COMMAND = "`weft adapters convert DIR OUT --base MODEL`"
CONFIG_FILES = frozenset(pair.config for pair in PAIRS)


def foreign_refused(name: str) -> str:
    """Return the rule that `name`, one of FOREIGN_FILES, breaks, and how its owner can convert it."""
    if name in _ADAPTERHUB_FILES:
        return f"AdapterHub's directories are converted first: {CONVERT_COMMAND}"
    return (
        "safetensors only; a pickle is refused, as reading it can run code: where you trust it, convert it with "
        f"safetensors.torch.save_file(torch.load('{name}', weights_only=True), '{PEFT_FILES.weights}')"
    )


def pair_of(names: Iterable[str]) -> FilePair | None:
    """Return the pair that consists of exactly these files, if there is one."""
    listed = sorted(names)
    return next((pair for pair in PAIRS if sorted(pair) == listed), None)
