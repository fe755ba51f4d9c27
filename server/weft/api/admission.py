"""Admission of checked requests: a queue place, leases on the adapters, and the limits on tokens."""

import asyncio
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from weft.adapters.identifiers import AdapterId, tenant_of
from weft.adapters.registry import Version
from weft.api import composition, mixtures
from weft.api.lifecycle import Lifecycle
from weft.api.validation import CheckedSpec
from weft.config import EngineConfig, RequestLimits
from weft.engine.block_manager import cache_root
from weft.engine.request import GateDetail, Request, RequestId
from weft.errors import InvalidRequest, Overloaded
from weft.model.loader import Base

_PLACES_PER_FREE = 4


class _Share(NamedTuple):
    """The requests that count as one when places are given: those of a tenant for the same adapters."""

    tenant: str
    adapter_ids: tuple[AdapterId, ...]

    @property
    def levels(self) -> tuple[Hashable, ...]:
        """What may not hold all places: the share, and its tenant if there are several."""
        return (self, self.tenant) if self.tenant else (self,)


class Admitted(NamedTuple):
    """A request that holds a place and leases: on the versions that it names, and on the experts of a mixture."""

    request_id: RequestId
    checked: CheckedSpec
    versions: list[Version]
    experts: list[Version]
    share: _Share


