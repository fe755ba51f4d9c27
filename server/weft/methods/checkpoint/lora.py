"""LoRA and DoRA in PEFT's form: `P.lora_A.weight` (r, in), `P.lora_B.weight` (out, r); r, lora_alpha, their patterns.

`alora_invocation_tokens` make an activated LoRA, whose delta begins in the prompt (methods/activation.py).
With lora_bias there is `P.lora_B.bias` (out,), with use_dora `P.lora_magnitude_vector` (out,). Beside a head's matrices
PEFT saves the head itself, `P.base_layer.weight`: it is checked against the base's and not kept.
"""

import math
import string
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import dora, lora, targets
from weft.methods.checkpoint import base_bias, scan, schema
from weft.methods.protocol import Adapter, BaseShape, BaseWeight, ReadBase, Site, SiteKind

_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_HEAD = "base_layer.weight"
_INVOCATION = "alora_invocation_tokens"
_PATTERN_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.")


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Check everything and give the adapter; tensors keep the dtype they were stored in."""
    schema.check(config, schema.LORA, limits)
    rank = read_rank(config.get("r"), "r", limits)
    alpha = read_alpha(config.get("lora_alpha", 8), "lora_alpha")
    ranks = {k: read_rank(v, f"rank_pattern[{k}]", limits) for k, v in _pattern(config, "rank_pattern").items()}
    alphas = {k: read_alpha(v, f"alpha_pattern[{k}]") for k, v in _pattern(config, "alpha_pattern").items()}
    use_rslora = schema.boolean(config, "use_rslora", "CONFIG_INVALID")
    use_dora = schema.boolean(config, "use_dora", "CONFIG_INVALID")
    lora_bias = schema.boolean(config, "lora_bias", "CONFIG_INVALID")
    if use_dora and lora_bias:
        raise InvalidAdapter.rule(
            "FEATURE_UNSUPPORTED", "adapter_config.lora_bias", "must be false beside use_dora", given=True
        )
    method = "DoRA" if use_dora else "LoRA"
    invocation = _read_invocation(config, base, limits, use_dora=use_dora)

    replaced, tensors = base_bias.split(config, tensors, use_dora=use_dora)
    endings = (_A, _B, *((_BIAS,) if lora_bias else ()), *((_MAGNITUDE,) if use_dora else ()))
    by_module = group(tensors, endings, method, passing=_HEAD)
    sites = scan.require_sites(by_module, base, SiteKind.LINEAR, SiteKind.HEAD, method=method)
    config_of = dora.DoraConfig if use_dora else lora.LoraConfig
    read_config = config_of(
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
        lora_bias=lora_bias or bool(replaced),
        target_modules=targets.describe(sites, base),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        invocation_tokens=invocation,
    )
    params: dict[str, lora.LoraParams] = {}
    magnitudes: dict[str, Tensor] = {}
    for module, site in sites.items():
        found = by_module[module]
        require_complete(module, found, endings)
        (a_key, a), (b_key, b) = found[_A], found[_B]
        require_product(site, a_key, a, b_key, b, lora.rank_at(read_config, module))
        scaling = lora.scaling_at(read_config, module)
        require_scale(scaling, limits)
        bias = None
        if lora_bias:
            bias = _vector(found[_BIAS], site)
        if use_dora:
            magnitudes[module] = _vector(found[_MAGNITUDE], site)
        params[module] = lora.LoraParams(a, b, scaling, bias)
    scan.check_values({key: tensor for key, tensor in tensors.items() if not key.endswith("." + _HEAD)}, limits)
    scan.check_values(dict(replaced.values()), limits)
    if replaced:
        params = base_bias.add(replaced, params, sites)
    _require_own_head(tensors, base)
    changes_nothing = all(is_empty(p) for p in params.values())
    if not use_dora:
        if changes_nothing:
            raise scan.no_effect(method)
        return Adapter(method=lora.METHOD, config=read_config, sites=params)
    with_lengths = {
        module: dora.DoraParams(p.a, p.b, magnitudes[module], p.scaling, _way_to_base(sites[module]))
        for module, p in params.items()
    }
    if changes_nothing and all(map(dora.is_identity, with_lengths.values())):
        raise scan.no_effect(method)
    return Adapter(method=dora.METHOD, config=read_config, sites=with_lengths)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors."""
    config: lora.LoraConfig = adapter.config
    keys = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(targets.describe(adapter.sites, base)),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "lora_dropout": config.dropout,
        "lora_bias": config.lora_bias,
        "bias": "none",
        "use_dora": isinstance(config, dora.DoraConfig),
    }
    if config.invocation_tokens:
        keys[_INVOCATION] = list(config.invocation_tokens)
    tensors = {}
    for module, params in adapter.sites.items():
        tensors[scan.full_key(module, _A)] = params.a
        tensors[scan.full_key(module, _B)] = params.b
        if isinstance(params, dora.DoraParams):
            tensors[scan.full_key(module, _MAGNITUDE)] = params.magnitude
        elif params.bias is not None:
            tensors[scan.full_key(module, _BIAS)] = params.bias
    return keys, tensors


