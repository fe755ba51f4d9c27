"""A generate request outside the engine: admit, tokenize, submit, turn events into text, settle the end.

Everything here runs on the event loop. An accepted request holds a queue place and leases until the engine's terminal
event, even if the caller goes away: that only makes the engine end the request.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from weft.api import answer
from weft.api.admission import Admission, Admitted
from weft.api.answer import GenerationPart
from weft.api.lifecycle import Lifecycle
from weft.api.prompt import PromptEncoder
from weft.api.quota import Quotas
from weft.api.trials import Trials
from weft.api.validation import ChatMessage, GenerationSpec, check
from weft.api.work import Work
from weft.config import RequestLimits
from weft.engine.detokenizer import Detokenizer
from weft.engine.endings import NON_FINITE
from weft.engine.engine import Engine
from weft.engine.request import Finish, FinishReason, GateDetail, Request, RequestId, TokenEvent
from weft.errors import Cancelled, DeadlineExceeded, WeftError
from weft.metrics import Metrics
from weft.model.loader import Base

_TOKEN_BYTES = 128  # of a token with its probability, and of each alternative, as Python objects
_LATE_S = 1.0  # what an engine may be late with the end of a request whose deadline has passed


@dataclass(slots=True)
class Stream:
    """Events of an accepted request that its caller has not read.

    num_bytes: about what they take. is_stalled: whether it was too much.
    """

    admitted: Admitted
    request: Request
    events: asyncio.Queue[TokenEvent] = field(default_factory=asyncio.Queue)
    num_bytes: int = 0
    is_stalled: bool = False

    def put(self, event: TokenEvent) -> None:
        """Add an event."""
        self.num_bytes += sum(_TOKEN_BYTES * (1 + len(token.top)) for token in event.tokens)
        self.events.put_nowait(event)

    async def next(self) -> TokenEvent:
        """Wait for an event; return all that have arrived, merged into one.

        Raises DeadlineExceeded if the engine does not end the request at its deadline.
        """
        late_s = self.request.deadline_s + _LATE_S
        try:
            async with asyncio.timeout_at(None if late_s == math.inf else late_s):
                event = await self.events.get()
        except TimeoutError:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the request ended") from None
        while not self.events.empty():
            event = self.events.get_nowait().after(event)
        self.num_bytes = 0
        return event


@dataclass(kw_only=True, eq=False)
class RequestFlow:
    """The generate requests of one server, and its Tokenize calls. work: refuses new ones, as any other call."""

    engine: Engine
    lifecycle: Lifecycle
    admission: Admission
    work: Work
    base: Base
    limits: RequestLimits
    quotas: Quotas
    metrics: Metrics
    _streams: dict[RequestId, Stream] = field(default_factory=dict[RequestId, Stream])
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._trials = Trials(engine=self.engine, lifecycle=self.lifecycle, admission=self.admission, work=self.work)
        self._prompts = PromptEncoder(
            self.base.tokenizer,
            self.limits,
            max_model_len=self.base.max_model_len,
            waiting=self.quotas.prompt_bytes,
            work=self.work,
        )

    def deliver(self, event: TokenEvent) -> None:
        """Pass an event to its stream."""
        if self._trials.deliver(event):
            return
        stream = self._streams[event.request_id]
        stream.put(event)
        if event.finish is not None:
            del self._streams[event.request_id]
            self._settle(stream, event.finish)
        elif stream.num_bytes > self.limits.stream_bytes_max and not stream.is_stalled:
            stream.is_stalled = True
            text = f"the caller does not read its stream: too many bytes wait (limit {self.limits.stream_bytes_max})"
            error = DeadlineExceeded("STREAM_STALLED", text, metadata={"limit": self.limits.stream_bytes_max})
            self.engine.end(event.request_id, FinishReason.ERROR, error)

    def fail_all(self, error: WeftError) -> None:
        """End every accepted request, because the engine does not; none of its events may come after this."""
        self._trials.fail_all(error)
        for stream in list(self._streams.values()):
            request = stream.request
            finish = Finish(
                reason=FinishReason.ERROR,
                error=error,
                num_prompt_tokens=request.num_prompt_tokens,
                num_completion_tokens=len(request.output),
                num_cached_tokens=request.num_cached_tokens,
            )
            self.metrics.requests.labels(finish.reason.value).inc()
            self.deliver(TokenEvent(request.request_id, (), finish))

    async def generate(self, spec: GenerationSpec, *, timeout_s: float | None) -> AsyncGenerator[GenerationPart, None]:
        """Yield the answer to `spec` in parts; only the last has `end`. Closing the iterator ends the request.

        timeout_s: the caller's, or None; cut to the server's maximum.
        Raises WeftError, possibly after some parts.
        """
        try:
            stream = await self._accept(spec, timeout_s)
        except WeftError as error:
            self.metrics.rejections.labels(error.reason).inc()
            raise
        request, request_id = stream.request, stream.admitted.checked.request_id
        ended = False
        try:
            detokenizer = self._detokenizer(spec, request.prompt_token_ids)
            num_tokens = 0
            while True:
                event = await stream.next()
                text, stop, count = detokenizer.add([token.token_id for token in event.tokens])
                tokens = event.tokens[:count]
                num_tokens += count
                ended = event.finish is not None
                error = event.finish.error if event.finish is not None and stop is None else None
                if stop is None and (not ended or (error is not None and tokens)):
                    yield GenerationPart(request_id=request_id, text=text, tokens=tokens)
                if error is not None:
                    raise error
                if stop is None and not ended:
                    continue
                if stop is None:
                    text += detokenizer.flush()
                if not ended:
                    self.engine.end(request.request_id, FinishReason.STOP)
                    ended = True
                    while event.finish is None and spec.gate_detail is not GateDetail.NONE:  # gates arrive with the end
                        event = await stream.next()
                last = tokens[-1] if tokens else None
                end = answer.end(stream.admitted, request, event.finish, stop, num_tokens, last)
                yield GenerationPart(request_id=request_id, text=text, tokens=tokens, end=end)
                return
        finally:
            if not ended:
                error = Cancelled("CANCELLED", "the caller went away")
                self.engine.end(request.request_id, FinishReason.CANCELLED, error)

    async def tokenize(self, text: str | None, messages: list[ChatMessage] | None) -> list[int]:
        """Return an input's tokens, as `generate` would use them. The caller holds a place of `tokenize_calls`."""
        self.work.require_open()
        check(GenerationSpec(text=text, messages=messages), self.limits, self.base)
        return await self._prompts.encode(text, messages)

    async def _accept(self, spec: GenerationSpec, timeout_s: float | None) -> Stream:
        arrival_s = time.monotonic()
        self.work.require_open()
        checked = check(spec, self.limits, self.base)
        if spec.token_ids is None:
            self._prompts.require_fit(spec.text, spec.messages)
        deadline_s = arrival_s + self._allowed_s(timeout_s)
        request_id = RequestId(f"{next(self._ids)}-{checked.request_id}")
        admitted = self.admission.enter(checked, request_id)
        try:
            tokens = await self._prompts.encode(spec.text, spec.messages) if spec.token_ids is None else spec.token_ids
            request = self.admission.request(admitted, tokens, arrival_s=arrival_s, deadline_s=deadline_s)
            self.work.require_open()
        except BaseException:
            self.admission.leave(admitted)
            raise
        stream = self._streams[request_id] = Stream(admitted, request)
        self.engine.submit(request)
        return stream

    def _allowed_s(self, timeout_s: float | None) -> float:
        """Return the seconds that a request may take. Raises DeadlineExceeded if none are left."""
        limits_s = (self.limits.deadline_default_s if timeout_s is None else timeout_s, self.limits.deadline_max_s)
        allowed_s = min((limit for limit in limits_s if limit is not None), default=math.inf)
        if allowed_s <= 0:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the request was accepted")
        return allowed_s

    def _settle(self, stream: Stream, finish: Finish) -> None:
        if finish.error is not None and finish.error.reason in NON_FINITE and stream.request.adapters:
            self._trials.begin(stream.admitted, stream.request)
        num_computed = finish.num_prompt_tokens - finish.num_cached_tokens
        tenant = stream.request.tenant
        self.lifecycle.tenant_quotas.take_tokens(tenant, num_computed + finish.num_completion_tokens)
        self.admission.leave(stream.admitted)

    def _detokenizer(self, spec: GenerationSpec, prompt: tuple[int, ...]) -> Detokenizer:
        tokenizer: Any = self.base.tokenizer
        return Detokenizer(
            tokenizer.backend_tokenizer,
            spec.stop,
            # The answer to a conversation begins a text; that to a prompt continues one.
            continued=() if spec.messages is not None else prompt,
            include_stop=spec.include_stop,
            min_new_tokens=spec.min_new_tokens or 0,
        )
