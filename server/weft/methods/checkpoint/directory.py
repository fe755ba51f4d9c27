"""PEFT directories: `adapter_config.json` beside `adapter_model.safetensors`.

`read` takes parsed data (the trust boundary in weft/adapters parses it); `write` makes a directory that PEFT loads.
An adapter made by Weft names its base's digest in the safetensors metadata, and is refused on other weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.catalog import METHODS
from weft.methods.checkpoint import base_binding, safetensors_file, schema
from weft.methods.protocol import Adapter, BaseShape, Format, Method
from weft.v1.adapter_files import CONVERT_COMMAND

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_DIGEST = "weft_base_digest"


# Types whose updates PEFT's save_as_lora approximates; not looked up for a type that is served.
_CONVERTIBLE = schema.words(
    "C3A DELORA FOURIERFT GRALORA LOHA LOKR MISS PSOFT RANDLORA TINYLORA UNILORA VBLORA VERA WAVEFT"
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
    """Return the adapter of a PEFT directory, fitted to `base`.

    Raises InvalidAdapter naming the key or tensor that breaks a rule, AdapterUnusable if it is for another base.
    """
    method, form = form_of(config)
    trained_held_as(config, metadata, base)
    schema.check(config, form.schema, limits)
    return Adapter(method=method, **form.read(config, tensors, base, limits)._asdict())


def trained_held_as(config: Mapping[str, Any], metadata: Mapping[str, str], base: BaseShape) -> str:
    """Return how the base was held in training if that differs from `base`, else ""; refuses other weights."""
    digest, name = metadata.get(BASE_DIGEST), config.get("base_model_name_or_path")
    return base_binding.held_as(digest, base, file=WEIGHTS_FILE, name=name)


def form_of(config: Mapping[str, Any]) -> tuple[Method, Format]:
    """Return the method that reads the file, and its format: one whose switch is on comes before one that has none.

    Raises InvalidAdapter for a type that is not served, with the way to convert it, or with the types that are.
    """
    peft_type = config.get("peft_type")
    forms = [(method, form) for method in METHODS.values() for form in method.formats]
    for method, form in sorted(forms, key=lambda found: not found[1].switch):
        if form.peft_type == peft_type and (not form.switch or config.get(form.switch) is True):
            return method, form
    advice = f"served are {', '.join(dict.fromkeys(form.peft_type for _, form in forms))}"
    if is_adapterhub(config):
        advice = f"AdapterHub's directories are converted first: {CONVERT_COMMAND}"
    elif peft_type == "XLORA":
        advice = _XLORA_ADVICE
    elif isinstance(peft_type, str) and peft_type in _CONVERTIBLE:
        advice = "PEFT's save_as_lora(path, model, rank=...) writes a LoRA that comes close to it"
    raise InvalidAdapter.rule(
        "FEATURE_UNSUPPORTED", "adapter_config.peft_type", f"is not served; {advice}", given=peft_type
    )


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Return whether this is the adapter_config.json of AdapterHub's `adapters` library: PEFT's has a `peft_type`."""
    return "peft_type" not in config and "config" in config and "model_type" in config


def load(path: Path, base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Read a directory on this machine that its user trusts. Raises also OSError, and ValueError if it is not JSON."""
    config = json.loads((path / CONFIG_FILE).read_text())
    with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        return read(config, tensors, file.metadata() or {}, base, limits)


def write(adapter: Adapter, directory: Path, base: BaseShape) -> None:
    """Write the two files of a PEFT directory, creating it; float32 tensors stay float32.

    The adapter is bound to `base` by its digest, or to no base if `base` has none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    assert adapter.method.write is not None
    keys, tensors = adapter.method.write(adapter, base)
    config = {
        "peft_type": adapter.method.formats[0].peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        **keys,
    }
    bound = {BASE_DIGEST: base.digest} if base.digest else {}
    metadata = {"format": "pt", **bound, **base_binding.rope_metadata(base)}
    safetensors_file.write(directory / WEIGHTS_FILE, tensors, metadata)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
