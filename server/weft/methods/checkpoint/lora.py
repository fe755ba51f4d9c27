"""LoRA in PEFT's form: `P.lora_A.weight` (r, in), `P.lora_B.weight` (out, r); r, lora_alpha, patterns, use_rslora."""

import math
import string
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import lora
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape

_A, _B = "lora_A.weight", "lora_B.weight"
_PATTERN_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.")
V = TypeVar("V")


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Check everything and give the adapter; tensors keep the dtype they were stored in."""
    schema.check(config, schema.LORA)
    rank = _rank(config.get("r"), "r", limits)
    alpha = _alpha(config.get("lora_alpha", 8), "lora_alpha")
    ranks = {k: _rank(v, f"rank_pattern[{k}]", limits) for k, v in _pattern(config, "rank_pattern").items()}
    alphas = {k: _alpha(v, f"alpha_pattern[{k}]") for k, v in _pattern(config, "alpha_pattern").items()}
    use_rslora = schema.boolean(config, "use_rslora", "CONFIG_INVALID")

    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        split = scan.split_key(key, (_A, _B))
        if split is None:
            raise scan.refuse_unknown(key, "LoRA")
        module, ending = split
        if ending in pairs.setdefault(module, {}):
            raise InvalidAdapter.rule(
                "PAIR_INCOMPLETE", key, "names a matrix that another tensor names too", given=module
            )
        pairs[module][ending] = (key, tensor)
    sites = scan.require_sites(pairs, base)
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", module, "needs both lora_A and lora_B", given=", ".join(pair))
        if pair[_A][1].dtype != pair[_B][1].dtype:
            raise InvalidAdapter.rule(
                "PAIR_INCOMPLETE",
                module,
                "lora_A and lora_B must have one dtype",
                given=f"{pair[_A][1].dtype} and {pair[_B][1].dtype}",
            )

    params: dict[str, lora.LoraParams] = {}
    for module, site in sites.items():
        (a_key, a), (b_key, b) = pairs[module][_A], pairs[module][_B]
        expected = _match(ranks, module, rank)
        if a.dim() == 2 and a.shape[1] == site.in_features and a.shape[0] != expected:
            raise InvalidAdapter.rule(
                "RANK_MISMATCH", a_key, "has another rank than the config", limit=expected, given=a.shape[0]
            )
        scan.require_shape(a_key, a, (expected, site.in_features))
        scan.require_shape(b_key, b, (site.out_features, expected))
        scaling = lora.scaling(_match(alphas, module, alpha), expected, use_rslora=use_rslora)
        if scaling > limits.scaling_max:
            raise InvalidAdapter.rule(
                "SCALE_INVALID",
                "adapter_config.lora_alpha",
                "gives too large a scale",
                limit=limits.scaling_max,
                given=scaling,
            )
        params[module] = lora.LoraParams(a, b, scaling)
    scan.check_values(tensors, limits)
    if all(p.scaling == 0 or scan.is_zero(p.a) or scan.is_zero(p.b) for p in params.values()):
        raise scan.no_effect("LoRA")
    read_config = lora.LoraConfig(
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
        target_modules=tuple(sorted({site.suffix for site in sites.values()})),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    return Adapter(method=lora.METHOD, config=read_config, sites=params)


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors."""
    config: lora.LoraConfig = adapter.config
    keys = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
    }
    tensors = {}
    for module, params in adapter.sites.items():
        tensors[scan.full_key(module, _A)] = params.a
        tensors[scan.full_key(module, _B)] = params.b
    return keys, tensors


def _rank(value: Any, key: str, limits: AdapterLimits) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise InvalidAdapter.rule("RANK_INVALID", f"adapter_config.{key}", "must be a whole number from 1", given=value)
    if value > limits.rank_max:
        raise InvalidAdapter.rule(
            "RANK_TOO_LARGE", f"adapter_config.{key}", "is too large", limit=limits.rank_max, given=value
        )
    return value


def _alpha(value: Any, key: str) -> float:
    # 1e38 is finite: the scale's own limit refuses it once the rank is known.
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise InvalidAdapter.rule(
            "SCALE_INVALID", f"adapter_config.{key}", "must be a finite number of at least 0", given=value
        )
    return float(value)


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping of module-path suffixes. PEFT compiles its keys; here only literal paths are accepted."""
    pattern = config.get(key)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise InvalidAdapter.rule("CONFIG_INVALID", f"adapter_config.{key}", "must be an object", given=pattern)
    for name in pattern:
        if not name or not set(name) <= _PATTERN_CHARACTERS:
            raise InvalidAdapter.rule(
                "FEATURE_UNSUPPORTED", f"adapter_config.{key}", "must hold plain module paths", given=name
            )
    return pattern


def _match(patterns: Mapping[str, V], module: str, default: V) -> V:
    """The first pattern that is the module's path or a whole-name suffix of it (PEFT: `(.*\\.)?(pattern)$`)."""
    for pattern, value in patterns.items():
        if module == pattern or module.endswith("." + pattern):
            return value
    return default
