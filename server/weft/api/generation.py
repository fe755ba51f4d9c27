"""The life of a generate request outside the engine: admit, tokenize, submit, turn events into text, settle the end.

Everything here runs on the event loop. An accepted request holds a queue place and a lease; both end with the engine's
terminal event, also when the caller has gone: the caller's going only asks the engine to end the request.
"""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from weft.adapters.registry import Registry, Version
from weft.api import composition, mixtures
from weft.api.composition import Part
from weft.api.validation import ChatTurn, CheckedSpec, GenerationSpec, check, check_prompt_bytes
from weft.config import RequestLimits
from weft.engine import token_ranges
from weft.engine.block_manager import cache_root
from weft.engine.detokenizer import Detokenizer
from weft.engine.engine import Engine
from weft.engine.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Gates,
    GateSight,
    MixtureUse,
    Request,
    RequestId,
    SampledToken,
    TokenEvent,
)
from weft.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WeftError
from weft.metrics import Metrics

_INLINE_PROMPT_BYTES = 4096  # shorter prompts are tokenized on the event loop: a thread costs more than they do


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What of the base the request path needs to know."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    tokenizer: Any  # a fast transformers tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None


class EffectiveAdapter(NamedTuple):
    """An adapter of a request, as the answer names it. mean_gate: over the tokens that the request computed."""

    adapter_id: str
    generation: str
    method: str
    weight: float
    mean_gate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEnd:
    """The last part of an answer. experts, gates: of a mixture, where its gates were asked for."""

    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    seed: int
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


class _Held(NamedTuple):
    """What a request leases: the adapters that it names, and the experts where that is a mixture."""

    versions: list[Version]
    experts: list[Version]

    @property
    def all(self) -> list[Version]:
        return self.versions + self.experts


class _Stream:
    """An accepted request's events on their way to its caller."""

    __slots__ = ("_reader", "events", "on_finish", "stalled")

    def __init__(self, on_finish: Callable[[Finish], None]) -> None:
        self.events: deque[TokenEvent] = deque()
        self.on_finish = on_finish
        self.stalled = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        """One more; wakes who reads."""
        self.events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> TokenEvent:
        """All that has come."""
        while not self.events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = self.events.popleft()
        while self.events:
            event = self.events.popleft().after(event)
        return event


