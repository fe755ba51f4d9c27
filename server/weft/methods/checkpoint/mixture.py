"""Mixtures on disk: `mixture_config.json` beside `mixture_router.safetensors`. adapters_store/README.md has the format.

A mixture's directory holds its router; the experts, named by their digests, lie elsewhere. `read` takes parsed data and
returns the experts in the order of their digests, so that their order in the file has no effect.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import base_binding, safetensors_file, scan
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape

CONFIG_FILE = "mixture_config.json"
WEIGHTS_FILE = "mixture_router.safetensors"
FORMAT = 1
WEIGHT = "router.weight"

_TEMPERATURE_MIN, _TEMPERATURE_MAX = 1e-4, 1e4  # beyond them float32 logits may not be finite
_DIGEST = re.compile("[0-9a-f]{64}")
_KEYS = frozenset(
    {"mixture_format", "base_digest", "experts", "router", "top_k", "temperature", "normalize", "null_expert"}
)
_ROUTER_KEYS = frozenset({"level", "shared", "absolute", "rms_norm"})
_EXPERT_KEYS = frozenset({"digest", "adapter_id"})


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Mixture:
    """Return the mixture, fitted to `base`: float32, experts in the order of their digests.

    Raises InvalidAdapter naming the key or tensor that breaks a rule, AdapterUnusable if it is for another base.
    """
    _closed(config, _KEYS, "")
    if config.get("mixture_format") != FORMAT or type(config["mixture_format"]) is not int:
        raise _invalid("mixture_format", f"must be {FORMAT}", config.get("mixture_format"))
    trained_held_as(config, base)
    experts = _experts(config.get("experts"), limits)
    mixture = Mixture(_config(config, len(experts)), MixtureParams(_weight(tensors)), experts)
    num_routers, width = 1 if mixture.config.shared else base.num_layers, _width(base)
    scan.require_shape(WEIGHT, mixture.params.weight, (num_routers, mixture.config.num_choices, width))
    if mixture.config.level is Level.SEQUENCE and width != base.embedding_size:
        rule = "must be token: this base's embeddings are of another width than its hidden states"
        raise InvalidAdapter.rule(
            "FEATURE_UNSUPPORTED", "mixture_config.router.level", rule, limit=width, given=base.embedding_size
        )
    scan.check_values(tensors, limits)
    return mixture.in_order()


def trained_held_as(config: Mapping[str, Any], base: BaseShape) -> str:
    """Return how the base was held in training if that differs from `base`, else ""; refuses other weights."""
    return base_binding.held_as(config.get("base_digest"), base, file=f"{CONFIG_FILE}: base_digest")


def write(mixture: Mixture, directory: Path, base: BaseShape) -> None:
    """Write the two files of a mixture's directory, creating it. A base with a digest binds the mixture to it."""
    directory.mkdir(parents=True, exist_ok=True)
    made = mixture.in_order()
    config = {
        "mixture_format": FORMAT,
        **({"base_digest": base.digest} if base.digest else {}),
        "experts": [
            {"digest": expert.digest, **({"adapter_id": expert.adapter_id} if expert.adapter_id else {})}
            for expert in made.experts
        ],
        "router": {
            "level": made.config.level.value,
            "shared": made.config.shared,
            "absolute": made.config.absolute,
            "rms_norm": made.config.rms_norm,
        },
        "top_k": made.config.top_k,
        "temperature": made.config.temperature,
        "normalize": made.config.normalize,
        "null_expert": made.config.null_expert,
    }
    metadata = {"format": "pt", **base_binding.rope_metadata(base)}
    safetensors_file.write(directory / WEIGHTS_FILE, {WEIGHT: made.params.weight.float()}, metadata)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _width(base: BaseShape) -> int:
    """Return the width of the residual stream, to which every sublayer adds; most bases embed in the same width."""
    return next((site.out_features for site in base.sites.values() if site.sublayer), base.embedding_size)


