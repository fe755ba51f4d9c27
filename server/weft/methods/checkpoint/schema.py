"""The closed schema of PEFT's adapter_config.json: what each key may be, per peft_type.

A key is *used* (its value enters the mathematics or is checked), *inert* (PEFT writes it; it means nothing for a
finished adapter, so any value passes), or *fixed* (another value changes the mathematics, and is refused by name).
A key that none of these lists has (a later PEFT's) passes where its value switches nothing on, and where the operator
allows it by name.
Patterns are never compiled: the tensor names are the truth about which modules an adapter touches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter, shown

_FORBIDDEN = "CONFIG_FIELD_FORBIDDEN"
_UNSUPPORTED = "FEATURE_UNSUPPORTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Keys of one peft_type. `fixed` maps a key to the values that leave the mathematics alone."""

    used: frozenset[str]
    inert: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]


# What to do where a fixed key is asked for.
_CONVERT_INIT = (
    "an initialization that also changes the base: save it as a plain LoRA with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=the untrained adapter's directory)"
)
_ADVICE: Mapping[str, str] = {
    "modules_to_save": "whole modules are not replaced: name lm_head and linear modules in target_modules instead",
    "trainable_token_indices": "rows of the embedding are not replaced: train without it",
    "target_parameters": "bare parameters, such as fused experts, have no adapters: name linear modules in "
    "target_modules",
    "init_lora_weights": _CONVERT_INIT,
}

# Fields that name code or a place; PEFT imports what they hold.
_CODE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
_COMMON_USED = frozenset({"peft_type", "task_type"})
# PEFT writes auto_mapping, the class of the model it wrapped, where no task_type was given; it is never imported here.
_COMMON_INERT = frozenset({"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"})

LORA = Schema(
    used=frozenset(
        {
            "r",
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "bias",
            "rank_pattern",
            "alpha_pattern",
            "alora_invocation_tokens",
        }
    ),
    inert=frozenset(
        {
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "fan_in_fan_out",
            "lora_dropout",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "ensure_weight_tying",
        }
    ),
    fixed={
        "modules_to_save": (None, []),
        "trainable_token_indices": (None,),
        "velora_config": (None,),
        "use_qalora": (None, False),
        "monteclora_config": (None,),
        "layer_replication": (None,),
        "target_parameters": (None, []),
        "use_bdlora": (None, False),
        "arrow_config": (None,),
        "kasa_config": (None,),
        # The other initializations (PiSSA, OLoRA, CorDA, LoftQ …) also change the base: their files mean another base.
        "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    },
)
# Its `r` means nothing, and its rank_pattern lists which rows were kept, which the tensors say themselves.
ADALORA = Schema(
    used=frozenset({"lora_alpha", "init_r", "rank_pattern"}),
    inert=LORA.inert
    | {
        "r",
        "alpha_pattern",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    },
    fixed={
        **LORA.fixed,
        "alora_invocation_tokens": (None,),
        "bias": (None, "none"),
        "use_dora": (None, False),
        "use_rslora": (None, False),
        "lora_bias": (None, False),
    },
)
IA3 = Schema(
    used=frozenset({"target_modules", "feedforward_modules"}),
    inert=frozenset({"exclude_modules", "fan_in_fan_out", "init_ia3_weights"}),
    fixed={"modules_to_save": (None, [])},
)
BEFT = Schema(
    used=frozenset({"target_modules", "weft_norm_biases"}),
    inert=frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"}),
    fixed={"modules_to_save": (None, [])},
)
_VIRTUAL_INERT = frozenset({"token_dim", "num_attention_heads", "num_layers"})
_VIRTUAL_FIXED: Mapping[str, tuple[Any, ...]] = {"num_transformer_submodules": (None, 1), "modules_to_save": (None, [])}
PREFIX = Schema(
    used=frozenset({"num_virtual_tokens"}),
    inert=_VIRTUAL_INERT | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    fixed=_VIRTUAL_FIXED,
)
# Prefix tuning that was trained without an MLP; how many positions were frozen then means nothing now.
CARTRIDGE = Schema(
    used=frozenset({"num_virtual_tokens"}), inert=_VIRTUAL_INERT | {"num_frozen_tokens"}, fixed=_VIRTUAL_FIXED
)
PROMPT = Schema(
    used=frozenset({"num_virtual_tokens"}),
    inert=_VIRTUAL_INERT
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    fixed=_VIRTUAL_FIXED,
)
PTUNING = Schema(
    used=frozenset({"num_virtual_tokens"}),
    inert=_VIRTUAL_INERT
    | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    fixed=_VIRTUAL_FIXED,
)

BOTTLENECK = Schema(
    used=frozenset(
        {
            "bottleneck_format",
            "form",
            "activation",
            "sublayers",
            "reduction_factor",
            "reduction_factors",
            "size",
            "leave_out",
            "scaling",
            "has_norm",
            "norm_eps",
        }
    ),
    inert=frozenset(),
    fixed={},
)


def check(config: Mapping[str, Any], schema: Schema, limits: AdapterLimits) -> None:
    """Raise InvalidAdapter for the first key, in file order, that this server would have to ignore."""
    known = schema.used | schema.inert | _COMMON_USED | _COMMON_INERT
    for key, value in config.items():
        if key in _CODE_FIELDS:
            _require_one_of(key, value, _CODE_FIELDS[key], _FORBIDDEN)
        elif key in schema.fixed:
            _require_one_of(key, value, schema.fixed[key], _UNSUPPORTED)
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
    """Whether the value of an unknown key switches nothing on. Zero may be a setting: a scale, a layer, a token."""
    return value is None or value is False or value in ("", [], {})


def _require_one_of(key: str, value: Any, allowed: tuple[Any, ...], reason: str) -> None:
    # `is`-like comparison for booleans: JSON's 1 is not true.
    if not any(type(value) is type(one) and value == one for one in allowed):
        shown = " or ".join("unset" if one is None else repr(one) for one in allowed)
        advice = f" ({_ADVICE[key]})" if key in _ADVICE else ""
        raise InvalidAdapter.rule(reason, f"adapter_config.{key}", f"must be {shown}{advice}", given=value)


def integer(config: Mapping[str, Any], key: str, reason: str, *, minimum: int) -> int:
    """A whole number of at least `minimum`; booleans, floats and text are not numbers here."""
    value = config.get(key)
    if type(value) is not int or value < minimum:
        raise InvalidAdapter.rule(
            reason, f"adapter_config.{key}", "must be a whole number", limit=f">= {minimum}", given=value
        )
    return value


def boolean(config: Mapping[str, Any], key: str, reason: str) -> bool:
    """True or false; false where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return False
    if type(value) is not bool:
        raise InvalidAdapter.rule(reason, f"adapter_config.{key}", "must be true or false", given=value)
    return value
