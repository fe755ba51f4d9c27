"""Requests of the engine, and the events that answer them. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum, auto
from random import Random
from typing import NamedTuple, NewType, TypeAlias

from weft.adapters.identifiers import AdapterDigest
from weft.engine.token_ranges import Ranges
from weft.errors import WeftError

RequestId = NewType("RequestId", str)


class FinishReason(StrEnum):
    """Reason why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class RequestStatus(Enum):
    """State of a request. Prefill and decode are not states: num_computed_tokens catches up in both."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of sampling and stopping, checked when the request enters (api/validation.py).

    temperature 0 is greedy. stop_token_ids includes the end-of-sequence tokens, unless the request ignores them.
    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    logprobs: number of alternatives reported beside the chosen token; None reports no log-probabilities at all.
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
    """One adapter of a request: its content, its gate, and the number of its virtual positions.

    ranges: the real tokens on which it acts; () is all of them, as for every adapter with virtual positions.
    """

    digest: AdapterDigest
    gate: float
    num_virtual_tokens: int
    ranges: Ranges = ()


class ExpertBound(NamedTuple):
    """A request's bounds on the gate of one expert."""

    allowed: bool = True
    floor: float = 0.0
    ceiling: float = float("inf")


class GateDetail(IntEnum):
    """The gates that an answer reports: none, their means, or also those of every token."""

    NONE = 0
    MEAN = 1
    TOKENS = 2


class MixtureUse(NamedTuple):
    """The mixture that computes the gates of a request's adapters, its experts in the order of their digests.

    reads_prompt: whether the gates depend on the prompt as a whole, and are the same for every token.
    bounds: one for each expert, in the order of their digests; () for none.
    """

    digest: AdapterDigest
    reads_prompt: bool = False
    bounds: tuple[ExpertBound, ...] = ()
    gate_detail: GateDetail = GateDetail.NONE


class Gates(NamedTuple):
    """The gates that a mixture computed for a request, with the experts in the order of their digests.

    mean: for each layer and expert, over the tokens that the request computed. tokens: for each expert, those of each
    token and layer, in order; empty unless requested.
    """

    mean: list[list[float]]  # [L][N]
    tokens: list[list[float]]  # [N][tokens · L]


def canonical(uses: Iterable[AdapterUse]) -> tuple[AdapterUse, ...]:
    """Sort deltas by their content, and put virtual positions after them as listed.

    Float sums and cache keys depend on the order of their terms. Sorted, the same deltas have the same bits and share
    blocks, however they were listed. The order of virtual positions carries meaning, so it is kept.
    """
    listed = tuple(uses)
    deltas = sorted(use for use in listed if not use.num_virtual_tokens)
    return (*deltas, *(use for use in listed if use.num_virtual_tokens))


class TokenLogprob(NamedTuple):
    """A token and its log-probability under the model (temperature 1, before any filter)."""

    token_id: int
    logprob: float


class SampledToken(NamedTuple):
    """One generated token; `top` holds the requested alternatives, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


Tokens: TypeAlias = tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The terminal part of a request's last event. `error` is set if and only if `reason` is ERROR or CANCELLED.

    gates: those of a mixture, if they were requested and any token was computed.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    error: WeftError | None = None
    gates: Gates | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """The result of one or more steps for one request. Only the last event of a request has `finish`."""

    request_id: RequestId
    tokens: Tokens = ()
    finish: Finish | None = None

    def after(self, before: "TokenEvent") -> "TokenEvent":
        """Return the event that merges `before` and this one."""
        return TokenEvent(self.request_id, before.tokens + self.tokens, self.finish)


class Share(NamedTuple):
    """The requests that are scheduled as one: those of a tenant for the same adapters."""

    tenant: str
    digests: tuple[AdapterDigest, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request inside the engine; only the engine thread changes it.

    deadline_s, arrival_s: on the monotonic clock. cache_root: first link of the prefix-cache keys (block_manager.py).
    num_computed_tokens: real tokens whose keys and values are in the cache; virtual positions do not count.
    num_cached_tokens: prompt tokens that were in the cache when the request first started.
    num_overtaken: later requests that started while this one waited for adapter room.
    is_probe: whether the server asks for itself, so that no metric counts it.
    digests: contents that must be on the device: the adapters in order, then the mixture's router.
    spans: the uses with virtual positions; `virtual_blocks` has the blocks of each, one after the other.
    weight: of its tenant, whose share of the server grows with it. share: that the request belongs to.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    mixture: MixtureUse | None = None
    cache_root: bytes = b""
    deadline_s: float = float("inf")
    arrival_s: float = 0.0
    tenant: str = ""
    weight: float = 1.0
    is_probe: bool = False

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
    share: Share = field(init=False)
    num_virtual_tokens: int = field(init=False)
    num_prompt_tokens: int = field(init=False)
    scheduled_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        adapters = tuple(use.digest for use in self.adapters)
        self.digests = adapters if self.mixture is None else (*adapters, self.mixture.digest)
        self.share = Share(self.tenant, self.digests)
        self.spans = tuple(use for use in self.adapters if use.num_virtual_tokens)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_virtual_tokens = sum(use.num_virtual_tokens for use in self.spans)
        assert all(use.gate > 0 for use in self.spans), "attention takes the logarithm of a virtual use's gate"
        assert not any(use.ranges for use in self.spans), "virtual positions act on every token"
        self.random.seed(self.params.seed)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output)

    def rewind(self) -> None:
        """Forget the random number of a token that was drawn but not kept; each kept one took one number."""
        self.random.seed(self.params.seed)
        for _ in self.output:
            self.random.random()

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Return the prompt and output tokens start : stop."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output[start - num_prompt : stop - num_prompt]
        head = list(self.prompt_token_ids[start:stop])
        return head if stop <= num_prompt else head + self.output[: stop - num_prompt]

    def finish(self, reason: FinishReason, error: WeftError | None = None) -> Finish:
        """Mark the request as finished, and return its terminal record."""
        assert self.status is not RequestStatus.FINISHED, self.request_id
        self.status = RequestStatus.FINISHED
        return Finish(
            reason=reason,
            error=error,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=len(self.output),
            num_cached_tokens=self.num_cached_tokens,
        )
