"""Check a generate request once, before anything is allocated for it.

Fields are checked first: here, without the tokenizer and without allocations that grow with a value. Then follow the
adapters, and then the tokens (api/admission.py).
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weft.adapters.identifiers import NO_TENANT, Scope
from weft.api import composition, mixtures
from weft.api.composition import Part, WeightedReference
from weft.config import RequestLimits
from weft.engine.request import GateDetail, SamplingParams
from weft.errors import InvalidRequest
from weft.model.loader import Base

_TEMPERATURE_MIN, _TEMPERATURE_MAX = 0.01, 100.0
_PENALTY_MAX = 100.0


class ChatMessage(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A generate request in transport-neutral form, unchecked. None and empty values were not given.

    scope: the adapters that the caller can name.
    """

    scope: Scope = NO_TENANT
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


def check(spec: GenerationSpec, limits: RequestLimits, base: Base) -> CheckedSpec:
    """Return the checked request. Raises InvalidRequest for the first field that breaks its rule."""
    given, most = spec.request_id, limits.request_id_bytes_max
    is_valid = len(given) <= most and all("!" <= c <= "~" for c in given)
    _require(is_valid, "REQUEST_ID_INVALID", "request_id", "must be visible ASCII characters", given, most)
    _check_input(spec, limits, base)
    salt_bytes, most = len(spec.cache_salt.encode()), limits.cache_salt_bytes_max
    _require(salt_bytes <= most, "CACHE_SALT_INVALID", "cache_salt", "is too long in bytes", salt_bytes, most)
    parts: tuple[Part, ...] = ()
    if spec.composition is not None:
        parts = composition.check(spec.composition, limits, scope=spec.scope, base_model=base.shape.name)
    elif spec.adapter_id is not None:
        parts = (Part(spec.scope.reference(spec.adapter_id, base_model=base.shape.name), 1.0, 1.0, "adapter_id"),)
    if spec.steering is not None:
        mixtures.check_steering(spec.steering, base_model=base.shape.name)
    _check_sampling(spec, base.vocab_size)
    _check_stopping(spec, limits, base.vocab_size)
    given, most = spec.logprobs, limits.logprobs_max
    _require(0 <= (given or 0) <= most, "LOGPROBS_LIMIT", "options.logprobs", "is out of range", given, most)
    params = SamplingParams(
        temperature=1.0 if spec.temperature is None else spec.temperature,
        top_p=1.0 if spec.top_p is None else spec.top_p,
        top_k=spec.top_k or 0,
        min_p=spec.min_p or 0.0,
        repetition_penalty=1.0 if spec.repetition_penalty is None else spec.repetition_penalty,
        seed=secrets.randbits(63) if spec.seed is None else spec.seed,
        max_new_tokens=spec.max_new_tokens or limits.max_new_tokens_default,
        min_new_tokens=spec.min_new_tokens or 0,
        stop_token_ids=(frozenset() if spec.ignore_eos else base.eos_token_ids) | frozenset(spec.stop_token_ids),
        logprobs=spec.logprobs,
    )
    return CheckedSpec(spec, spec.request_id or secrets.token_hex(8), parts, params)


def _require(is_valid: bool, reason: str, field: str, rule: str, given: object, limit: object = None) -> None:
    if not is_valid:
        raise InvalidRequest.rule(reason, field, rule, limit=limit, given=given)


def _check_input(spec: GenerationSpec, limits: RequestLimits, base: Base) -> None:
    def check(is_valid: bool, field: str, rule: str, given: str) -> None:
        _require(is_valid, "PROMPT_INVALID", field, rule, given)

    inputs = {"text": spec.text, "token_ids": spec.token_ids, "messages": spec.messages}
    given = [name for name, value in inputs.items() if value is not None]
    check(len(given) == 1, "input", "must be exactly one of text, token_ids, messages", ", ".join(given) or "none")
    if spec.text is not None:
        check(spec.text != "", "text", "must not be empty", "")
        check_prompt_bytes("text", len(spec.text.encode()), limits)
    elif spec.token_ids is not None:
        check(len(spec.token_ids) > 0, "token_ids.ids", "must not be empty", "[]")
        check_prompt_bytes("token_ids.ids", 4 * len(spec.token_ids), limits)
        _check_tokens("token_ids.ids", spec.token_ids, base.vocab_size)
    elif spec.messages is not None:
        check(len(spec.messages) > 0, "messages.messages", "must not be empty", "[]")
        num_bytes = sum(len(text.encode()) for message in spec.messages for text in message)
        check_prompt_bytes("messages", num_bytes, limits)
        check(base.tokenizer.chat_template is not None, "messages", "needs a base with a chat template", "none")
        for index, message in enumerate(spec.messages):
            check(message.role != "", f"messages.messages[{index}].role", "must not be empty", "")


def check_prompt_bytes(field: str, num_bytes: int, limits: RequestLimits) -> None:
    """Raise PROMPT_TOO_LONG before the text gets to a tokenizer."""
    most = limits.prompt_bytes_max
    _require(num_bytes <= most, "PROMPT_TOO_LONG", field, "has too many bytes", num_bytes, most)


def _check_tokens(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    index, given = next((i, token_id) for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
    _require(False, "TOKEN_OUT_OF_RANGE", f"{field}[{index}]", "is not a token", given, vocab_size - 1)


def _check_sampling(spec: GenerationSpec, vocab_size: int) -> None:
    def check(name: str, value: float | None, rule: str, is_valid: bool) -> None:
        is_valid = value is None or (math.isfinite(value) and is_valid)
        _require(is_valid, "SAMPLING_INVALID", f"sampling.{name}", f"must be {rule}", value)

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
    def check(is_valid: bool, reason: str, name: str, rule: str, given: object, limit: int) -> None:
        _require(is_valid, reason, f"stopping.{name}", rule, given, limit)

    given, most = spec.max_new_tokens, limits.max_new_tokens_max
    check(given is None or 1 <= given <= most, "MAX_NEW_TOKENS", "max_new_tokens", "must be at least 1", given, most)
    most, given = limits.max_new_tokens_default if given is None else given, spec.min_new_tokens
    rule = "must not pass max_new_tokens"
    check(0 <= (given or 0) <= most, "MIN_NEW_TOKENS", "min_new_tokens", rule, given, most)
    for name, values in (("stop", spec.stop), ("stop_token_ids", spec.stop_token_ids)):
        count, most = len(values), limits.stop_count_max
        check(count <= most, "STOP_INVALID", name, "has too many entries", count, most)
    for index, stop in enumerate(spec.stop):
        size, most = len(stop.encode()), limits.stop_bytes_max
        check(1 <= size <= most, "STOP_INVALID", f"stop[{index}]", "must have at least 1 byte", size, most)
    _check_tokens("stopping.stop_token_ids", spec.stop_token_ids, vocab_size)
