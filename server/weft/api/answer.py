"""The parts of an answer, and the report in its last part."""

from dataclasses import dataclass
from typing import NamedTuple

from weft.adapters.registry import Version
from weft.api.admission import Admitted
from weft.api.composition import Part
from weft.engine import token_ranges
from weft.engine.request import Finish, FinishReason, Gates, Request, SampledToken


class EffectiveAdapter(NamedTuple):
    """An adapter of a request, as the answer names it. mean_gate: over the tokens that the request computed."""

    version: Version
    weight: float
    mean_gate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEnd:
    """The report in an answer's last part. experts, gates: of a mixture; gates only if they were requested."""

    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    request: Request
    num_completion_tokens: int
    adapters: tuple[EffectiveAdapter, ...]
    experts: tuple[Version, ...] = ()
    gates: Gates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPart:
    """A part of an answer; only the last one has `end`."""

    request_id: str
    text: str
    tokens: tuple[SampledToken, ...]
    end: GenerationEnd | None = None


def end(
    admitted: Admitted,
    request: Request,
    finish: Finish | None,
    stop: str | None,
    num_tokens: int,
    last: SampledToken | None,
) -> GenerationEnd:
    """Return the report of an answer of `num_tokens` tokens.

    finish: None if the answer reached a stop string before the engine ended the request.
    """
    reason = FinishReason.STOP if stop is not None or finish is None else finish.reason
    token_id = None if last is None or stop is not None or reason is not FinishReason.STOP else last.token_id
    return GenerationEnd(
        reason=reason,
        stop_string=stop,
        stop_token_id=token_id,
        request=request,
        num_completion_tokens=num_tokens,
        adapters=tuple(
            _effective(part, version, request, num_tokens)
            for part, version in zip(admitted.checked.parts, admitted.versions, strict=True)
        ),
        experts=tuple(admitted.experts),
        gates=None if finish is None else finish.gates,
    )


def _takes_part(part: Part, version: Version, request: Request) -> bool:
    """Return whether an adapter acts in the answer: its weight is not 0, and its invocation, if it has one, occurs."""
    if version.info.invocation_tokens:
        return any(use.digest == version.digest for use in request.adapters)
    return part.gate != 0


def _effective(part: Part, version: Version, request: Request, num_tokens: int) -> EffectiveAdapter:
    """Return the report of one adapter. The last token is not counted, because it was never an input."""
    use = next((use for use in request.adapters if use.digest == version.digest), None)
    weight = mean = part.weight
    if part.gate and not _takes_part(part, version, request):
        weight = mean = 0.0
    elif use is not None and use.ranges:
        begin, end = request.num_cached_tokens, request.num_prompt_tokens + num_tokens - 1
        within = sum(one.end - one.begin for one in token_ranges.clip(use.ranges, begin, end))
        mean = part.weight * within / (end - begin)
    return EffectiveAdapter(version, weight, mean)