class Generation:
    """Generate requests of one server."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: Registry,
        model: ModelFacts,
        limits: RequestLimits,
        max_requests: int,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._model = model
        self._limits = limits
        self._max_requests = max_requests
        self._metrics = metrics
        self._streams: dict[RequestId, _Stream] = {}
        self._cancelled: dict[RequestId, WeftError] = {}  # ended before they reached the engine
        self._num_reserved = 0
        self._ids = itertools.count()
        self._refusal: Unavailable | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_requests(self) -> int:
        """Accepted requests that have not ended."""
        return self._num_reserved

    def refuse(self, error: Unavailable) -> None:
        """Take no new requests; those inside go on."""
        self._refusal = error

    async def wait_empty(self) -> None:
        """Until no request is left inside."""
        await self._empty.wait()

    def cancel(self, internal_id: str, error: WeftError) -> None:
        """End one request with `error`; the ids are those in a version's leases."""
        request_id = RequestId(internal_id)
        if request_id in self._streams:
            self._engine.end(request_id, FinishReason.ERROR, error)
        else:
            self._cancelled[request_id] = error

    def deliver(self, events: list[TokenEvent]) -> None:
        """Hand one step's events to their streams. Called on the event loop."""
        for event in events:
            stream = self._streams[event.request_id]
            stream.put(event)
            if event.finish is not None:
                del self._streams[event.request_id]
                stream.on_finish(event.finish)
            elif len(stream.events) > self._limits.stream_events_max and not stream.stalled:
                stream.stalled = True
                error = DeadlineExceeded("STREAM_STALLED", "the caller does not read its stream")
                self._engine.end(event.request_id, FinishReason.ERROR, error)

    async def generate(self, spec: GenerationSpec, *, timeout_s: float | None) -> AsyncGenerator[GenerationPart, None]:
        """Answer `spec` in parts; the last has `end`. Raises WeftError, also after parts were given.

        timeout_s: the caller's, None without one; cut to the server's maximum. Closing the iterator ends the request.
        """
        try:
            checked, request, held, stream = await self._accept(spec, timeout_s)
        except WeftError as error:
            self._metrics.rejections.labels(error.reason).inc()
            raise
        ended = False
        try:
            detokenizer = Detokenizer(
                self._model.tokenizer.backend_tokenizer,
                spec.stop,
                # A turn of a conversation begins a text; what is written on goes on with one.
                continued=() if spec.messages is not None else request.prompt_token_ids,
                include_stop=spec.include_stop,
                min_new_tokens=spec.min_new_tokens or 0,
            )
            num_tokens = 0
            while True:
                event = await stream.next()
                text, stop, count = detokenizer.add([token.token_id for token in event.tokens])
                tokens = event.tokens[:count]
                num_tokens += count
                ended = event.finish is not None
                error = event.finish.error if event.finish is not None and stop is None else None
                if stop is None and (not ended or (error is not None and tokens)):
                    yield GenerationPart(request_id=checked.request_id, text=text, tokens=tokens)
                if error is not None:
                    raise error
                if stop is None and not ended:
                    continue
                if stop is None:
                    text += detokenizer.flush()
                if not ended:
                    self._engine.end(request.request_id, FinishReason.STOP)
                    ended = True
                    while event.finish is None and spec.sight is not GateSight.NONE:  # the gates come with the end
                        event = await stream.next()
                yield GenerationPart(
                    request_id=checked.request_id,
                    text=text,
                    tokens=tokens,
                    end=_end(checked, request, held, event.finish, stop, num_tokens, tokens),
                )
                return
        finally:
            if not ended:
                error = Cancelled("CANCELLED", "the caller went away")
                self._engine.end(request.request_id, FinishReason.CANCELLED, error)

    async def tokenize(self, text: str | None, messages: list[ChatTurn] | None) -> list[int]:
        """The tokens that `generate` would make of an input."""
        check(
            GenerationSpec(text=text, messages=messages),
            self._limits,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            base_model=self._model.name,
            has_chat_template=self._model.has_chat_template,
        )
        return await self._token_ids(text, messages)

    async def _accept(
        self, spec: GenerationSpec, timeout_s: float | None
    ) -> tuple[CheckedSpec, Request, _Held, _Stream]:
        arrival_s = time.monotonic()
        if self._refusal is not None:
            raise self._refusal
        checked = check(
            spec,
            self._limits,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            base_model=self._model.name,
            has_chat_template=self._model.has_chat_template,
        )
        limits_s = (self._limits.deadline_default_s if timeout_s is None else timeout_s, self._limits.deadline_max_s)
        allowed_s = min((limit for limit in limits_s if limit is not None), default=math.inf)
        if allowed_s <= 0:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the request was accepted")
        deadline_s = arrival_s + allowed_s
        self._reserve()
        request_id = RequestId(f"{next(self._ids)}-{checked.request_id}")
        held = _Held([], [])
        try:
            held = self._acquire(checked, request_id)
            tokens = await self._token_ids(spec.text, spec.messages) if spec.token_ids is None else list(spec.token_ids)
            request = self._request(checked, request_id, tokens, held, arrival_s, deadline_s)
            for error in (self._refusal, self._cancelled.get(request_id)):
                if error is not None:
                    raise error
        except BaseException:
            self._cancelled.pop(request_id, None)
            self._leave(held.all, request_id)
            raise

        def on_finish(finish: Finish) -> None:
            if finish.error is not None and finish.error.reason == "ADAPTER_NON_FINITE":
                for part, version in zip(checked.parts, held.versions, strict=True):
                    if _takes_part(part, version, request):
                        self._registry.fault(version, finish.error.reason)
            self._leave(held.all, request_id)

        stream = self._streams[request_id] = _Stream(on_finish)
        self._engine.submit(request)
        return checked, request, held, stream

    def _acquire(self, checked: CheckedSpec, request_id: RequestId) -> _Held:
        """Hold every part, or none; nothing awaits in here, so no version goes between being found and being held."""
        versions = [self._registry.require_active(part.reference, field=part.field) for part in checked.parts]
        if checked.spec.composition is not None:
            composition.check_versions(checked.parts, versions)
        experts: list[Version] = []
        if len(versions) == 1:
            experts = mixtures.require_experts(self._registry, versions[0].info, field=checked.parts[0].field)
        if checked.spec.steering is not None and not experts:
            given = versions[0].info.method if versions else "the base"
            raise InvalidRequest.rule("STEERING_INVALID", "steering", "is for mixtures", given=given)
        held = _Held(versions, experts)
        for version in held.all:
            self._registry.hold(version, request_id)
        return held

    def _reserve(self) -> None:
        if self._num_reserved >= self._max_requests:
            raise Overloaded(
                "QUEUE_FULL",
                f"requests: the queue is full (limit {self._max_requests}); try again later",
                metadata={"quota": "requests", "limit": self._max_requests, "given": self._num_reserved + 1},
                retry_after_s=1.0,
            )
        self._num_reserved += 1
        self._empty.clear()

    def _leave(self, versions: list[Version], request_id: RequestId) -> None:
        for version in versions:
            self._registry.release(version, request_id)
        self._num_reserved -= 1
        if self._num_reserved == 0:
            self._empty.set()

    def _request(
        self,
        checked: CheckedSpec,
        request_id: RequestId,
        tokens: list[int],
        held: _Held,
        arrival_s: float,
        deadline_s: float,
    ) -> Request:
        longest = self._model.max_model_len
        if not tokens:
            raise InvalidRequest.rule("PROMPT_INVALID", "input", "gives no tokens", given="0 tokens")
        if len(tokens) >= longest:
            raise InvalidRequest.rule(
                "PROMPT_TOO_LONG", "input", "has too many tokens", limit=longest - 1, given=len(tokens)
            )
        uses, mixture = self._uses(checked, held, tokens)
        num_virtual = sum(use.num_virtual_tokens for use in uses)
        room = longest - num_virtual - len(tokens)
        if room < 1 or (checked.max_new_tokens is not None and checked.max_new_tokens > room):
            raise InvalidRequest(
                "CONTEXT_EXCEEDED",
                f"stopping.max_new_tokens: {len(tokens)} prompt tokens and {num_virtual} virtual tokens leave room for "
                f"{max(room, 0)} of max_model_len {longest}, given {checked.max_new_tokens or 1}",
                field="stopping.max_new_tokens",
                metadata={"limit": max(room, 0), "given": checked.max_new_tokens or 1},
            )
        max_new_tokens = checked.max_new_tokens or min(self._limits.max_new_tokens_default, room)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(tokens),
            params=checked.sampling(max_new_tokens=max_new_tokens),
            adapters=uses,
            mixture=mixture,
            cache_root=cache_root(checked.spec.cache_salt, self._model.digest, uses, mixture, tokens),
            deadline_s=deadline_s,
            arrival_s=arrival_s,
        )

    def _uses(
        self, checked: CheckedSpec, held: _Held, tokens: Sequence[int]
    ) -> tuple[tuple[AdapterUse, ...], MixtureUse | None]:
        if not held.experts:
            return composition.uses(checked.parts, held.versions, tokens), None
        spec = checked.spec
        mixture = mixtures.use_of(held.versions[0], held.experts, self._registry, spec.steering, spec.sight)
        return mixtures.expert_uses(held.experts), mixture

    async def _token_ids(self, text: str | None, messages: Any) -> list[int]:
        if text is not None and len(text) <= _INLINE_PROMPT_BYTES:
            return self._encode(text)
        if text is not None:
            return await asyncio.to_thread(self._encode, text)
        return await asyncio.to_thread(self._encode_messages, messages)

    def _encode(self, text: str) -> list[int]:
        # Special tokens spelled out in a prompt are ordinary text.
        return self._model.tokenizer(text, split_special_tokens=True)["input_ids"]

    def _encode_messages(self, messages: list[ChatTurn]) -> list[int]:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            rendered = self._model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise anything; it is the base's, so its text may be shown
            raise InvalidRequest.rule(
                "PROMPT_INVALID", "messages", "do not fit the chat template", given=error
            ) from error
        check_prompt_bytes("messages", len(rendered.encode()), self._limits)
        tokenizer = self._model.tokenizer
        specials = [special for special in tokenizer.all_special_tokens if special]
        if not any(special in turn.content for turn in messages for special in specials):
            return tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [
            token
            for text, is_template in _pieces(rendered, [turn.content for turn in messages])
            for token in tokenizer(text, add_special_tokens=False, split_special_tokens=not is_template)["input_ids"]
        ]