def group(
    tensors: Mapping[str, Tensor], endings: tuple[str, ...], method: str, *, passing: str | None = None
) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """By module and ending, the (key, tensor) that has them; `passing` is an ending that is left out."""
    by_module: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        split = scan.split_key(key, (*endings, passing) if passing else endings)
        if split is None:
            raise scan.refuse_unknown(key, method)
        module, ending = split
        if ending == passing:
            continue
        if ending in by_module.setdefault(module, {}):
            raise InvalidAdapter.rule(
                "PAIR_INCOMPLETE", key, "names a matrix that another tensor names too", given=module
            )
        by_module[module][ending] = (key, tensor)
    return by_module


def require_complete(module: str, found: Mapping[str, tuple[str, Tensor]], endings: tuple[str, ...]) -> None:
    """PAIR_INCOMPLETE unless a module has all its tensors, and the first two of one dtype."""
    if len(found) != len(endings):
        names = [ending.removesuffix(".weight") for ending in endings]
        raise InvalidAdapter.rule(
            "PAIR_INCOMPLETE",
            module,
            f"needs both {names[0]} and {names[1]}" if len(names) == 2 else f"needs all of {', '.join(names)}",
            given=", ".join(found),
        )
    dtypes = [found[ending][1].dtype for ending in endings[:2]]
    if dtypes[0] != dtypes[1]:
        raise InvalidAdapter.rule(
            "PAIR_INCOMPLETE",
            module,
            "lora_A and lora_B must have one dtype",
            given=f"{dtypes[0]} and {dtypes[1]}",
        )


def require_product(site: Site, a_key: str, a: Tensor, b_key: str, b: Tensor, rank: int) -> None:
    """RANK_MISMATCH or DIM_MISMATCH unless A is [rank, I] and B [O, rank]."""
    if a.dim() == 2 and a.shape[1] == site.in_features and a.shape[0] != rank:
        raise InvalidAdapter.rule(
            "RANK_MISMATCH", a_key, "has another rank than the config", limit=rank, given=a.shape[0]
        )
    scan.require_shape(a_key, a, (rank, site.in_features))
    scan.require_shape(b_key, b, (site.out_features, rank))


def require_scale(scaling: float, limits: AdapterLimits) -> None:
    """SCALE_INVALID where B A would be multiplied with more than the limit."""
    if scaling > limits.scaling_max:
        raise InvalidAdapter.rule(
            "SCALE_INVALID",
            "adapter_config.lora_alpha",
            "gives too large a scale; the operator sets the limit with --adapter-scaling-max",
            limit=limits.scaling_max,
            given=scaling,
        )


def is_empty(params: lora.LoraParams) -> bool:
    """Whether the update is zero whatever its input."""
    if params.scaling == 0:
        return True
    has_product = not scan.is_zero(params.a) and not scan.is_zero(params.b)
    return not has_product and (params.bias is None or scan.is_zero(params.bias))


def _vector(found: tuple[str, Tensor], site: Site) -> Tensor:
    key, tensor = found
    scan.require_shape(key, tensor, (site.out_features,))
    return tensor


