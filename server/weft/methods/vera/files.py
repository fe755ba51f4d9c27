"""VeRA in PEFT's format: two vectors a module, and one pair of matrices.

`P.vera_lambda_d` (r,), `P.vera_lambda_b` (out,), and once `base_model.vera_A` (r, in) and `base_model.vera_B` (out, r),
whose in and out are those of the largest modules.

A file without the two matrices is refused: they would have to be drawn, and no other version of a library promises the
same random numbers.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import targets
from weft.methods.checkpoint import scan, schema
from weft.methods.lora.files import read_rank
from weft.methods.protocol import Adapter, BaseShape, Fitted, Site
from weft.methods.vera.math import Projection, VeraConfig, VeraParams

_D, _B = "vera_lambda_d", "vera_lambda_b"
_PROJECTION = ("base_model.vera_A", "base_model.vera_B")
_SAVE = "train or save it again with save_projection=True"
_LAID_OUT_BYTES = 4  # per number, as in LoRA's file
SCHEMA = schema.Schema(
    used=schema.words("r"),
    inert=schema.words(
        "target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out vera_dropout d_initial "
        "init_weights projection_prng_key"
    ),
    fixed={"save_projection": (None, True), "bias": (None, "none"), "modules_to_save": (None, [])},
    advice={"save_projection": f"{_SAVE}: only one version of a library draws the same random projection"},
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter; tensors keep the dtype they were stored in."""
    rank = read_rank(config.get("r", 256), "r", limits)
    by_module = scan.group({k: t for k, t in tensors.items() if k not in _PROJECTION}, (_D, _B), "VeRA")
    sites = scan.require_sites(by_module, base, method="VeRA")
    _require_room(rank, sites, limits)
    projection = _projection(rank, tensors, sites)
    scan.check_values(tensors, limits)
    peaks = {end: matrix.float().abs().max().item() for end, matrix in zip((_D, _B), projection, strict=True)}
    params: dict[str, VeraParams] = {}
    for module, site in sites.items():
        found = by_module[module]
        if len(found) != 2:
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", module, f"needs both {_D} and {_B}", given=", ".join(found))
        for ending, size in ((_D, rank), (_B, site.out_features)):
            key, vector = found[ending]
            scan.require_shape(key, vector, (size,))
            largest = peaks[ending] * vector.float().abs().max().item()
            rule = "makes a value beyond the limit of its matrix"
            schema.require_at_most(limits.weight_abs_max, largest, "WEIGHT_OUT_OF_RANGE", key, rule)
        params[module] = VeraParams(found[_D][1], found[_B][1], site.in_features, projection)
    if not all(peaks.values()) or all(scan.is_zero(p.lambda_d) or scan.is_zero(p.lambda_b) for p in params.values()):
        raise scan.no_effect("VeRA")
    return Fitted(VeraConfig(rank=rank, target_modules=targets.describe(sites, base)), params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors; the projection has the vectors' dtype, and only the needed size."""
    config: VeraConfig = adapter.config
    keys = {
        "r": config.rank,
        "target_modules": list(targets.describe(adapter.sites, base)),
        "d_initial": config.d_initial,
        "vera_dropout": config.dropout,
        "save_projection": True,
        "bias": "none",
    }
    params: list[VeraParams] = list(adapter.sites.values())
    a, b = params[0].projection
    sizes = max(p.in_features for p in params), max(len(p.lambda_b) for p in params)
    projection = (a[:, : sizes[0]].to(params[0].lambda_d), b[: sizes[1]].to(params[0].lambda_b))
    tensors: dict[str, Tensor] = dict(zip(_PROJECTION, projection, strict=True))
    for module, held in adapter.sites.items():
        tensors[scan.full_key(module, _D)] = held.lambda_d
        tensors[scan.full_key(module, _B)] = held.lambda_b
    return keys, tensors


def _require_room(rank: int, sites: Mapping[str, Site], limits: AdapterLimits) -> None:
    """Raise RANK_TOO_LARGE if the matrices of all sites, which no file holds, take more bytes than a file may."""
    num_bytes = _LAID_OUT_BYTES * rank * sum(site.in_features + site.out_features for site in sites.values())
    rule = (
        f"takes too many bytes as a LoRA at {len(sites)} modules: name fewer in target_modules; the operator sets "
        "the limit with --adapter-file-bytes-max"
    )
    schema.require_at_most(limits.file_bytes_max, num_bytes, "RANK_TOO_LARGE", "adapter_config.r", rule)


def _projection(rank: int, tensors: Mapping[str, Tensor], sites: Mapping[str, Site]) -> Projection:
    """Return A and B, at least as large as the largest module."""
    for key in _PROJECTION:
        if key not in tensors:
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", key, f"is missing: {_SAVE}", given=None)
    a, b = (tensors[key] for key in _PROJECTION)
    features_in = max(site.in_features for site in sites.values())
    features_out = max(site.out_features for site in sites.values())
    needed = ([rank, features_in], [features_out, rank])
    for axis, (key, matrix, least) in enumerate(zip(_PROJECTION, (a, b), needed, strict=True)):
        given = list(matrix.shape)
        if len(given) == 2 and given[axis] != rank:
            rule = "has another rank than the config"
            raise InvalidAdapter.rule("RANK_MISMATCH", key, rule, limit=rank, given=given[axis])
        if len(given) != 2 or given[1 - axis] < least[1 - axis]:
            raise InvalidAdapter.rule("DIM_MISMATCH", key, "is smaller than the modules need", limit=least, given=given)
    return Projection(a, b)