class Admission:
    """The queue places and leases of one server; used on the event loop.

    One adapter of a tenant, or one tenant, holds at most four times as many places as are free. So some are left for
    the others however many it wants, and few lie idle for want of others (dynamic thresholds: Choudhury and Hahne,
    IEEE/ACM Transactions on Networking 6(2), 1998).
    num_requests: requests that hold a place. num_tokens: their prompt tokens. empty: set while there are none.
    """

    def __init__(self, lifecycle: Lifecycle, base: Base, limits: RequestLimits, config: EngineConfig) -> None:
        self.num_requests = self.num_tokens = 0
        self._places: Counter[Hashable] = Counter()
        self._tokens_of: dict[RequestId, int] = {}
        self._lifecycle = lifecycle
        self._base = base
        self._limits = limits
        self._max_requests = config.max_num_seqs + config.max_queued_requests
        self._max_tokens = config.max_queued_tokens
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def is_full(self) -> bool:
        return self.num_requests >= self._max_requests

    def enter(self, checked: CheckedSpec, request_id: RequestId) -> Admitted:
        """Take a place and lease every adapter, or take nothing.

        Nothing is awaited in here, so no version can go between being found and being leased.
        """
        share = _Share(checked.spec.scope.tenant, tuple(part.reference.adapter_id for part in checked.parts))
        self._require_place(share)
        self._lifecycle.tenant_quotas.require_tokens(share.tenant)
        registry = self._lifecycle.registry
        versions = [registry.require_active(part.reference, field=part.field) for part in checked.parts]
        if checked.spec.composition is not None:
            composition.check_versions(checked.parts, versions)
        experts: list[Version] = []
        if len(versions) == 1:
            experts = mixtures.require_experts(
                registry, versions[0].info, tenant=tenant_of(versions[0].adapter_id), field=checked.parts[0].field
            )
        if checked.spec.steering is not None and not experts:
            given = versions[0].info.method if versions else "the base"
            raise InvalidRequest.rule("STEERING_INVALID", "steering", "is for mixtures", given=given)
        for version in versions + experts:
            registry.hold(version, request_id)
        self.num_requests += 1
        self._places.update(share.levels)
        self.empty.clear()
        return Admitted(request_id, checked, versions, experts, share)

    def _require_place(self, share: _Share) -> None:
        free = self._max_requests - self.num_requests
        if free <= 0:
            raise _full("requests", self._max_requests, self.num_requests + 1)
        most = self._lifecycle.tenants.requests_max
        if share.tenant and most is not None and self._places[share.tenant] >= most:
            raise _full("requests of one tenant", most, self._places[share.tenant] + 1)
        for level in share.levels:
            if self._places[level] >= _PLACES_PER_FREE * free:
                quota = "requests of one adapter" if level is share else "requests of one tenant"
                raise _full(quota, _PLACES_PER_FREE * free, self._places[level] + 1)

    def leave(self, admitted: Admitted) -> None:
        """Release the place and the leases that `enter` took."""
        for version in admitted.versions + admitted.experts:
            self._lifecycle.release(version, admitted.request_id)
        self.num_requests -= 1
        for level in admitted.share.levels:
            self._places[level] -= 1
            if not self._places[level]:
                del self._places[level]
        self.num_tokens -= self._tokens_of.pop(admitted.request_id, 0)
        if self.num_requests == 0:
            self.empty.set()

    def request(self, admitted: Admitted, tokens: Sequence[int], *, arrival_s: float, deadline_s: float) -> Request:
        """Make the engine's request.

        Raises InvalidRequest if its tokens do not fit the model, Overloaded if too many tokens wait already.
        """
        checked, versions, experts = admitted.checked, admitted.versions, admitted.experts
        for version in versions + experts:
            if version.removal is not None:
                raise version.removal
        self._check_length(len(tokens))
        if self.num_tokens and self.num_tokens + len(tokens) > self._max_tokens:
            raise _full("tokens", self._max_tokens, self.num_tokens + len(tokens))
        self._tokens_of[admitted.request_id] = len(tokens)
        self.num_tokens += len(tokens)
        spec, registry, mixture = checked.spec, self._lifecycle.registry, None
        tenant = spec.scope.tenant
        if experts:
            uses, mixture = mixtures.uses(versions[0], experts, registry, spec.steering, spec.gate_detail)
        else:
            uses = composition.uses(checked.parts, versions, tokens)
        max_new_tokens = self._max_new_tokens(checked, len(tokens), sum(use.num_virtual_tokens for use in uses))
        if spec.gate_detail is GateDetail.TOKENS:
            self._check_gates(len(experts), len(tokens) + max_new_tokens)
        return Request(
            request_id=admitted.request_id,
            prompt_token_ids=tuple(tokens),
            params=replace(checked.params, max_new_tokens=max_new_tokens),
            adapters=uses,
            mixture=mixture,
            cache_root=cache_root(spec.cache_salt, self._base.shape.digest, uses, mixture, tokens, tenant=tenant),
            tenant=tenant,
            weight=self._lifecycle.tenants.weight_of(tenant),
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

    def _check_gates(self, num_experts: int, num_tokens: int) -> None:
        """Refuse an answer whose gates would be a message of many megabytes."""
        given, most = num_tokens * self._base.shape.num_layers * num_experts, self._limits.token_gates_max
        if given > most:
            rule = "would answer too many gates: tokens times layers times experts"
            raise InvalidRequest.rule("TOKEN_GATES_LIMIT", "options.token_gates", rule, limit=most, given=given)

    def _max_new_tokens(self, checked: CheckedSpec, num_tokens: int, num_virtual: int) -> int:
        longest, asked = self._base.max_model_len, checked.spec.max_new_tokens
        room = longest - num_virtual - num_tokens
        if room < (asked or 1):
            most, given = max(room, 0), asked or 1
            text = f"{num_tokens} prompt tokens and {num_virtual} virtual tokens leave room for {most} of max_model_len"
            text += f" {longest}, given {given}"
            raise InvalidRequest.at("CONTEXT_EXCEEDED", "stopping.max_new_tokens", text, limit=most, given=given)
        return min(checked.params.max_new_tokens, room)


def _full(quota: str, limit: int, given: int) -> Overloaded:
    text = f"{quota}: the queue is full (limit {limit}); try again later"
    metadata = {"quota": quota, "limit": limit, "given": given}
    return Overloaded("QUEUE_FULL", text, metadata=metadata, retry_after_s=1.0)
