"""The closed schema of PEFT's adapter_config.json: the values that each key may have, per peft_type.

A key is *used* (its value enters the mathematics or is checked), *inert* (PEFT writes it; it means nothing for a
finished adapter, so any value passes), or *fixed* (another value changes the mathematics, and is refused by name).
A key in none of these lists (a later PEFT's) passes if its value switches nothing on, or if the operator allows it.
Patterns are never compiled: the tensor names decide which modules an adapter touches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter, shown

_FORBIDDEN = "CONFIG_FIELD_FORBIDDEN"
_UNSUPPORTED = "FEATURE_UNSUPPORTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Keys of one peft_type.

    fixed: maps a key to the values that leave the mathematics alone. advice: the alternative to any other value.
    """

    used: frozenset[str]
    inert: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)


# The alternative, if another value of a fixed key is given.
_ADVICE: Mapping[str, str] = {
    "modules_to_save": "whole modules are not replaced: name lm_head and linear modules in target_modules instead",
    "trainable_token_indices": "rows of the embedding are not replaced: train without it",
    "target_parameters": "bare parameters, such as fused experts, have no adapters: name linear modules in "
    "target_modules",
}

# Fields that name code or a location; PEFT imports their values.
_CODE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
_COMMON_USED = frozenset({"peft_type", "task_type"})
# PEFT writes auto_mapping, the class of the model it wrapped, if no task_type was given; it is never imported here.
_COMMON_INERT = frozenset({"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"})


def words(text: str) -> frozenset[str]:
    """Return the set of words in a text separated by spaces."""
    return frozenset(text.split())


def check(config: Mapping[str, Any], schema: Schema, limits: AdapterLimits) -> None:
    """Raise InvalidAdapter for the first key, in file order, that this server would have to ignore."""
    known = schema.used | schema.inert | _COMMON_USED | _COMMON_INERT
    for key, value in config.items():
        if key in _CODE_FIELDS:
            _require_one_of(key, value, _CODE_FIELDS[key], _FORBIDDEN, "")
        elif key in schema.fixed:
            advice = schema.advice.get(key) or _ADVICE.get(key, "")
            _require_one_of(key, value, schema.fixed[key], _UNSUPPORTED, advice)
        elif key not in known and not _is_off(value) and key not in limits.ignored_config_keys:
            version = config.get("peft_version")
            raise InvalidAdapter.rule(
                _FORBIDDEN,
                f"adapter_config.{key}",
                f"is not a known key{f' (peft_version {shown(version)})' if version else ''}, and its value might "
                f"change the result; if not, the operator allows it with --adapter-ignored-config-key {shown(key)}",
                given=value,
            )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InvalidAdapter.rule(
            _UNSUPPORTED, "adapter_config.task_type", "must be CAUSAL_LM", given=config["task_type"]
        )


def _is_off(value: Any) -> bool:
    """Return whether an unknown key's value switches nothing on. Zero may be a setting: a scale, a layer, a token."""
    return value is None or value is False or value in ("", [], {})


def _require_one_of(key: str, value: Any, allowed: tuple[Any, ...], reason: str, advice: str) -> None:
    # Compare types too, so that JSON's 1 is not true.
    if not any(type(value) is type(one) and value == one for one in allowed):
        shown = " or ".join("unset" if one is None else repr(one) for one in allowed)
        rule = f"must be {shown}{advice and f' ({advice})'}"
        raise InvalidAdapter.rule(reason, f"adapter_config.{key}", rule, given=value)


def refused(reason: str, key: str, rule: str, *, given: object, limit: object = None) -> InvalidAdapter:
    """Return the error of a key of adapter_config.json whose value breaks a rule."""
    return InvalidAdapter.rule(reason, f"adapter_config.{key}", rule, given=given, limit=limit)


def require_at_most(limit: float, given: float, reason: str, field: str, rule: str) -> None:
    """Raise InvalidAdapter for a number of `field` above the limit."""
    if given > limit:
        raise InvalidAdapter.rule(reason, field, rule, limit=limit, given=given)


def integer(config: Mapping[str, Any], key: str, reason: str, *, minimum: int) -> int:
    """Return a whole number of at least `minimum`; booleans, floats and text are refused."""
    value = config.get(key)
    if type(value) is not int or value < minimum:
        raise InvalidAdapter.rule(
            reason, f"adapter_config.{key}", "must be a whole number", limit=f">= {minimum}", given=value
        )
    return value


def boolean(config: Mapping[str, Any], key: str, reason: str) -> bool:
    """Return true or false; false if the key is absent or null."""
    value = config.get(key)
    if value is None:
        return False
    if type(value) is not bool:
        raise InvalidAdapter.rule(reason, f"adapter_config.{key}", "must be true or false", given=value)
    return value
