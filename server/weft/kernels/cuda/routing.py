"""A mixture's gates on CUDA: the mathematics of weft/methods/mixture.py, written where the delta kernels read gates.

Routers run one request after another, so what this costs grows with the requests of mixtures in a step.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.kernels.cuda.deltas import Rows
from weft.kernels.routed import RoutedRows
from weft.methods.driver import Routed
from weft.methods.mixture import MixtureConfig, MixtureParams, Steering


class Run(Protocol):
    """Consecutive rows of one request whose gates a router makes."""

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int:
        """One past the last row."""
        ...

    @property
    def slot(self) -> Any:
        """Of the router."""
        ...

    @property
    def pooled(self) -> Tensor | None:
        """float32 [hidden], what the router reads instead of the rows."""
        ...

    @property
    def wishes(self) -> Steering:
        """What the request wants of its gates."""
        ...

    @property
    def traced_at(self) -> int:
        """Where in a layer of the trace its gates go; -1 for nowhere."""
        ...


class Runs(RoutedRows, Protocol):
    """A step's mixtures; `trace` and `log_gates` are on the device."""

    @property
    def runs(self) -> Sequence[Run]: ...


class Sources(Protocol):
    """Whoever has the routers."""

    def router(self, slot: Any, /) -> tuple[MixtureConfig, MixtureParams]:
        """A mixture's router, as a view of device memory."""
        ...


class _Written:
    """Gates that exist, by entry or by row and span, and which of them experts have."""

    def __init__(self, values: Tensor, rows: Tensor, experts: Tensor) -> None:
        self._values = values
        self._rows = rows
        self._is_routed = experts >= 0
        self._experts = experts.clamp(min=0).long()

    def write(self, made: Tensor) -> None:
        """Take the experts' own from `made` [T, experts]."""
        torch.where(self._is_routed, made[self._rows, self._experts], self._values, out=self._values)


class Routers:
    """The routers of a step. `gates` of the rows, and the log-gates of their spans, are written in place."""

    def __init__(self, slots: Sources, routed: Runs, rows: Rows) -> None:
        device = rows.gates.device
        self._num_rows = rows.num_rows
        self._trace = routed.trace
        self._runs: list[tuple[Run, Routed]] = []
        for run in routed.runs:
            wishes = Steering(*(None if wish is None else wish.to(device) for wish in run.wishes))
            mine = torch.arange(run.first, run.last, device=device)
            self._runs.append((run, Routed(*slots.router(run.slot), mine, wishes, run.pooled)))
        self._num_experts = max((slots.router(run.slot)[0].num_experts for run in routed.runs), default=0)
        self._gates = _Written(rows.gates, rows.rows_of.long(), routed.experts.to(device))
        self._log_gates: _Written | None = None
        if routed.span_experts is not None and routed.log_gates is not None:
            every_row = torch.arange(rows.num_rows, device=device)[:, None]
            self._log_gates = _Written(routed.log_gates, every_row, routed.span_experts.to(device))

    def enter(self, layer: int, hidden: Tensor) -> None:
        """A layer begins, with the hidden states [T, hidden]."""
        made = torch.zeros(self._num_rows, self._num_experts, dtype=torch.float32, device=hidden.device)
        for run, router in self._runs:
            router.enter(layer, hidden)
            gates = router.by_layer[-1]  # [rows of the run, its experts]
            made[run.first : run.last, : gates.shape[1]] = gates
            if self._trace is not None and run.traced_at >= 0:
                self._trace[layer, run.traced_at : run.traced_at + gates.numel()] = gates.reshape(-1)
        self._gates.write(made)
        if self._log_gates is not None:
            self._log_gates.write(made.log())
