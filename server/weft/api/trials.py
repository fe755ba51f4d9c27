"""Trials of the adapters of a request whose numbers were not finite: which of them fails alone.

Several adapters took part, and any of them may be another owner's. So no adapter is charged for having taken part: the
request's tokens are computed again with the base alone, and then with each adapter alone at weight 1. Content is taken
out of service if and only if its numbers are not finite where the base's are. One such proof is enough, since the same
content computes the same again; adapters whose numbers overflow only together stay in service.

A trial holds the adapters as the request did. Its probes are requests of the engine that no metric counts.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.adapters.registry import AdapterState, Version
from weft.api.admission import Admission, Admitted
from weft.api.lifecycle import Lifecycle
from weft.api.work import Work
from weft.engine.endings import NON_FINITE
from weft.engine.engine import Engine
from weft.engine.request import (
    AdapterUse,
    Finish,
    FinishReason,
    MixtureUse,
    Request,
    RequestId,
    SamplingParams,
    TokenEvent,
)
from weft.errors import WeftError

_PROBE_TIMEOUT_S = 30.0
_PROBE = SamplingParams(temperature=0.0, max_new_tokens=1)
_log = logging.getLogger(__name__)


class _NoVerdict(Exception):
    """A probe ended without numbers, or an adapter is being taken out of service."""


@dataclass(kw_only=True, eq=False)
class Trials:
    """The trials of one server: one at a time, and none while its queue is full."""

    engine: Engine
    lifecycle: Lifecycle
    admission: Admission
    work: Work
    _probes: dict[RequestId, "asyncio.Future[Finish]"] = field(
        default_factory=dict[RequestId, "asyncio.Future[Finish]"]
    )
    _is_busy: bool = False

    def begin(self, admitted: Admitted, request: Request) -> None:
        """Start a trial of the adapters of a request that has ended, and whose leases have not."""
        if self._is_busy or self.admission.is_full or not self.work.is_open:
            return
        self._is_busy = True
        trial_id = RequestId(f"{request.request_id}-trial")
        versions = admitted.versions + admitted.experts
        for version in versions:
            self.lifecycle.registry.hold(version, trial_id)
        self.work.keep(self._try(trial_id, versions, request))

    def deliver(self, event: TokenEvent) -> bool:
        """Take an event of a probe; return whether it is one."""
        if event.request_id not in self._probes:
            return False
        if event.finish is not None:
            probe = self._probes.pop(event.request_id)
            if not probe.done():
                probe.set_result(event.finish)
        return True

    def fail_all(self, error: WeftError) -> None:
        """End the probes, because the engine does not."""
        for request_id in list(self._probes):
            finish = Finish(
                reason=FinishReason.ERROR,
                error=error,
                num_prompt_tokens=0,
                num_completion_tokens=0,
                num_cached_tokens=0,
            )
            self.deliver(TokenEvent(request_id, (), finish))

    async def _try(self, trial_id: RequestId, versions: Sequence[Version], request: Request) -> None:
        culprits: list[Version] = []
        try:
            await self._find(trial_id, versions, request, culprits)
        except _NoVerdict:
            _log.warning("trial: ended early; %d adapters are found to fail alone", len(culprits))
        finally:
            for version in versions:
                self.lifecycle.release(version, trial_id)
            self._is_busy = False
        for version in culprits:
            await self.lifecycle.quarantine(version.digest, "ADAPTER_NON_FINITE")

    async def _find(
        self, trial_id: RequestId, versions: Sequence[Version], request: Request, culprits: list[Version]
    ) -> None:
        """Add those that fail alone to `culprits`, one after another; a mixture only if none of its experts does."""
        of = {version.digest: version for version in versions}
        if not await self._is_finite(trial_id, versions, request):
            return
        for use in request.adapters:
            if not await self._is_finite(trial_id, versions, request, (use._replace(gate=1.0),)):
                culprits.append(of[use.digest])
        mixture = request.mixture
        if mixture is not None and not culprits:
            free = MixtureUse(mixture.digest, mixture.reads_prompt)  # without the request's bounds
            if not await self._is_finite(trial_id, versions, request, request.adapters, free):
                culprits.append(of[mixture.digest])

    async def _is_finite(
        self,
        trial_id: RequestId,
        versions: Sequence[Version],
        request: Request,
        adapters: tuple[AdapterUse, ...] = (),
        mixture: MixtureUse | None = None,
    ) -> bool:
        """Return whether the request's tokens have finite numbers with these adapters. Raises _NoVerdict."""
        if not self.work.is_open or any(version.state is not AdapterState.ACTIVE for version in versions):
            raise _NoVerdict
        tokens = (*request.prompt_token_ids, *request.output)
        probe = Request(
            request_id=trial_id,
            prompt_token_ids=tokens,
            params=_PROBE,
            adapters=adapters,
            mixture=mixture,
            cache_root=repr((trial_id, adapters, mixture)).encode(),  # shares no keys and values with any other
            deadline_s=time.monotonic() + _PROBE_TIMEOUT_S,
            arrival_s=time.monotonic(),
            is_probe=True,
        )
        end = self._probes[trial_id] = asyncio.get_running_loop().create_future()
        self.engine.submit(probe)
        error = (await end).error
        if error is not None and error.reason not in NON_FINITE:
            raise _NoVerdict
        return error is None
