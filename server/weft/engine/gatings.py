"""What running requests of mixtures need beside their router: what it reads, their wishes, and what it made of them.

Only the engine thread calls this. Nothing here is done for a request without a mixture.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine.request import Gates, GateSight, MixtureUse, Request
from weft.engine.scheduler import Scheduled
from weft.engine.transfer import Transfer
from weft.methods.mixture import NO_WISH, Steering


class RoutedRun(NamedTuple):
    """The rows of one request whose gates a router makes.

    first, last: rows of the batch, half-open. slot: of the router. slots, experts: what the rows take, and which expert
    each is. spans: which experts bring its virtual positions, span by span. pooled: what the router reads instead of
    the rows, or None. steering: float32 [3, N]: whether allowed (1 or 0), floor, ceiling; or None. Both are on the
    device. traced_at: where in a layer of the trace the rows' gates lie; -1 for nowhere.
    """

    first: int
    last: int
    slot: AdapterSlot
    slots: tuple[AdapterSlot, ...]
    experts: tuple[int, ...]
    spans: tuple[int, ...]
    pooled: Tensor | None
    steering: Tensor | None
    traced_at: int

    def row(self) -> list[int]:
        """The row of `Routing.table`."""
        addresses = (0 if given is None else given.data_ptr() for given in (self.steering, self.pooled))
        return [self.first, self.last, self.slot, *addresses, self.traced_at]

    @property
    def wishes(self) -> Steering:
        """`steering`, as the mathematics takes it."""
        return NO_WISH if self.steering is None else Steering(self.steering[0] > 0, *self.steering[1:])


class Routing(NamedTuple):
    """Every row of a step whose gates a router makes, layer by layer.

    table: int64 [R, 6], `runs` as kernels read them: first, last, slot, address of the steering, address of what is
    pooled (0 for none), traced_at.
    experts: int32 [entries]: which expert an entry of the batch's adapter rows is; -1 where its gate stays.
    span_experts: int32 [T, S], the same for the batch's spans of virtual positions; None where no expert brings any.
    log_gates: float32 [T, S], the batch's own, with the logarithms of experts' gates; None with span_experts.
    trace: float32 [L, G], written by the drivers: per traced run its rows' gates, [rows, N]; None where nobody looks.
    """

    runs: tuple[RoutedRun, ...]
    table: Tensor
    experts: Tensor
    trace: Tensor | None
    span_experts: Tensor | None = None
    log_gates: Tensor | None = None


class Source(Protocol):
    """What of a runner is needed here."""

    @property
    def num_layers(self) -> int: ...

    @property
    def transfer(self) -> Transfer: ...

    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor: ...


class _Gating:
    """One request's. `until` is the first of its tokens that has not been noted; noted ones do not count again."""

    def __init__(self, steering: Tensor | None, pooled: Tensor | None) -> None:
        self.steering = steering
        self.pooled = pooled
        self.until = 0
        self.count = 0
        self.sum: Tensor | None = None  # float64 [L, N]
        self.tokens: list[Tensor] = []  # [L, rows, N]

    def note(self, first_token: int, gates: Tensor, *, keep: bool) -> None:
        """Gates [L, rows, N] of consecutive tokens were made."""
        new = gates[:, max(0, self.until - first_token) :]
        if not new.shape[1]:
            return
        self.until = first_token + gates.shape[1]
        self.count += new.shape[1]
        total = new.sum(1, dtype=torch.float64)
        self.sum = total if self.sum is None else self.sum + total
        if keep:
            self.tokens.append(new.clone())

    def told(self) -> Gates | None:
        """Everything that was noted."""
        if self.sum is None:
            return None
        tokens = torch.cat(self.tokens, 1).transpose(0, 1).tolist() if self.tokens else []
        return Gates((self.sum / self.count).tolist(), tokens)


class Gatings:
    """Those of all requests that have begun to run."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._of: dict[Request, _Gating] = {}

    def __len__(self) -> int:
        return len(self._of)

    @property
    def num_layers(self) -> int:
        """Layers of the base."""
        return self._source.num_layers

    def begin(self, request: Request, mixture: MixtureUse) -> None:
        """The request runs; nothing happens where it did before."""
        if request in self._of:
            return
        steering = None
        if mixture.bounds:
            bounds = torch.tensor(mixture.bounds, dtype=torch.float32).mT.contiguous()
            (steering,) = self._source.transfer.up([bounds])
        pooled = self._source.mean_embedding(request.prompt_token_ids) if mixture.reads_prompt else None
        self._of[request] = _Gating(steering, pooled)

    def steering(self, request: Request) -> Tensor | None:
        """float32 [3, N], as `RoutedRun` has it."""
        return self._of[request].steering

    def pooled(self, request: Request) -> Tensor | None:
        """float32 [hidden]."""
        return self._of[request].pooled

    def note(self, step: Sequence[Scheduled], routing: Routing) -> None:
        """A step was computed and its trace is written; the requests' counters have not moved yet."""
        if routing.trace is None:
            return
        seen = [request for request, _ in step if request.mixture is not None]
        for run, request in zip(routing.runs, seen, strict=True):
            if run.traced_at < 0 or request.mixture is None:
                continue
            num_rows, num_experts = run.last - run.first, len(request.adapters)
            gates = routing.trace[:, run.traced_at : run.traced_at + num_rows * num_experts]
            gates = gates.view(len(gates), num_rows, num_experts)
            keep = request.mixture.sight is GateSight.TOKENS
            self._of[request].note(request.num_computed_tokens, gates, keep=keep)

    def end(self, request: Request) -> Gates | None:
        """The request is gone: what was noted of it."""
        gating = self._of.pop(request, None)
        return None if gating is None else gating.told()