def _end(
    checked: CheckedSpec,
    request: Request,
    held: _Held,
    finish: Finish | None,
    stop: str | None,
    num_tokens: int,
    tokens: tuple[SampledToken, ...],
) -> GenerationEnd:
    last = tokens[-1].token_id if tokens else None
    reason = FinishReason.STOP if stop is not None or finish is None else finish.reason
    stopped_by_token = stop is None and reason is FinishReason.STOP
    return GenerationEnd(
        reason=reason,
        stop_string=stop,
        stop_token_id=last if stopped_by_token else None,
        num_prompt_tokens=request.num_prompt_tokens,
        num_completion_tokens=num_tokens,
        num_cached_tokens=request.num_cached_tokens,
        seed=checked.seed,
        adapters=tuple(
            _effective(part, version, request, num_tokens)
            for part, version in zip(checked.parts, held.versions, strict=True)
        ),
        experts=tuple(held.experts),
        gates=None if finish is None else finish.gates,
    )


def _takes_part(part: Part, version: Version, request: Request) -> bool:
    """Whether the answer may hold anything of it: not at weight 0, nor without the invocation that it acts from."""
    if version.info.invocation_tokens:
        return any(use.generation == version.generation for use in request.adapters)
    return part.gate != 0


def _effective(part: Part, version: Version, request: Request, num_tokens: int) -> EffectiveAdapter:
    """What the answer of `num_tokens` tokens says of one adapter; the last of them was never computed with."""
    use = next((use for use in request.adapters if use.generation == version.generation), None)
    weight = mean = part.weight
    if part.gate and not _takes_part(part, version, request):
        weight = mean = 0.0
    elif use is not None and use.ranges:
        begin, end = request.num_cached_tokens, request.num_prompt_tokens + num_tokens - 1
        within = sum(one.end - one.begin for one in token_ranges.clip(use.ranges, begin, end))
        mean = part.weight * within / (end - begin)
    return EffectiveAdapter(version.adapter_id, version.generation, version.info.method, weight, mean)


def _pieces(rendered: str, contents: list[str]) -> Iterator[tuple[str, bool]]:
    """A rendered conversation cut into what the template wrote (True) and what people said (False), in order.

    A template may trim what it is given; what cannot be found again as it was said counts as said to the end.
    """
    position = 0
    for content in contents:
        said = content.strip()
        if not said:
            continue
        start = rendered.find(said, position)
        if start < 0:
            break
        if start > position:
            yield rendered[position:start], True
        yield said, False
        position = start + len(said)
    else:
        if position < len(rendered):
            yield rendered[position:], True
        return
    yield rendered[position:], False
