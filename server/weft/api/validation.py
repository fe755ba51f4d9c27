"""Check a generate request once, before anything is allocated for it.

Fields are checked first: here, without the tokenizer and without allocations that grow with a value. Then follow the
adapters, and then the tokens (api/admission.py).
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from weft.adapters.identifiers import parse_reference
from weft.api import composition, mixtures
from weft.api.composition import Part, WeightedReference
from weft.config import RequestLimits
from weft.engine.request import GateDetail, SamplingParams
from weft.errors import InvalidRequest

_TEMPERATURE_MIN = 0.01
_TEMPERATURE_MAX = 100.0
_PENALTY_MAX = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the base that the request path uses. tokenizer: a fast transformers tokenizer."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    tokenizer: Any

    @property
    def has_chat_template(self) -> bool:
        """Whether the base can render conversations."""
        return self.tokenizer.chat_template is not None


class ChatMessage(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A generate request in transport-neutral form, unchecked. None and empty values were not given."""

    request_id: str = ""
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[ChatMessage] | None = None
    adapter_id: str | None = None
    composition: Sequence[WeightedReference] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    gate_detail: GateDetail = GateDetail.NONE
    steering: mixtures.Steering | None = None
    cache_salt: str = ""


class CheckedSpec(NamedTuple):
    """A request whose fields obey their rules.

    parts: the adapters that answer, in the order of the request; () is the base alone.
    params: max_new_tokens is the caller's or the server's default, until it is cut to the room for new tokens.
    """

    spec: GenerationSpec
    request_id: str
    parts: tuple[Part, ...]
    params: SamplingParams


def check(spec: GenerationSpec, limits: RequestLimits, model: ModelFacts) -> CheckedSpec:
    """Return the checked request. Raises InvalidRequest for the first field that breaks its rule."""
    _check_request_id(spec.request_id, limits)
    _check_input(spec, limits, model)
    salt_bytes, most = len(spec.cache_salt.encode()), limits.cache_salt_bytes_max
    if salt_bytes > most:
        raise InvalidRequest.rule(
            "CACHE_SALT_INVALID", "cache_salt", "is too long in bytes", limit=most, given=salt_bytes
        )
    parts: tuple[Part, ...] = ()
    if spec.composition is not None:
        parts = composition.check(spec.composition, limits, base_model=model.name)
    elif spec.adapter_id is not None:
        parts = (Part(parse_reference(spec.adapter_id, base_model=model.name), 1.0, 1.0, "adapter_id"),)
    if spec.steering is not None:
        mixtures.check_steering(spec.steering, base_model=model.name)
    _check_sampling(spec, model.vocab_size)
    _check_stopping(spec, limits, model.vocab_size)
    if spec.logprobs is not None and not 0 <= spec.logprobs <= limits.logprobs_max:
        raise InvalidRequest.rule(
            "LOGPROBS_LIMIT", "options.logprobs", "is out of range", limit=limits.logprobs_max, given=spec.logprobs
        )
    params = SamplingParams(
        temperature=1.0 if spec.temperature is None else spec.temperature,
        top_p=1.0 if spec.top_p is None else spec.top_p,
        top_k=spec.top_k or 0,
        min_p=spec.min_p or 0.0,
        repetition_penalty=1.0 if spec.repetition_penalty is None else spec.repetition_penalty,
        seed=secrets.randbits(63) if spec.seed is None else spec.seed,
        max_new_tokens=spec.max_new_tokens or limits.max_new_tokens_default,
        min_new_tokens=spec.min_new_tokens or 0,
        stop_token_ids=(frozenset() if spec.ignore_eos else model.eos_token_ids) | frozenset(spec.stop_token_ids),
        logprobs=spec.logprobs,
    )
    return CheckedSpec(spec, spec.request_id or secrets.token_hex(8), parts, params)


def _check_request_id(request_id: str, limits: RequestLimits) -> None:
    if len(request_id) > limits.request_id_bytes_max or not all("!" <= c <= "~" for c in request_id):
        rule, most = "must be visible ASCII characters", limits.request_id_bytes_max
        raise InvalidRequest.rule("REQUEST_ID_INVALID", "request_id", rule, limit=most, given=request_id)


