"""Read AdapterHub's bottleneck adapters (its `adapters` library), for conversion into Weft's own form.

    <layer>.{attention_adapters|output_adapters}.adapters.<name>.adapter_down.0.{weight (R, H), bias (R)}
    <layer>.….adapter_up.{weight (H, R), bias (H)}
    with `ln_before`: adapter_down.0 is the LN, adapter_down.1 the matrix, and adapter_norm_before the LN once more

Which of its three forms an adapter has follows from the config, as in that library on bases whose norms come before
sublayers: `is_parallel` reads r, `original_ln_before` reads h + r, neither reads h. A setting that would mean something
else here is refused by its key.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.bottleneck import METHOD
from weft.methods.bottleneck import files as bottleneck
from weft.methods.bottleneck.math import Activation, BottleneckConfig, Form
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape

_LAYER_NORM_EPS = 1e-5  # torch.nn.LayerNorm's, which that library does not change
_ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU, "swish": Activation.SILU, "silu": Activation.SILU}
_PREFIX = "config."


def _inner(names: str) -> frozenset[str]:
    return frozenset(f"{_PREFIX}{name}" for name in names.split())


_OUTER = schema.Schema(
    used=frozenset({"config"}),
    inert=frozenset({"name", "model_name", "model_type", "model_class", "hidden_size", "version", "config_id"}),
    fixed={},
)
_INNER = schema.Schema(
    used=_inner(
        "mh_adapter output_adapter reduction_factor non_linearity original_ln_before ln_before is_parallel scaling "
        "leave_out"
    ),
    # For training only, or without effect if ln_after, inv_adapter and phm_layer are off, as they must be.
    inert=_inner("init_weights init_weights_seed dropout stochastic_depth")
    | _inner("adapter_residual_before_ln inv_adapter_reduction_factor phm_dim factorized_phm_W shared_W_phm")
    | _inner("shared_phm_rule factorized_phm_rule phm_c_init phm_init_range learn_phm hypercomplex_nonlinearity")
    | _inner("phm_rank phm_bias"),
    fixed={
        f"{_PREFIX}{key}": allowed
        for key, allowed in {
            "architecture": (None,),
            "original_ln_after": (None, True),
            "residual_before_ln": (None, True),
            "ln_after": (None, False),
            "use_gating": (None, False),
            "inv_adapter": (None,),
            "cross_adapter": (None, False),
            "phm_layer": (None, False),
        }.items()
    },
)
_TENSOR = re.compile(
    r"(?:.+\.)?(?P<layer>\d+)\.(?P<place>attention|output)_adapters\.adapters\.(?P<name>[^.]+)\."
    r"(?P<part>adapter_down\.[01]|adapter_up|adapter_norm_before)\.(?P<kind>weight|bias)"
)
_SUBLAYERS = {"attention": "attention", "output": "mlp"}


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Return the adapter, fitted to `base`, as Weft's own form would hold it."""
    schema.check(config, _OUTER, limits)
    inner = config.get("config")
    if not isinstance(inner, dict):
        raise schema.refused(
            "FEATURE_UNSUPPORTED", "config", "must be an object that spells the adapter out", given=inner
        )
    schema.check({f"{_PREFIX}{key}": value for key, value in inner.items()}, _INNER, limits)
    parts = _parts(tensors, base, has_norm=schema.boolean(inner, "ln_before", "CONFIG_INVALID"))
    fitted = bottleneck.fitted(_config(inner, base), parts, tensors, base, limits)
    return Adapter(method=METHOD, **fitted._asdict())


