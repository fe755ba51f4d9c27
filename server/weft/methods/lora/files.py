"""LoRA in PEFT's format: `P.lora_A.weight` (r, in), `P.lora_B.weight` (out, r); r, lora_alpha, their patterns.

`alora_invocation_tokens` make an activated LoRA, whose delta begins in the prompt (methods/activation.py).
With lora_bias there is `P.lora_B.bias` (out,). Beside a head's matrices PEFT saves the head itself,
`P.base_layer.weight`: it is checked against the base's and not kept.
"""

import math
import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import targets
from weft.methods.checkpoint import scan, schema
from weft.methods.lora import base_bias
from weft.methods.lora import math as lora
from weft.methods.protocol import Adapter, BaseShape, BaseWeight, Fitted, Site, SiteKind

T = TypeVar("T")

_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_HEAD = "base_layer.weight"
_INVOCATION = "alora_invocation_tokens"
_PATTERN_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.")
SCHEMA = schema.Schema(
    used=schema.words(
        "r lora_alpha use_rslora use_dora lora_bias bias rank_pattern alpha_pattern alora_invocation_tokens"
    ),
    inert=schema.words(
        "target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out lora_dropout loftq_config "
        "eva_config corda_config lora_ga_config qalora_group_size ensure_weight_tying"
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
        # The other initializations (PiSSA, OLoRA, CorDA, LoftQ …) also change the base: their files need another base.
        "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    },
    advice={
        "init_lora_weights": "an initialization that also changes the base: save it as a plain LoRA with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=the untrained adapter's directory)"
    },
)
# Keys that only a plain LoRA may set: other formats fix them.
PLAIN_ONLY: Mapping[str, tuple[Any, ...]] = {"lora_bias": (None, False), "bias": (None, "none"), _INVOCATION: (None,)}


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter; tensors keep the dtype they were stored in."""
    schema.boolean(config, "use_dora", "CONFIG_INVALID")
    lora_bias = schema.boolean(config, "lora_bias", "CONFIG_INVALID")
    invocation = _read_invocation(config, base, limits)
    replaced, tensors = base_bias.split(config, tensors)
    settings, params, found = read_products(config, tensors, base, limits, "LoRA", (_BIAS,) if lora_bias else ())
    if lora_bias:
        biases = {module: vector(found[module][_BIAS], base.sites[module]) for module in params}
        params = {module: held._replace(bias=biases[module]) for module, held in params.items()}
    scan.check_values(dict(replaced.values()), limits)
    if replaced:
        params = base_bias.add(replaced, params, base)
    if all(map(is_empty, params.values())):
        raise scan.no_effect("LoRA")
    read_config = lora.LoraConfig(**settings, lora_bias=lora_bias or bool(replaced), invocation_tokens=invocation)
    return Fitted(read_config, params)


def read_products(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseShape,
    limits: AdapterLimits,
    method: str,
    others: tuple[str, ...],
) -> tuple[dict[str, Any], dict[str, lora.LoraParams], Mapping[str, Mapping[str, tuple[str, Tensor]]]]:
    """Read what LoRA and DoRA share: the config's settings, the products by site, and all tensors of each site.

    method: the adapter's name in errors. others: endings of a site's tensors beside A and B.
    """
    settings = {
        "rank": read_rank(config.get("r"), "r", limits),
        "alpha": read_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        "use_rslora": schema.boolean(config, "use_rslora", "CONFIG_INVALID"),
        "rank_pattern": _pattern(config, "rank_pattern", partial(read_rank, limits=limits)),
        "alpha_pattern": _pattern(config, "alpha_pattern", read_alpha),
    }
    by_module = scan.group(tensors, (_A, _B, *others), method, passing=_HEAD)
    sites = scan.require_sites(by_module, base, *lora.SITES, method=method)
    read_config = lora.LoraConfig(**settings)
    params: dict[str, lora.LoraParams] = {}
    for module, site in sites.items():
        found = by_module[module]
        require_complete(module, found, (_A, _B, *others))
        (a_key, a), (b_key, b) = found[_A], found[_B]
        require_product(site, a_key, a, b_key, b, lora.rank_at(read_config, module))
        scaling = lora.scaling_at(read_config, module)
        require_scale(scaling, limits)
        params[module] = lora.LoraParams(a, b, scaling)
    scan.check_values({key: tensor for key, tensor in tensors.items() if not key.endswith("." + _HEAD)}, limits)
    _require_own_head(tensors, base)
    return {**settings, "target_modules": targets.describe(sites, base)}, params, by_module


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
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
        "use_dora": False,
    }
    if config.invocation_tokens:
        keys[_INVOCATION] = list(config.invocation_tokens)
    tensors = {}
    for module, params in adapter.sites.items():
        tensors[scan.full_key(module, _A)] = params.a
        tensors[scan.full_key(module, _B)] = params.b
        if config.lora_bias:
            tensors[scan.full_key(module, _BIAS)] = params.bias
    return keys, tensors


def require_complete(module: str, found: Mapping[str, tuple[str, Tensor]], endings: tuple[str, ...]) -> None:
    """Raise PAIR_INCOMPLETE unless a module has all its tensors, the first two of the same dtype."""
    if len(found) != len(endings):
        names = [ending.removesuffix(".weight") for ending in endings]
        rule = f"needs both {names[0]} and {names[1]}" if len(names) == 2 else f"needs all of {', '.join(names)}"
        raise InvalidAdapter.rule("PAIR_INCOMPLETE", module, rule, given=", ".join(found))
    dtypes = [found[ending][1].dtype for ending in endings[:2]]
    if dtypes[0] != dtypes[1]:
        given = f"{dtypes[0]} and {dtypes[1]}"
        raise InvalidAdapter.rule("PAIR_INCOMPLETE", module, "lora_A and lora_B must have one dtype", given=given)


def require_product(site: Site, a_key: str, a: Tensor, b_key: str, b: Tensor, rank: int) -> None:
    """Raise RANK_MISMATCH or DIM_MISMATCH unless A is [rank, I] and B [O, rank]."""
    if a.dim() == 2 and a.shape[1] == site.in_features and a.shape[0] != rank:
        raise InvalidAdapter.rule(
            "RANK_MISMATCH", a_key, "has another rank than the config", limit=rank, given=a.shape[0]
        )
    scan.require_shape(a_key, a, (rank, site.in_features))
    scan.require_shape(b_key, b, (site.out_features, rank))


def require_scale(scaling: float, limits: AdapterLimits) -> None:
    """Raise SCALE_INVALID if the factor of B A is above the limit."""
    rule = "gives too large a scale; the operator sets the limit with --adapter-scaling-max"
    schema.require_at_most(limits.scaling_max, scaling, "SCALE_INVALID", "adapter_config.lora_alpha", rule)


def is_empty(params: lora.LoraParams) -> bool:
    """Return whether the update is zero for every input."""
    if params.scaling == 0:
        return True
    has_product = not scan.is_zero(params.a) and not scan.is_zero(params.b)
    return not has_product and (params.bias is None or scan.is_zero(params.bias))


def vector(found: tuple[str, Tensor], site: Site) -> Tensor:
    """Return one number for each of the site's outputs, or raise DIM_MISMATCH."""
    key, tensor = found
    scan.require_shape(key, tensor, (site.out_features,))
    return tensor


def _require_own_head(tensors: Mapping[str, Tensor], base: BaseShape) -> None:
    """Refuse a saved module that differs from the base's own, which it would have to replace."""
    for key, tensor in tensors.items():
        split = scan.split_key(key, (_HEAD,))
        if split is None:
            continue
        site = base.sites.get(split[0])
        if site is None or site.kind is not SiteKind.HEAD or site.read_base is None:
            raise scan.refuse_unknown(key, "LoRA")
        scan.require_shape(key, tensor, (site.out_features, site.in_features))
        if not site.read_base(lambda held, saved=tensor: _is_equal(held, saved)):
            rule = "must be the base's own weight: adapters do not replace the head; train a LoRA on the frozen one"
            raise InvalidAdapter.rule("FEATURE_UNSUPPORTED", key, rule, given="another weight")


def _is_equal(held: BaseWeight, saved: Tensor) -> bool:
    """Return whether a saved weight is the base's, within bfloat16's precision: its dtype may have been another."""
    begin = 0
    for weight in held.blocks(torch.float32):
        rows = saved[begin : begin + len(weight)].to(weight.device, torch.float32)
        if not torch.equal(rows, weight) and not torch.equal(rows.bfloat16(), weight.bfloat16()):
            return False
        begin += len(weight)
    return True


def read_rank(value: Any, key: str, limits: AdapterLimits) -> int:
    """Return a whole number from 1 to the limit, or raise RANK_INVALID or RANK_TOO_LARGE."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise schema.refused("RANK_INVALID", key, "must be a whole number from 1", given=value)
    rule = "is too large; the operator sets the limit with --adapter-rank-max"
    schema.require_at_most(limits.rank_max, value, "RANK_TOO_LARGE", f"adapter_config.{key}", rule)
    return value


def read_alpha(value: Any, key: str) -> float:
    """Return a finite number of at least 0, or raise SCALE_INVALID."""
    # 1e38 is finite: the limit of the scale refuses it once the rank is known.
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise schema.refused("SCALE_INVALID", key, "must be a finite number of at least 0", given=value)
    return float(value)


def _read_invocation(config: Mapping[str, Any], base: BaseShape, limits: AdapterLimits) -> tuple[int, ...]:
    """Return token ids of the base's vocabulary, at least one; () if the key is absent or null."""
    given = config.get(_INVOCATION)
    if given is None:
        return ()
    if config.get("bias") not in (None, "none"):  # PEFT lets replaced biases act before the invocation too
        raise schema.refused("FEATURE_UNSUPPORTED", _INVOCATION, "must be unset beside bias", given=given)
    if not isinstance(given, list) or not 1 <= len(given) <= limits.num_invocation_tokens_max:
        count, most = len(given) if isinstance(given, list) else given, limits.num_invocation_tokens_max
        rule = "must be a list of at least 1 token"
        raise schema.refused("CONFIG_INVALID", _INVOCATION, rule, limit=most, given=count)
    vocabulary = max((site.out_features for site in base.of_kind(SiteKind.HEAD)), default=2**31)
    for index, token in enumerate(given):
        if type(token) is not int or not 0 <= token < vocabulary:
            key, rule = f"{_INVOCATION}[{index}]", "must be a token of the base"
            raise schema.refused("CONFIG_INVALID", key, rule, limit=vocabulary - 1, given=token)
    return tuple(given)


def _pattern(config: Mapping[str, Any], key: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    """Return values, read by `read`, by module-path suffix. PEFT compiles these keys; here they are literal paths."""
    pattern = config.get(key)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise schema.refused("CONFIG_INVALID", key, "must be an object", given=pattern)
    for name in pattern:
        if not name or not set(name) <= _PATTERN_CHARACTERS:
            raise schema.refused("FEATURE_UNSUPPORTED", key, "must hold plain module paths", given=name)
    return {name: read(value, f"{key}[{name}]") for name, value in pattern.items()}
