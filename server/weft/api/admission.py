"""Admission of checked requests: a queue place, leases on the adapters, and the limits on tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from weft.adapters.registry import Version
from weft.api import composition, mixtures
from weft.api.lifecycle import Lifecycle
from weft.api.validation import CheckedSpec
from weft.engine.block_manager import cache_root
from weft.engine.request import Request, RequestId
from weft.errors import InvalidRequest, Overloaded
from weft.model.loader import Base


class Admitted(NamedTuple):
    """A request that holds a place and leases: on the versions that it names, and on the experts of a mixture."""

    request_id: RequestId
    checked: CheckedSpec
    versions: list[Version]
    experts: list[Version]


class Admission:
    """The queue places and leases of one server; used on the event loop.

    num_requests: requests that hold a place. empty: set while there are none.
    """

    def __init__(self, lifecycle: Lifecycle, base: Base, max_requests: int) -> None:
        self.num_requests = 0
        self._lifecycle = lifecycle
        self._base = base
        self._max_requests = max_requests
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def is_full(self) -> bool:
        return self.num_requests >= self._max_requests

    def enter(self, checked: CheckedSpec, request_id: RequestId) -> Admitted:
        """Take a place and lease every adapter, or take nothing.

        Nothing is awaited in here, so no version can go between being found and being leased.
        """
        if self.is_full:
            raise Overloaded(
                "QUEUE_FULL",
                f"requests: the queue is full (limit {self._max_requests}); try again later",
                metadata={"quota": "requests", "limit": self._max_requests, "given": self.num_requests + 1},
                retry_after_s=1.0,
            )
        registry = self._lifecycle.registry
        versions = [registry.require_active(part.reference, field=part.field) for part in checked.parts]
        if checked.spec.composition is not None:
            composition.check_versions(checked.parts, versions)
        experts: list[Version] = []
        if len(versions) == 1:
            experts = mixtures.require_experts(registry, versions[0].info, field=checked.parts[0].field)
        if checked.spec.steering is not None and not experts:
            given = versions[0].info.method if versions else "the base"
            raise InvalidRequest.rule("STEERING_INVALID", "steering", "is for mixtures", given=given)
        for version in versions + experts:
            registry.hold(version, request_id)
        self.num_requests += 1
        self.empty.clear()
        return Admitted(request_id, checked, versions, experts)

    def leave(self, admitted: Admitted) -> None:
        """Release the place and the leases that `enter` took."""
        for version in admitted.versions + admitted.experts:
            self._lifecycle.release(version, admitted.request_id)
        self.num_requests -= 1
        if self.num_requests == 0:
            self.empty.set()

    def request(self, admitted: Admitted, tokens: Sequence[int], *, arrival_s: float, deadline_s: float) -> Request:
        """Make the engine's request. Raises InvalidRequest if its tokens do not fit the model."""
        _, checked, versions, experts = admitted
        for version in versions + experts:
            if version.removal is not None:
                raise version.removal
        self._check_length(len(tokens))
        spec, registry, mixture = checked.spec, self._lifecycle.registry, None
        if experts:
            uses, mixture = mixtures.uses(versions[0], experts, registry, spec.steering, spec.gate_detail)
        else:
            uses = composition.uses(checked.parts, versions, tokens)
        max_new_tokens = self._max_new_tokens(checked, len(tokens), sum(use.num_virtual_tokens for use in uses))
        return Request(
            request_id=admitted.request_id,
            prompt_token_ids=tuple(tokens),
            params=replace(checked.params, max_new_tokens=max_new_tokens),
            adapters=uses,
            mixture=mixture,
            cache_root=cache_root(spec.cache_salt, self._base.shape.digest, uses, mixture, tokens),
            deadline_s=deadline_s,
            arrival_s=arrival_s,
        )

    def _check_length(self, num_tokens: int) -> None:
        longest = self._base.max_model_len
        if not num_tokens:
            raise InvalidRequest.rule("PROMPT_INVALID", "input", "gives no tokens", given="0 tokens")
        if num_tokens >= longest:
            rule, most = "has too many tokens", longest - 1
            raise InvalidRequest.rule("PROMPT_TOO_LONG", "input", rule, limit=most, given=num_tokens)

    def _max_new_tokens(self, checked: CheckedSpec, num_tokens: int, num_virtual: int) -> int:
        longest, asked = self._base.max_model_len, checked.spec.max_new_tokens
        room = longest - num_virtual - num_tokens
        if room < (asked or 1):
            most, given = max(room, 0), asked or 1
            text = f"{num_tokens} prompt tokens and {num_virtual} virtual tokens leave room for {most} of max_model_len"
            text += f" {longest}, given {given}"
            raise InvalidRequest.at("CONTEXT_EXCEEDED", "stopping.max_new_tokens", text, limit=most, given=given)
        return min(checked.params.max_new_tokens, room)