def _config(config: Mapping[str, Any], num_experts: int) -> MixtureConfig:
    router = config.get("router")
    if not isinstance(router, dict):
        raise _invalid("router", "must be an object", router)
    _closed(router, _ROUTER_KEYS, "router.")
    level, top_k = router.get("level"), config.get("top_k")
    if level not in [known.value for known in Level]:
        raise _invalid("router.level", "must be token or sequence", level)
    if type(top_k) is not int:
        raise _invalid("top_k", "must be a whole number", top_k)
    null_expert = _flag(config, "null_expert")
    try:
        return MixtureConfig(
            num_experts=num_experts,
            top_k=top_k,
            temperature=_temperature(config.get("temperature")),
            level=Level(level),
            normalize=_flag(config, "normalize"),
            shared=_flag(router, "shared", "router."),
            null_expert=null_expert,
            rms_norm=_flag(router, "rms_norm", "router."),
            absolute=_flag(router, "absolute", "router."),
        )
    except ValueError as error:
        raise InvalidAdapter("MIXTURE_INVALID", f"{CONFIG_FILE}: {error}", field=CONFIG_FILE) from None


def _temperature(given: object) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool) and _TEMPERATURE_MIN <= given <= _TEMPERATURE_MAX:
        return float(given)
    bounds = [_TEMPERATURE_MIN, _TEMPERATURE_MAX]
    raise _invalid("temperature", "must be a number within bounds", given, limit=bounds)


def _experts(given: object, limits: AdapterLimits) -> tuple[Expert, ...]:
    most = limits.num_experts_max
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        count = len(given) if isinstance(given, list) else given
        raise _invalid("experts", "must be a list of at least 1 expert", count, limit=most)
    seen: dict[str, int] = {}
    experts: list[Expert] = []
    for index, one in enumerate(given):
        name = f"experts[{index}]"
        if not isinstance(one, dict):
            raise _invalid(name, "must be an object", one)
        if "generation" in one and "digest" not in one:  # the spelling in files of weft 0.1
            one = {("digest" if key == "generation" else key): value for key, value in one.items()}
        _closed(one, _EXPERT_KEYS, f"{name}.")
        digest, adapter_id = one.get("digest"), one.get("adapter_id", "")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _invalid(f"{name}.digest", "must be 64 lower-case hex digits", digest)
        if not isinstance(adapter_id, str):
            raise _invalid(f"{name}.adapter_id", "must be text", adapter_id)
        first = seen.setdefault(digest, index)
        if first != index:
            raise _invalid(f"{name}.digest", f"is expert {first} already", digest)
        experts.append(Expert(digest, adapter_id))
    return tuple(experts)


def _weight(tensors: Mapping[str, Tensor]) -> Tensor:
    for name in tensors:
        if name != WEIGHT:
            raise InvalidAdapter.rule("TENSOR_UNKNOWN", name, "is not a tensor of a mixture", given=name)
    if WEIGHT not in tensors:
        raise InvalidAdapter.rule("MIXTURE_INVALID", WEIGHT, "is missing", given="no tensor")
    return tensors[WEIGHT].float()


def _closed(given: Mapping[str, Any], known: frozenset[str], path: str) -> None:
    """Refuse an unknown key, because it would have to be ignored."""
    for key in given:
        if key not in known:
            raise InvalidAdapter.rule(
                "CONFIG_FIELD_FORBIDDEN", f"mixture_config.{path}{key}", "is not a known key", given=given[key]
            )


def _flag(given: Mapping[str, Any], key: str, path: str = "") -> bool:
    value = given.get(key)
    if type(value) is not bool:
        raise _invalid(path + key, "must be true or false", value)
    return value


def _invalid(key: str, rule: str, given: object, *, limit: object = None) -> InvalidAdapter:
    return InvalidAdapter.rule("MIXTURE_INVALID", f"mixture_config.{key}", rule, limit=limit, given=given)
