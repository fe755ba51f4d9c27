"""PEFT directories: `adapter_config.json` beside `adapter_model.safetensors`.

`read` takes parsed data (the trust boundary in weft/adapters parses it); `write` makes a directory that PEFT loads.
An adapter made by Weft names its base's digest in the safetensors metadata, and is refused on other weights.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import (
    adalora,
    base_binding,
    beft,
    bottleneck,
    ia3,
    lora,
    prefix,
    prompt,
    safetensors_file,
)
from weft.methods.protocol import Adapter, BaseShape
from weft.v1.adapter_files import CONVERT_COMMAND

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_DIGEST = "weft_base_digest"


class _Format(NamedTuple):
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], BaseShape, AdapterLimits], Adapter]
    write: Callable[[Adapter, BaseShape], tuple[dict[str, Any], dict[str, Tensor]]] | None


_FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "LORA": _Format(lora.read, lora.write),
        "ADALORA": _Format(adalora.read, None),  # read as the LoRA that it folds into
        "BEFT": _Format(beft.read, beft.write),
        "IA3": _Format(ia3.read, ia3.write),
        "PREFIX_TUNING": _Format(prefix.read, prefix.write),
        "CARTRIDGE": _Format(prefix.read, None),
        "PROMPT_TUNING": _Format(prompt.read_prompt, prompt.write_prompt),
        "P_TUNING": _Format(prompt.read_ptuning, prompt.write_ptuning),
        "BOTTLENECK": _Format(bottleneck.read, bottleneck.write),
    }
)
# The others whose updates PEFT's save_as_lora approximates.
_CONVERTIBLE = frozenset(
    {
        "C3A",
        "DELORA",
        "FOURIERFT",
        "GRALORA",
        "LOHA",
        "LOKR",
        "MISS",
        "PSOFT",
        "RANDLORA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
_XLORA_ADVICE = (
    "X-LoRA reads its scalings off a first pass through the whole base, two passes a token: register its LoRA "
    "directories by themselves, and gate them with a mixture (`weft adapters arrow`, or `weft train` with "
    "adapter.method mixture)"
)


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base: BaseShape,
    limits: AdapterLimits,
) -> Adapter:
    """The adapter that a PEFT directory holds, fitted to `base`.

    Raises InvalidAdapter naming the key or tensor that breaks a rule, AdapterUnusable where it is for another base.
    """
    require_served(config)
    trained_held_as(config, metadata, base)
    return _FORMATS[config["peft_type"]].read(config, tensors, base, limits)


def trained_held_as(config: Mapping[str, Any], metadata: Mapping[str, str], base: BaseShape) -> str:
    """How the base was held in training where that differs from `base`, else ""; refuses other weights."""
    digest, name = metadata.get(BASE_DIGEST), config.get("base_model_name_or_path")
    return base_binding.held_as(digest, base, file=WEIGHTS_FILE, name=name)


def require_served(config: Mapping[str, Any]) -> None:
    """Raise InvalidAdapter for a type that is not served, with PEFT's way to one that is, or with what is served."""
    peft_type = config.get("peft_type")
    name = peft_type if isinstance(peft_type, str) else ""
    if name in _FORMATS:
        return
    advice = f"served are {', '.join(_FORMATS)}"
    if is_adapterhub(config):
        advice = f"AdapterHub's directories are converted first: {CONVERT_COMMAND}"
    elif name == "XLORA":
        advice = _XLORA_ADVICE
    elif name in _CONVERTIBLE:
        advice = "PEFT's save_as_lora(path, model, rank=...) writes a LoRA that comes close to it"
    raise InvalidAdapter.rule(
        "FEATURE_UNSUPPORTED", "adapter_config.peft_type", f"is not served; {advice}", given=peft_type
    )


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Tell whether this is the adapter_config.json of AdapterHub's `adapters` library: PEFT's has a `peft_type`."""
    return "peft_type" not in config and "config" in config and "model_type" in config


def load(path: Path, base: BaseShape, limits: AdapterLimits) -> Adapter:
    """`read` of a directory on this machine that its user trusts. Raises OSError too, and ValueError for no JSON."""
    config = json.loads((path / CONFIG_FILE).read_text())
    with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        return read(config, tensors, file.metadata() or {}, base, limits)


def write(adapter: Adapter, directory: Path, base: BaseShape) -> None:
    """Write the two files of a PEFT directory, creating it; float32 tensors stay float32.

    The adapter is bound to `base` by its digest; a base without one binds it to none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_form = _FORMATS[adapter.method.peft_type].write
    assert write_form is not None
    keys, tensors = write_form(adapter, base)
    config = {
        "peft_type": adapter.method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        **keys,
    }
    bound = {BASE_DIGEST: base.digest} if base.digest else {}
    metadata = {"format": "pt", **bound, **base_binding.rope_metadata(base)}
    safetensors_file.write(directory / WEIGHTS_FILE, tensors, metadata)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