def _way_to_base(site: Site) -> ReadBase:
    """How the base's weight is read at a site; every loaded base has a way."""
    if site.read_base is None:
        raise InvalidAdapter.rule(
            "FEATURE_UNSUPPORTED", "adapter_config.use_dora", "needs the base's weights, which are not here", given=True
        )
    return site.read_base


def _require_own_head(tensors: Mapping[str, Tensor], base: BaseShape) -> None:
    """Refuse a saved module that is not the base's own: it would have to replace it."""
    for key, tensor in tensors.items():
        split = scan.split_key(key, (_HEAD,))
        if split is None:
            continue
        site = base.sites.get(split[0])
        if site is None or site.kind is not SiteKind.HEAD or site.read_base is None:
            raise scan.refuse_unknown(key, "LoRA")
        scan.require_shape(key, tensor, (site.out_features, site.in_features))
        if not site.read_base(lambda held, saved=tensor: _is_equal(held, saved)):
            raise InvalidAdapter.rule(
                "FEATURE_UNSUPPORTED",
                key,
                "must be the base's own weight: adapters do not replace the head; train a LoRA on the frozen one",
                given="another weight",
            )


def _is_equal(held: BaseWeight, saved: Tensor) -> bool:
    """Whether a saved weight is the base's, within what bfloat16 keeps: it may have been saved in another dtype."""
    begin = 0
    for weight in held.blocks(torch.float32):
        rows = saved[begin : begin + len(weight)].to(weight.device, torch.float32)
        if not torch.equal(rows, weight) and not torch.equal(rows.bfloat16(), weight.bfloat16()):
            return False
        begin += len(weight)
    return True


def read_rank(value: Any, key: str, limits: AdapterLimits) -> int:
    """A whole number from 1 to the limit, or RANK_INVALID or RANK_TOO_LARGE."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise InvalidAdapter.rule("RANK_INVALID", f"adapter_config.{key}", "must be a whole number from 1", given=value)
    if value > limits.rank_max:
        raise InvalidAdapter.rule(
            "RANK_TOO_LARGE",
            f"adapter_config.{key}",
            "is too large; the operator sets the limit with --adapter-rank-max",
            limit=limits.rank_max,
            given=value,
        )
    return value


def read_alpha(value: Any, key: str) -> float:
    """A finite number of at least 0, or SCALE_INVALID."""
    # 1e38 is finite: the scale's own limit refuses it once the rank is known.
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise InvalidAdapter.rule(
            "SCALE_INVALID", f"adapter_config.{key}", "must be a finite number of at least 0", given=value
        )
    return float(value)


def _read_invocation(
    config: Mapping[str, Any], base: BaseShape, limits: AdapterLimits, *, use_dora: bool
) -> tuple[int, ...]:
    """Token ids of the base's vocabulary, at least one; () where the key is absent or null."""
    given = config.get(_INVOCATION)
    if given is None:
        return ()
    key = f"adapter_config.{_INVOCATION}"
    # PEFT gives the two together no meaning, and lets replaced biases act before the invocation too.
    for other, is_there in (("use_dora", use_dora), ("bias", config.get("bias") not in (None, "none"))):
        if is_there:
            raise InvalidAdapter.rule("FEATURE_UNSUPPORTED", key, f"must be unset beside {other}", given=given)
    if not isinstance(given, list) or not 1 <= len(given) <= limits.num_invocation_tokens_max:
        count = len(given) if isinstance(given, list) else given
        raise InvalidAdapter.rule(
            "CONFIG_INVALID",
            key,
            "must be a list of at least 1 token",
            limit=limits.num_invocation_tokens_max,
            given=count,
        )
    vocabulary = max((site.out_features for site in base.of_kind(SiteKind.HEAD)), default=2**31)
    for index, token in enumerate(given):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise InvalidAdapter.rule(
                "CONFIG_INVALID", f"{key}[{index}]", "must be a token of the base", limit=vocabulary - 1, given=token
            )
    return tuple(given)


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
