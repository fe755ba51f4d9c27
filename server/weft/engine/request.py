"""A request as the engine sees it, and what it sends back. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum, auto
from random import Random
from typing import NamedTuple, NewType

from weft.adapters.identifiers import AdapterDigest
from weft.engine.token_ranges import Ranges
from weft.errors import WeftError

RequestId = NewType("RequestId", str)


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class RequestStatus(Enum):
    """Where a request is. There is no prefill and no decode state: only num_computed_tokens catching up."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and when to stop. Checked when the request enters (api/validation.py).

    temperature 0 is greedy. stop_token_ids holds the end-of-sequence tokens too, unless the request ignores them.
    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    logprobs: None for none, else how many alternatives come with the chosen token's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None


class AdapterUse(NamedTuple):
    """One adapter of a request: which content, how much of it, and how many virtual positions it brings.

    ranges: the real tokens in which it acts; () is all of them, as for every adapter with virtual positions.
    """

    digest: AdapterDigest
    gate: float
    num_virtual_tokens: int
    ranges: Ranges = ()


class ExpertBound(NamedTuple):
    """What a request wants of one expert's gate."""

    allowed: bool = True
    floor: float = 0.0
    ceiling: float = float("inf")


class GateDetail(IntEnum):
    """Which gates an answer reports: none, their means, or those of every token too."""

    NONE = 0
    MEAN = 1
    TOKENS = 2


class MixtureUse(NamedTuple):
    """The mixture that makes the gates of a request's adapters, which are its experts by digest.

    reads_prompt: the gates depend on the prompt as a whole, the same for every token.
    bounds: one for each expert, in the order of their digests; empty for no wish.
    """

    digest: AdapterDigest
    reads_prompt: bool = False
    bounds: tuple[ExpertBound, ...] = ()
    gate_detail: GateDetail = GateDetail.NONE


class Gates(NamedTuple):
    """The gates that a mixture made for a request: the experts in the order of their digests.

    mean: of each layer and expert, over the tokens that the request computed. tokens: of each of those tokens, layer
    and expert, in order; empty unless asked for.
    """

    mean: list[list[float]]  # [L][N]
    tokens: list[list[list[float]]]  # [tokens][L][N]


def canonical(uses: Iterable[AdapterUse]) -> tuple[AdapterUse, ...]:
    """Deltas by their content, then virtual positions as listed.

    Sums of floats depend on their order, and keys of the cache on the order of what is hashed: so the same deltas,
    however listed, have the same bits and share blocks. The order of virtual positions means something.
    """
    listed = tuple(uses)
    deltas = sorted(use for use in listed if not use.num_virtual_tokens)
    return (*deltas, *(use for use in listed if use.num_virtual_tokens))


class TokenLogprob(NamedTuple):
    """A token and its log-probability under the model (temperature 1, before any filter)."""

    token_id: int
    logprob: float


class SampledToken(NamedTuple):
    """One generated token; `top` holds the alternatives that were asked for, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The terminal part of a request's last event. `error` is set exactly when `reason` is ERROR or CANCELLED.

    gates: what a mixture made, if the request asked for it and was computed at all.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    error: WeftError | None = None
    gates: Gates | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one or more steps made for one request. Exactly one event of a request has `finish`, and it is the last."""

    request_id: RequestId
    tokens: tuple[SampledToken, ...] = ()
    finish: Finish | None = None

    def after(self, before: "TokenEvent") -> "TokenEvent":
        """Both in one."""
        return TokenEvent(self.request_id, before.tokens + self.tokens, self.finish)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request inside the engine; only the engine thread changes it.

    deadline_s, arrival_s: on the monotonic clock. cache_root: what the prefix-cache key starts from (block_manager.py).
    num_computed_tokens: real tokens whose keys and values are in the cache; virtual positions do not count.
    num_cached_tokens: prompt tokens that others had computed when the request first started.
    num_overtaken: later requests that started while this one waited for adapter room.
    digests: what must be on the device: the adapters in order, then the mixture's router.
    spans: the uses that bring virtual positions; `virtual_blocks` has the blocks of each, one after the other.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    mixture: MixtureUse | None = None
    cache_root: bytes = b""
    deadline_s: float = float("inf")
    arrival_s: float = 0.0

    status: RequestStatus = RequestStatus.WAITING
    output: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_overtaken: int = 0
    blocks: list[int] = field(default_factory=list)
    virtual_blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    random: Random = field(default_factory=Random)
    digests: tuple[AdapterDigest, ...] = field(init=False)
    spans: tuple[AdapterUse, ...] = field(init=False)
    num_virtual_tokens: int = field(init=False)
    num_prompt_tokens: int = field(init=False)
    scheduled_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        adapters = tuple(use.digest for use in self.adapters)
        self.digests = adapters if self.mixture is None else (*adapters, self.mixture.digest)
        self.spans = tuple(use for use in self.adapters if use.num_virtual_tokens)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_virtual_tokens = sum(use.num_virtual_tokens for use in self.spans)
        assert all(use.gate > 0 for use in self.spans), "attention takes the logarithm of a virtual use's gate"
        assert not any(use.ranges for use in self.spans), "virtual positions act on every token"
        self.random.seed(self.params.seed)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Prompt and output tokens start : stop."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output[start - num_prompt : stop - num_prompt]
        head = list(self.prompt_token_ids[start:stop])
        return head if stop <= num_prompt else head + self.output[: stop - num_prompt]

    def finish(self, reason: FinishReason, error: WeftError | None = None) -> Finish:
        """The terminal record; marks the request as finished."""
        assert self.status is not RequestStatus.FINISHED, self.request_id
        self.status = RequestStatus.FINISHED
        return Finish(
            reason=reason,
            error=error,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=len(self.output),
            num_cached_tokens=self.num_cached_tokens,
        )