def _check_input(spec: GenerationSpec, limits: RequestLimits, model: ModelFacts) -> None:
    inputs = {"text": spec.text, "token_ids": spec.token_ids, "messages": spec.messages}
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        rule = "must be exactly one of text, token_ids, messages"
        raise InvalidRequest.rule("PROMPT_INVALID", "input", rule, given=", ".join(given) or "none")
    if spec.text is not None:
        if not spec.text:
            raise InvalidRequest.rule("PROMPT_INVALID", "text", "must not be empty", given="")
        check_prompt_bytes("text", len(spec.text.encode()), limits)
    elif spec.token_ids is not None:
        if not spec.token_ids:
            raise InvalidRequest.rule("PROMPT_INVALID", "token_ids.ids", "must not be empty", given="[]")
        check_prompt_bytes("token_ids.ids", 4 * len(spec.token_ids), limits)
        for index, token_id in enumerate(spec.token_ids):
            check_token(f"token_ids.ids[{index}]", token_id, model.vocab_size)
    elif spec.messages is not None:
        if not spec.messages:
            raise InvalidRequest.rule("PROMPT_INVALID", "messages.messages", "must not be empty", given="[]")
        check_prompt_bytes(
            "messages", sum(len(t.role.encode()) + len(t.content.encode()) for t in spec.messages), limits
        )
        if not model.has_chat_template:
            raise InvalidRequest.rule("PROMPT_INVALID", "messages", "needs a base with a chat template", given="none")
        for index, message in enumerate(spec.messages):
            if not message.role:
                field = f"messages.messages[{index}].role"
                raise InvalidRequest.rule("PROMPT_INVALID", field, "must not be empty", given="")


def check_prompt_bytes(field: str, num_bytes: int, limits: RequestLimits) -> None:
    """Raise PROMPT_TOO_LONG before the text gets to a tokenizer."""
    if num_bytes > limits.prompt_bytes_max:
        raise InvalidRequest.rule(
            "PROMPT_TOO_LONG", field, "has too many bytes", limit=limits.prompt_bytes_max, given=num_bytes
        )


def check_token(field: str, token_id: int, vocab_size: int) -> None:
    """Raise TOKEN_OUT_OF_RANGE unless the token is in the vocabulary."""
    if not 0 <= token_id < vocab_size:
        raise InvalidRequest.rule("TOKEN_OUT_OF_RANGE", field, "is not a token", limit=vocab_size - 1, given=token_id)


def _check_sampling(spec: GenerationSpec, vocab_size: int) -> None:
    def check(name: str, value: float | None, rule: str, is_valid: bool) -> None:
        if value is not None and not (math.isfinite(value) and is_valid):
            raise InvalidRequest.rule("SAMPLING_INVALID", f"sampling.{name}", f"must be {rule}", given=value)

    top_p, min_p, penalty = spec.top_p or 0, spec.min_p or 0, spec.repetition_penalty or 0
    temperature, low, high = spec.temperature or 0, _TEMPERATURE_MIN, _TEMPERATURE_MAX
    check("temperature", spec.temperature, f"0, or {low} to {high:g}", temperature == 0 or low <= temperature <= high)
    check("top_p", spec.top_p, "above 0 and at most 1", 0 < top_p <= 1)
    check("top_k", spec.top_k, f"0 to the vocabulary size {vocab_size}", 0 <= (spec.top_k or 0) <= vocab_size)
    check("min_p", spec.min_p, "0 to 1", 0 <= min_p <= 1)
    rule = f"above 0 and at most {_PENALTY_MAX:g}"
    check("repetition_penalty", spec.repetition_penalty, rule, 0 < penalty <= _PENALTY_MAX)
    check("seed", spec.seed, "0 to 2^64 - 1", 0 <= (spec.seed or 0) < 1 << 64)


def _check_stopping(spec: GenerationSpec, limits: RequestLimits, vocab_size: int) -> None:
    most = limits.max_new_tokens_max
    if spec.max_new_tokens is not None and not 1 <= spec.max_new_tokens <= most:
        raise InvalidRequest.rule(
            "MAX_NEW_TOKENS", "stopping.max_new_tokens", "must be at least 1", limit=most, given=spec.max_new_tokens
        )
    most = limits.max_new_tokens_default if spec.max_new_tokens is None else spec.max_new_tokens
    least, field = spec.min_new_tokens, "stopping.min_new_tokens"
    if least is not None and not 0 <= least <= most:
        raise InvalidRequest.rule("MIN_NEW_TOKENS", field, "must not pass max_new_tokens", limit=most, given=least)
    most = limits.stop_count_max
    for name, values in (("stop", spec.stop), ("stop_token_ids", spec.stop_token_ids)):
        field, count = f"stopping.{name}", len(values)
        if count > most:
            raise InvalidRequest.rule("STOP_INVALID", field, "has too many entries", limit=most, given=count)
    most = limits.stop_bytes_max
    for index, stop in enumerate(spec.stop):
        field, num_bytes = f"stopping.stop[{index}]", len(stop.encode())
        if not 1 <= num_bytes <= most:
            raise InvalidRequest.rule("STOP_INVALID", field, "must have at least 1 byte", limit=most, given=num_bytes)
    for index, token_id in enumerate(spec.stop_token_ids):
        check_token(f"stopping.stop_token_ids[{index}]", token_id, vocab_size)
