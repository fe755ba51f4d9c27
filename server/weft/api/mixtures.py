"""Mixtures of adapters: the experts that a mixture may have, and the bounds that a request may set on their gates.

A mixture names its experts by digest. They are looked up when it is registered and again for each request, which holds
all of them or none: if one cannot be used, the request fails as a whole and its error names the expert. A mixture does
not keep its experts registered.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from weft.adapters.identifiers import AdapterDigest, Scope, is_digest, name_of, parse_reference, tenant_of
from weft.adapters.registry import AdapterInfo, Registry, Version
from weft.engine.request import AdapterUse, ExpertBound, GateDetail, MixtureUse, canonical
from weft.errors import AdapterUnusable, InvalidRequest

_FIELD = "steering"


class GateBound(NamedTuple):
    """A request's bounds on the gate of one expert; None is unbounded."""

    expert: str = ""
    floor: float | None = None
    ceiling: float | None = None


class Steering(NamedTuple):
    """A request's bounds on a mixture's gates, as the caller wrote them."""

    restrict: Sequence[str]
    mask: Sequence[str]
    bounds: Sequence[GateBound]


def require_experts(registry: Registry, info: AdapterInfo, *, tenant: str, field: str) -> list[Version]:
    """Return the experts' versions, in the mixture's order; [] if `info` is not a mixture's.

    tenant: of the mixture, whose adapters alone can be experts. field: named in errors.

    Raises AdapterUnusable EXPERT_UNAVAILABLE for the first that cannot be used now, FEATURE_UNSUPPORTED for one that
    cannot be an expert.
    """
    versions = [registry.require_expert(expert, tenant=tenant, field=field) for expert in info.experts]
    for version in versions:
        if version.info.experts:
            raise _unsupported(version, field, "is a mixture itself")
        if version.info.invocation_tokens:
            raise _unsupported(version, field, "acts from its invocation on, where a router says how much")
    return versions


def check_steering(given: Steering, *, base_model: str) -> None:
    """Raise STEERING_INVALID for the first bound that breaks a rule, ID_INVALID for a malformed name."""
    for name, experts in (("restrict", given.restrict), ("mask", given.mask)):
        for index, expert in enumerate(experts):
            _check_name(expert, f"{_FIELD}.{name}[{index}]", base_model)
    for index, bound in enumerate(given.bounds):
        field = f"{_FIELD}.bounds[{index}]"
        _check_name(bound.expert, f"{field}.expert", base_model)
        floor, ceiling = bound.floor, bound.ceiling
        if floor is not None and not 0 <= floor <= 1:
            raise _refused(f"{field}.floor", "must be from 0 to 1", floor)
        if ceiling is not None and not (floor or 0) <= ceiling <= 1:
            raise _refused(f"{field}.ceiling", "must be from floor to 1", ceiling)


def uses(
    mixture: Version, experts: Sequence[Version], registry: Registry, steering: Steering | None, gate_detail: GateDetail
) -> tuple[tuple[AdapterUse, ...], MixtureUse]:
    """Return the experts, whose gates the router sets, and the mixture with its bounds, as the engine computes them.

    Raises STEERING_INVALID if the bounds cannot be met.
    """
    bounds = () if steering is None else _bounds(steering, mixture, experts, registry)
    taken = canonical(AdapterUse(expert.digest, 1.0, expert.info.num_virtual_tokens) for expert in experts)
    return taken, MixtureUse(mixture.digest, mixture.info.is_sequence_level, bounds, gate_detail)


def _bounds(
    steering: Steering, mixture: Version, experts: Sequence[Version], registry: Registry
) -> tuple[ExpertBound, ...]:
    scope = Scope(tenant_of(mixture.adapter_id))

    def index_of(name: str, field: str) -> int:
        """Return an expert's index by digest, else by its registered id, else by its id in the mixture's file."""
        adapter_id, _, wanted = name.partition("@")
        current = None if is_digest(name) else registry.current(scope.reference(adapter_id).adapter_id)
        digests = [expert.digest for expert in experts]
        for candidate in (wanted or name, current.digest if current is not None else ""):
            if candidate in digests and (not wanted or candidate == wanted):
                return digests.index(AdapterDigest(candidate))
        hints = [reference.adapter_id for reference in mixture.info.experts]
        if not wanted and adapter_id in hints:
            return hints.index(parse_reference(adapter_id).adapter_id)
        raise _refused(field, f"is no expert of {name_of(mixture.adapter_id)}", name)

    only = {index_of(name, f"{_FIELD}.restrict[{i}]") for i, name in enumerate(steering.restrict)}
    masked = {index_of(name, f"{_FIELD}.mask[{i}]") for i, name in enumerate(steering.mask)}
    allowed = [(not only or index in only) and index not in masked for index in range(len(experts))]
    if not any(allowed):
        raise _refused(f"{_FIELD}.mask", "must leave an expert", f"{len(masked)} of {len(only) or len(experts)}")
    found: dict[int, tuple[float, float]] = {}
    for i, bound in enumerate(steering.bounds):
        index = index_of(bound.expert, f"{_FIELD}.bounds[{i}].expert")
        if index in found:
            raise _refused(f"{_FIELD}.bounds[{i}].expert", "must not be bounded twice", bound.expert)
        found[index] = bound.floor or 0.0, math.inf if bound.ceiling is None else bound.ceiling
    made = tuple(ExpertBound(is_allowed, *found.get(index, ())) for index, is_allowed in enumerate(allowed))
    return () if all(bound == ExpertBound() for bound in made) else made


def _check_name(name: str, field: str, base_model: str) -> None:
    if not is_digest(name):
        parse_reference(name, base_model=base_model, field=field)


def _refused(field: str, rule: str, given: object) -> InvalidRequest:
    return InvalidRequest.rule("STEERING_INVALID", field, rule, given=given)


def _unsupported(version: Version, field: str, what: str) -> AdapterUnusable:
    name, digest = name_of(version.adapter_id), version.digest
    return AdapterUnusable.at(
        "FEATURE_UNSUPPORTED", field, f"expert {name}@{digest} {what}", expert=name, digest=digest
    )
