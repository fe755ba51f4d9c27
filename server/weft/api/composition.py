"""Several adapters in one request: which may stand together, and what of them takes part.

    out = y + Σ weight · delta,    each delta computed from the base's own activations

Virtual positions stand beside each other in the order of the request, with log(weight) on their attention scores.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from weft.adapters.identifiers import AdapterId, AdapterReference, Generation, parse_reference
from weft.adapters.registry import Version
from weft.config import RequestLimits
from weft.engine.request import AdapterUse, canonical
from weft.errors import InvalidRequest

_FIELD = "composition.adapters"
_MIXTURE = "mixture"  # `AdapterInfo.method` of one


class WeightedReference(NamedTuple):
    """One part of a composition, as the caller wrote it."""

    adapter_id: str
    weight: float


class Part(NamedTuple):
    """One adapter of a request. `field` is the path of its id in the request, `weight` as the caller wrote it."""

    reference: AdapterReference
    weight: float
    field: str

    @property
    def gate(self) -> float:
        """The weight as kernels hold it, in float32; what is 0 there takes no part."""
        return struct.unpack("f", struct.pack("f", self.weight))[0]


def check(given: Sequence[WeightedReference], limits: RequestLimits, *, base_model: str) -> tuple[Part, ...]:
    """COMPOSITION_INVALID with the index of the first part that breaks a rule; ID_INVALID for a malformed id."""
    if not 1 <= len(given) <= limits.composition_parts_max:
        raise InvalidRequest.rule(
            "COMPOSITION_INVALID",
            _FIELD,
            "must have at least 1 part and at most the limit",
            limit=limits.composition_parts_max,
            given=len(given),
        )
    parts: list[Part] = []
    seen: dict[AdapterId, int] = {}
    most = limits.composition_weight_abs_max
    for index, (adapter_id, weight) in enumerate(given):
        if not math.isfinite(weight) or abs(weight) > most:
            raise _refused(index, "weight", f"must be from -{most:g} to {most:g}", weight)
        field = f"{_FIELD}[{index}].adapter_id"
        part = Part(parse_reference(adapter_id, base_model=base_model, field=field), weight, field)
        first = seen.setdefault(part.reference.adapter_id, index)
        if first != index:
            raise _refused(index, "adapter_id", f"is part {first} already", adapter_id)
        parts.append(part)
    if not any(part.gate for part in parts):
        raise _refused(0, "weight", "must be other than 0 in at least one part", parts[0].weight)
    return tuple(parts)


def check_versions(parts: Sequence[Part], versions: Sequence[Version]) -> None:
    """COMPOSITION_INVALID with the index of the first part that cannot be one, or cannot have its weight."""
    seen: dict[Generation, int] = {}
    for index, (part, version) in enumerate(zip(parts, versions, strict=True)):
        name = version.adapter_id
        if version.info.method == _MIXTURE:
            raise _refused(index, "adapter_id", "is a mixture, which answers alone", name)
        first = seen.setdefault(version.generation, index)
        if first != index:
            raise _refused(index, "adapter_id", f"has the content of part {first}, {versions[first].adapter_id}", name)
        if version.info.num_virtual_tokens and part.weight < 0:
            rule = f"must not be negative for {name}, whose method {version.info.method} adds virtual tokens"
            raise _refused(index, "weight", rule, part.weight)


def uses(parts: Sequence[Part], versions: Sequence[Version]) -> tuple[AdapterUse, ...]:
    """What takes part, in the order that computes and is cached."""
    return canonical(
        AdapterUse(version.generation, part.gate, version.info.num_virtual_tokens)
        for part, version in zip(parts, versions, strict=True)
        if part.gate
    )


def _refused(index: int, name: str, rule: str, given: object) -> InvalidRequest:
    error = InvalidRequest.rule("COMPOSITION_INVALID", f"{_FIELD}[{index}].{name}", rule, given=given)
    error.metadata["index"] = str(index)
    return error
