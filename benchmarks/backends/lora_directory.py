"""What the servers that know LoRA alone must know of a PEFT directory. Standard library alone."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.backends.worker import Cannot


def config(adapter: Path) -> Mapping[str, Any]:
    """Its adapter_config.json. Raises Cannot for another method, and for LoRA's variants."""
    found = json.loads((adapter / "adapter_config.json").read_text())
    if found["peft_type"] != "LORA":
        raise Cannot(f"it serves LoRA alone, and {adapter.name} is {found['peft_type']}")
    variants = [field for field in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if found.get(field)]
    if variants:
        raise Cannot(f"it is given plain LoRA alone, and {adapter.name} sets {', '.join(variants)}")
    return found


def rank_max(adapters: Iterable[Path]) -> int:
    """The largest rank of these; 0 of none. Raises Cannot as `config`."""
    return max((config(adapter)["r"] for adapter in adapters), default=0)
