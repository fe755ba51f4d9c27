"""Per-request mixture state (pooled prompt embedding, gate bounds, recorded gates), and a step's rows of mixtures.

Only the engine thread calls this. A request without a mixture costs nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine.request import GateDetail, Gates, MixtureUse, Request
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled
from weft.kernels.step import RoutedRun, Routing


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
        tokens = torch.cat(self.tokens, 1).transpose(0, 1).tolist() if self.tokens else []
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


class RoutedRows:
    """Gathers the rows of mixtures while a step is built, request by request.

    spans: for each request of the step, which experts provide its virtual positions; () without a mixture.
    """

    def __init__(self, states: MixtureStates | None) -> None:
        self.spans: list[Sequence[int]] = []
        self._states = states
        self._runs: list[RoutedRun] = []
        self._experts: list[tuple[int, list[int], int]] = []  # of each run: first entry, experts of a row, rows
        self._num_traced = 0

    def __len__(self) -> int:
        return len(self._runs)

    def add(
        self,
        request: Request,
        mixture: MixtureUse,
        router: AdapterSlot,
        num_table_rows: Sequence[int],
        rows: tuple[int, int],
        first_entry: int,
    ) -> None:
        """Add a request with a mixture. num_table_rows: entries per row of each of its uses with deltas."""
        assert self._states is not None
        state = self._states.of[request]
        first, last = rows
        digests = sorted(use.digest for use in request.adapters)
        experts = [digests.index(use.digest) for use in request.adapters if not use.num_virtual_tokens]
        of_row = [expert for expert, count in zip(experts, num_table_rows, strict=True) for _ in range(count)]
        self._experts.append((first_entry, of_row, last - first))
        self.spans.append([digests.index(use.digest) for use in request.spans])
        traced_at = -1
        if mixture.gate_detail is not GateDetail.NONE:
            traced_at = self._num_traced
            self._num_traced += (last - first) * len(digests)
        self._runs.append(
            RoutedRun(
                first=first,
                last=last,
                slot=router,
                spans=tuple(self.spans[-1]),
                pooled=state.pooled,
                steering=state.steering,
                traced_at=traced_at,
            )
        )

    def routing(self, span_experts: Tensor | None, num_entries: int) -> Routing | None:
        """Return the gathered rows of a step with `num_entries` entries, or None if no request has a mixture."""
        if not self._runs or self._states is None:
            return None
        experts = torch.full((num_entries,), -1, dtype=torch.int32)
        for first, of_row, num_rows in self._experts:
            experts[first : first + len(of_row) * num_rows] = torch.tensor(of_row * num_rows, dtype=torch.int32)
        return Routing(
            tuple(self._runs),
            torch.tensor([run.row() for run in self._runs], dtype=torch.int64),
            experts,
            span_experts,
            torch.zeros(self._states.num_layers, self._num_traced) if self._num_traced else None,
        )