def _config(inner: Mapping[str, Any], base: BaseShape) -> BottleneckConfig:
    boolean = {
        key: schema.boolean(inner, key, "CONFIG_INVALID")
        for key in ("is_parallel", "original_ln_before", "mh_adapter", "output_adapter", "ln_before")
    }
    form = Form.SERIAL
    if boolean["is_parallel"]:
        form = Form.RESIDUAL
    elif boolean["original_ln_before"]:
        form = Form.SUM
    activation = inner.get("non_linearity")
    if not isinstance(activation, str) or activation.lower() not in _ACTIVATIONS:
        raise schema.refused(
            "FEATURE_UNSUPPORTED",
            "config.non_linearity",
            "is not served",
            limit=", ".join(_ACTIVATIONS),
            given=activation,
        )
    placed = (("attention", boolean["mh_adapter"]), ("mlp", boolean["output_adapter"]))
    sublayers = tuple(name for name, is_there in placed if is_there)
    if not sublayers:
        raise schema.refused("CONFIG_TARGETS", "config", "must set mh_adapter or output_adapter", given=False)
    scaling = inner.get("scaling", 1.0)
    if isinstance(scaling, str):
        raise schema.refused("FEATURE_UNSUPPORTED", "config.scaling", "must be a constant", given=scaling)
    left_out = bottleneck.leave_out(inner)
    default, factors = _reduction(inner.get("reduction_factor"), base, left_out)
    return BottleneckConfig(
        form=form,
        activation=_ACTIVATIONS[activation.lower()],
        sublayers=sublayers,
        reduction_factor=default,
        reduction_factors=factors,
        leave_out=left_out,
        scaling=bottleneck.number(scaling, "config.scaling", "SCALE_INVALID"),
        has_norm=boolean["ln_before"],
        norm_eps=_LAYER_NORM_EPS,
    )


def _reduction(value: Any, base: BaseShape, left_out: tuple[int, ...]) -> tuple[float, dict[int, float]]:
    """Return the common factor, and those of layers with their own. A map names every layer, or has a default."""
    key = "config.reduction_factor"
    if not isinstance(value, dict):
        return bottleneck.number(value, key, "RANK_INVALID", above=0), {}
    own = {name: factor for name, factor in value.items() if name != "default"}
    factors = bottleneck.reduction_factors(own, key)
    if "default" in value:
        return bottleneck.number(value["default"], f"{key}[default]", "RANK_INVALID", above=0), factors
    missing = set(range(base.num_layers)) - set(left_out) - factors.keys()
    if missing:
        raise schema.refused("RANK_INVALID", key, "needs a default or a factor of every layer", given=min(missing))
    return 1.0, factors


def _parts(tensors: Mapping[str, Tensor], base: BaseShape, *, has_norm: bool) -> dict[str, dict[str, Tensor]]:
    """Group tensors by site and by Weft's own name endings."""
    site_of = {(site.layer, site.sublayer): site.name for site in base.sites.values() if site.sublayer}
    matrix = "adapter_down.1" if has_norm else "adapter_down.0"
    endings = {matrix: "bottleneck_down", "adapter_up": "bottleneck_up"}
    if has_norm:
        endings |= {"adapter_down.0": "bottleneck_norm", "adapter_norm_before": "bottleneck_norm"}
    parts: dict[str, dict[str, Tensor]] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None or found["part"] not in endings:
            raise scan.refuse_unknown(key, "bottleneck (AdapterHub)")
        names.add(found["name"])
        if len(names) > 1:
            raise InvalidAdapter.rule("TENSOR_UNKNOWN", key, "is of a second adapter", limit=1, given=sorted(names))
        place = int(found["layer"]), _SUBLAYERS[found["place"]]
        if place not in site_of:
            raise InvalidAdapter(
                "MODULE_UNKNOWN",
                f"adapter_model.safetensors: {key} belongs to the {place[1]} sublayer of layer {place[0]}, "
                "and the base has none there that an adapter can follow",
                field="adapter_model.safetensors",
                metadata={"modules": key},
            )
        ending = f"{endings[found['part']]}.{found['kind']}"
        here = parts.setdefault(site_of[place], {})
        # The LN has two names and is stored under both.
        if ending in here and not (has_norm and torch.equal(here[ending], tensor)):
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", key, "names a tensor that another name names too", given=key)
        here[ending] = tensor
    if not parts:
        raise scan.no_effect("bottleneck (AdapterHub)")
    return parts
