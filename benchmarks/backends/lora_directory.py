"""PEFT directories, for servers that support only LoRA. Standard library only."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.backends.worker import Cannot


def config(adapter: Path) -> Mapping[str, Any]:
    """Return the directory's adapter_config.json. Raises Cannot for another method, and for variants of LoRA."""
    found = json.loads((adapter / "adapter_config.json").read_text())
    if found["peft_type"] != "LORA":
        raise Cannot(f"it serves LoRA alone, and {adapter.name} is {found['peft_type']}")
    variants = [field for field in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if found.get(field)]
    if variants:
        raise Cannot(f"it is given plain LoRA alone, and {adapter.name} sets {', '.join(variants)}")
    return found


def rank_max(adapters: Iterable[Path]) -> int:
    """Return the largest rank of these adapters, or 0 if there are none. Raises Cannot as `config`."""
    return max((config(adapter)["r"] for adapter in adapters), default=0)
