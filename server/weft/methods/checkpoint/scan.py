"""Checks of every method's tensors: known module, finite, in range."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import schema
from weft.methods.protocol import BaseShape, Site, SiteKind

_PEFT_PREFIX = "base_model.model."
_NAMES_SHOWN = 5
_CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries of the scan


def split_key(key: str, endings: Iterable[str]) -> tuple[str, str] | None:
    """Return (module path in the base, ending) of a tensor name; None if no ending fits. PEFT's prefix is optional."""
    for ending in endings:
        if key.endswith("." + ending):
            return key.removesuffix("." + ending).removeprefix(_PEFT_PREFIX), ending
    return None


def full_key(site_name: str, ending: str) -> str:
    """Return PEFT's tensor name of `ending` at a site."""
    return f"{_PEFT_PREFIX}{site_name}.{ending}"


def group(
    tensors: Mapping[str, Tensor], endings: tuple[str, ...], method: str, *, passing: str = ""
) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Group tensors as (key, tensor) by module and ending; `passing` is an ending that is left out."""
    by_module: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        split = split_key(key, (*endings, passing) if passing else endings)
        if split is None:
            raise refuse_unknown(key, method)
        module, ending = split
        if ending == passing:
            continue
        if ending in by_module.setdefault(module, {}):
            raise InvalidAdapter.rule(
                "PAIR_INCOMPLETE", key, "names a tensor that another name names too", given=module
            )
        by_module[module][ending] = (key, tensor)
    return by_module


def require_sites(
    names: Iterable[str], base: BaseShape, *kinds: SiteKind, method: str = "this method"
) -> dict[str, Site]:
    """Return the sites called `names`, of `kinds` (LINEAR if none is given).

    Refuses an unknown module, a file with no module in the base, and a module to which the method cannot apply.
    """
    names = sorted(set(names))
    unknown = [name for name in names if name not in base.sites]
    if len(unknown) == len(names):
        raise InvalidAdapter(
            "ADAPTER_NO_EFFECT",
            "adapter_model.safetensors: no tensor belongs to a module of the base; "
            f"names {', '.join(unknown[:_NAMES_SHOWN]) or 'none'}; "
            f"base modules look like {next(iter(base.sites), '?')}",
            field="adapter_model.safetensors",
        )
    if unknown:
        raise _module_error("modules are not in the base", unknown)
    elsewhere = [name for name in names if base.sites[name].kind not in (kinds or (SiteKind.LINEAR,))]
    if elsewhere:
        raise _module_error(f"modules are no place for {method}", elsewhere)
    return {name: base.sites[name] for name in names}


def _module_error(what: str, names: Sequence[str]) -> InvalidAdapter:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return InvalidAdapter(
        "MODULE_UNKNOWN",
        f"adapter_model.safetensors: {len(names)} {what}: {shown}",
        field="adapter_model.safetensors",
        metadata={"modules": shown},
    )


# PEFT's names of tensors saved beside an adapter or instead of one; refusing one gives advice.
_REPLACES_MODULE = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "modules_to_save.weight")
_ON_EMBEDDING = ("lora_embedding_A", "lora_embedding_B", "embed_tokens.base_layer.weight", "wte.base_layer.weight")


def refuse_unknown(key: str, method: str) -> InvalidAdapter:
    """Return the error for a tensor that `method` would leave unused."""
    if key.endswith(_ON_EMBEDDING):
        rule = "is of an adapter on the input embedding, which is not served: leave it out of target_modules"
        return InvalidAdapter.rule("FEATURE_UNSUPPORTED", key, rule, given=key)
    if key.endswith(_REPLACES_MODULE):
        rule = "replaces a module, which is not served: name lm_head and linear modules in target_modules instead"
        return InvalidAdapter.rule("FEATURE_UNSUPPORTED", key, rule, given=key)
    return InvalidAdapter.rule("TENSOR_UNKNOWN", key, f"is not a tensor of a {method} adapter", given=key)


def check_values(tensors: Mapping[str, Tensor], limits: AdapterLimits) -> None:
    """Refuse NaN, infinities and values beyond `weight_abs_max`, naming the tensor."""
    for name, tensor in tensors.items():
        largest = 0.0
        for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS):
            peak = chunk.float().abs().max().item()  # NaN wins every comparison inside max
            if not peak < float("inf"):
                raise InvalidAdapter.rule("NON_FINITE", name, "must hold finite numbers only", given=peak)
            largest = max(largest, peak)
        rule = "holds a value beyond the limit"
        schema.require_at_most(limits.weight_abs_max, largest, "WEIGHT_OUT_OF_RANGE", name, rule)


def require_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise DIM_MISMATCH unless `tensor` has the expected shape."""
    if tuple(tensor.shape) != expected:
        rule = "has another shape than the base needs"
        raise InvalidAdapter.rule("DIM_MISMATCH", name, rule, limit=list(expected), given=list(tensor.shape))


def no_effect(method: str) -> InvalidAdapter:
    """Return the error for an adapter whose delta is zero everywhere."""
    return InvalidAdapter(
        "ADAPTER_NO_EFFECT",
        f"adapter_model.safetensors: this {method} adapter changes nothing (was it saved before training?)",
        field="adapter_model.safetensors",
    )


def is_zero(tensor: Tensor) -> bool:
    """Return whether every element is exactly zero."""
    return not bool(torch.any(tensor))
