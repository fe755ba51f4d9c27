"""Compositions: several adapters in one request, which may be combined, and which tokens each acts on.

    out = y + Σ weight · delta(x, y)    at every module

The sum is taken at each module. There a delta depends on the module's input x and the base's output y, but not on the
other parts' deltas. Through earlier modules, however, x contains the deltas of all parts. So a composition is one
network, each of whose modules is adapted by all parts. For LoRAs it equals PEFT's `cat`.

It is not the sum of whole functions, f_base + Σ weight · (f_i - f_base), of the owner's document (section 4.2.1). That
sum would take a pass and a key-value cache for each part, whereas here a part costs only its delta. The two are not
close: on the demo base, their logits differ by a third to three quarters of the update's norm. training/README.md shows
answers of compositions in this form.

Virtual positions are concatenated in the order of the request, with log(weight) added to their attention scores. A
delta may act on some tokens only: those in the token ranges of its part, and those from its invocation on.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from weft.adapters.identifiers import NO_TENANT, AdapterDigest, AdapterId, AdapterReference, Scope, name_of
from weft.adapters.registry import Version
from weft.config import RequestLimits
from weft.engine import token_ranges
from weft.engine.request import AdapterUse, canonical
from weft.engine.token_ranges import OPEN, Ranges, TokenRange
from weft.errors import InvalidRequest
from weft.methods import activation

_FIELD = "composition.adapters"


class WeightedReference(NamedTuple):
    """One part of a composition, as the caller wrote it. ranges: the tokens on which it acts; () is all."""

    adapter_id: str
    weight: float
    ranges: Ranges = ()


class Part(NamedTuple):
    """One adapter of a request.

    weight: as the caller wrote it. gate: the weight in float32, as kernels hold it; at 0 the adapter takes no part.
    field: the path of the adapter's id in the request.
    """

    reference: AdapterReference
    weight: float
    gate: float
    field: str
    ranges: Ranges = ()


def check(
    given: Sequence[WeightedReference], limits: RequestLimits, *, scope: Scope = NO_TENANT, base_model: str
) -> tuple[Part, ...]:
    """Return the checked parts.

    Raises COMPOSITION_INVALID with the index of the first part that breaks a rule, ID_INVALID for a malformed id.
    """
    most = limits.composition_parts_max
    if not 1 <= len(given) <= most:
        rule = "must have at least 1 part and at most the limit"
        raise InvalidRequest.rule("COMPOSITION_INVALID", _FIELD, rule, limit=most, given=len(given))
    parts: list[Part] = []
    seen: dict[AdapterId, int] = {}
    most = limits.composition_weight_abs_max
    for index, (adapter_id, weight, ranges) in enumerate(given):
        if not math.isfinite(weight) or abs(weight) > most:
            raise _refused(index, "weight", f"must be from -{most:g} to {most:g}", weight)
        field = f"{_FIELD}[{index}].adapter_id"
        _check_ranges(index, ranges, limits)
        reference = scope.reference(adapter_id, base_model=base_model, field=field)
        (gate,) = struct.unpack("f", struct.pack("f", weight))
        first = seen.setdefault(reference.adapter_id, index)
        if first != index:
            raise _refused(index, "adapter_id", f"is part {first} already", adapter_id)
        parts.append(Part(reference, weight, gate, field, token_ranges.normal(ranges)))
    if not any(part.gate for part in parts):
        raise _refused(0, "weight", "must be other than 0 in at least one part", parts[0].weight)
    return tuple(parts)


def check_versions(parts: Sequence[Part], versions: Sequence[Version]) -> None:
    """Raise COMPOSITION_INVALID with the index of the first part that cannot be one, with its weight and ranges."""
    seen: dict[AdapterDigest, int] = {}
    for index, (part, version) in enumerate(zip(parts, versions, strict=True)):
        name = name_of(version.adapter_id)
        if version.info.experts:
            raise _refused(index, "adapter_id", "is a mixture, which answers alone", name)
        first = seen.setdefault(version.digest, index)
        if first != index:
            same = name_of(versions[first].adapter_id)
            raise _refused(index, "adapter_id", f"has the content of part {first}, {same}", name)
        whose = f"for {name}, whose method {version.info.method} adds virtual tokens"
        if version.info.num_virtual_tokens and part.weight < 0:
            raise _refused(index, "weight", f"must not be negative {whose}", part.weight)
        if version.info.num_virtual_tokens and part.ranges:
            raise _refused(index, "token_ranges", f"must be empty {whose}", f"{len(part.ranges)} ranges")


def uses(parts: Sequence[Part], versions: Sequence[Version], tokens: Sequence[int]) -> tuple[AdapterUse, ...]:
    """Return the adapters that act in answering the prompt `tokens`, in canonical order.

    An activated adapter acts from its invocation on; if the prompt has none, it takes no part.
    """
    taken: list[AdapterUse] = []
    for part, version in zip(parts, versions, strict=True):
        ranges, invocation = part.ranges, version.info.invocation_tokens
        if invocation:
            begin = activation.begin(invocation, tokens)
            within = [] if begin is None else token_ranges.clip(ranges or (TokenRange(0, OPEN),), begin)
            if not within:
                continue
            ranges = token_ranges.normal(within)
        if part.gate:
            taken.append(AdapterUse(version.digest, part.gate, version.info.num_virtual_tokens, ranges))
    return canonical(taken)


def _check_ranges(index: int, ranges: Sequence[TokenRange], limits: RequestLimits) -> None:
    if len(ranges) > limits.token_ranges_max:
        raise _refused(index, "token_ranges", "has too many entries", len(ranges), limit=limits.token_ranges_max)
    least = 0
    for place, (begin, end) in enumerate(ranges):
        if not least <= begin < end <= OPEN:
            rule = f"must end above its begin, by {OPEN}, and begin where the one before it ends or later, from {least}"
            raise _refused(index, f"token_ranges[{place}]", rule, f"{begin} to {end}")
        least = end


def _refused(index: int, name: str, rule: str, given: object, *, limit: object = None) -> InvalidRequest:
    error = InvalidRequest.rule("COMPOSITION_INVALID", f"{_FIELD}[{index}].{name}", rule, limit=limit, given=given)
    error.metadata["index"] = str(index)
    return error
