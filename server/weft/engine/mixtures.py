"""Per-request mixture state: pooled prompt embedding, gate bounds, recorded gates.

Only the engine thread calls this. A request without a mixture costs nothing here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.engine.request import AdapterUse, GateDetail, Gates, MixtureUse, Request
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled
from weft.kernels.step import Routing


@dataclass(slots=True)
class MixtureState:
    """The state of one request.

    steering: the bounds, float32 [3, N], as in `RoutedRun`; None if there are none.
    pooled: the pooled prompt, float32 [hidden]; None if the router reads the rows.
    until: the first of its tokens whose gates are not recorded; none is recorded twice.
    """

    steering: Tensor | None
    pooled: Tensor | None
    until: int = 0
    count: int = 0
    sum: Tensor | None = None  # float64 [L, N]
    tokens: list[Tensor] = field(default_factory=list)  # [L, rows, N]

    def record(self, first_token: int, gates: Tensor, *, keep: bool) -> None:
        """Add gates [L, rows, N] of consecutive tokens."""
        new = gates[:, max(0, self.until - first_token) :]
        if not new.shape[1]:
            return
        self.until = first_token + gates.shape[1]
        self.count += new.shape[1]
        total = new.sum(1, dtype=torch.float64)
        self.sum = total if self.sum is None else self.sum + total
        if keep:
            self.tokens.append(new.clone())

    def recorded(self) -> Gates | None:
        if self.sum is None:
            return None
        tokens = torch.cat(self.tokens, 1).permute(2, 1, 0).flatten(1).tolist() if self.tokens else []
        return Gates((self.sum / self.count).tolist(), tokens)


class MixtureStates:
    """Mixture state of every running request."""

    def __init__(self, runner: Runner) -> None:
        self.num_layers = runner.num_layers
        self.of: dict[Request, MixtureState] = {}
        self._runner = runner

    def begin(self, request: Request, mixture: MixtureUse) -> None:
        """Make the request's state, unless it has one."""
        if request in self.of:
            return
        steering = None
        if mixture.bounds:
            bounds = torch.tensor(mixture.bounds, dtype=torch.float32).mT.contiguous()
            (steering,) = self._runner.transfer.to_device([bounds])
        pooled = self._runner.mean_embedding(request.prompt_token_ids) if mixture.reads_prompt else None
        self.of[request] = MixtureState(steering, pooled)

    def record(self, scheduled: Sequence[Scheduled], routing: Routing) -> None:
        """Add the gates of a step whose trace is written. Call it before the requests' counters move."""
        if routing.trace is None:
            return
        seen = [request for request, _ in scheduled if request.mixture is not None]
        for run, request in zip(routing.runs, seen, strict=True):
            if run.traced_at < 0 or request.mixture is None:
                continue
            num_rows, num_experts = run.last - run.first, len(request.adapters)
            gates = routing.trace[:, run.traced_at : run.traced_at + num_rows * num_experts]
            gates = gates.view(len(gates), num_rows, num_experts)
            keep = request.mixture.gate_detail is GateDetail.TOKENS
            self.of[request].record(request.num_computed_tokens, gates, keep=keep)

    def end(self, request: Request) -> Gates | None:
        """Drop the request's state; return the recorded gates."""
        state = self.of.pop(request, None)
        return None if state is None else state.recorded()


def experts_of(request: Request, uses: Iterable[AdapterUse]) -> list[int]:
    """Return which expert of the request's mixture each of `uses` is, by the order of digests; -1 without a mixture."""
    if request.mixture is None:
        return [-1 for _ in uses]
    digests = sorted(use.digest for use in request.adapters)
    return [digests.index(use.digest) for use in uses]
