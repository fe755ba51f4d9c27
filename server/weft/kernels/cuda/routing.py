"""A mixture's gates on CUDA: the mathematics of weft/methods/mixture.py, written where the delta kernels read gates.

    chances = softmax(W h / τ),  kept = the top_k largest, the first of equals,  gate = kept (/ their sum), bounded

One launch per layer serves all mixtures of a step. A program makes one row's gates, in float32, from the row's own
numbers; the program of a row without a router ends at once. Addresses come from tables on the device, and the host
reads nothing. Choices are taken one after another, so that a row's bits do not depend on how many another mixture has.
"""

# Kernels are Triton, which only looks like Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.cuda.tables import BY_STEP, matrix_at
from weft.kernels.slot_tables import SlotTables
from weft.kernels.step import Step

_BLOCK = 1024  # hidden numbers per iteration
_ENTRIES = 16  # entries of a row that are written at once
_BY_STEP = (*BY_STEP, "layer", "run_of", "runs", "num_runs", "routers", "experts", "num_spans", "trace_stride")
_NAN = tl.constexpr(float("nan"))
_NORM_EPS = tl.constexpr(1e-6)
_INFINITY = tl.constexpr(float("inf"))
_NORMALIZE, _ABSOLUTE, _RMS_NORM = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # flags of SlotTables.routers
_RUN, _ROUTER = tl.constexpr(6), tl.constexpr(8)  # columns of Routing.table and of SlotTables.routers


class Routers:
    """The routers of a step. They write the gates of its entries and the log-gates of its spans in place.

    num_choices: a power of two, at least the choices of every router of `slots`. All tensors are on the device.
    """

    def __init__(self, slots: SlotTables, step: Step, num_choices: int) -> None:
        assert step.entries is not None
        assert step.routing is not None
        self._routers = slots.device_routers
        self._routing = step.routing
        self._entries = step.entries
        self._log_gates = step.paging.log_gates
        self._num_choices = num_choices
        self._run_of = _run_of(step.routing.table, len(step.entries.offsets) - 1)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Begin a layer with the hidden states [T, hidden], float32 or bfloat16, of any row stride."""
        _, table, experts, span_experts, trace = self._routing
        offsets, _, gates = self._entries
        log_gates, nothing = self._log_gates, self._routers
        has_spans = span_experts is not None and log_gates is not None
        _route[(len(self._run_of),)](
            hidden, hidden.stride(0), hidden.shape[1], layer,
            self._run_of, table, len(table), self._routers,
            offsets, experts, gates,
            span_experts if has_spans else nothing, log_gates if has_spans else nothing,
            0 if log_gates is None else log_gates.shape[1],
            nothing if trace is None else trace, 0 if trace is None else trace.stride(0),
            SPANS=has_spans, TRACED=trace is not None,
            CHOICES=self._num_choices, ENTRIES=_ENTRIES, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def _run_of(table: Tensor, num_rows: int) -> Tensor:
    """Return the run of each row: int32 [T], R if it belongs to none. A padding run has no rows and comes last."""
    rows = torch.arange(num_rows, device=table.device)
    found = torch.searchsorted(table[:, 0].contiguous(), rows, right=True) - 1
    is_inside = (found >= 0) & (rows < table[:, 1][found.clamp(min=0)])
    return torch.where(is_inside, found, len(table)).int()


@triton.jit(do_not_specialize=_BY_STEP)
def _route(
    hidden, stride, size, layer, run_of, runs, num_runs, routers, offsets, experts, gates,
    span_experts, log_gates, num_spans, trace, trace_stride,
    SPANS: tl.constexpr, TRACED: tl.constexpr, CHOICES: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write all gates of one row in one layer."""
    row = tl.program_id(0)
    run = tl.load(run_of + row)
    if run < num_runs:
        of_run = runs + run.to(tl.int64) * _RUN
        router = routers + tl.load(of_run + 2) * _ROUTER
        num_experts = tl.load(router + 3).to(tl.int32)
        made = _gates(router, layer, hidden + row.to(tl.int64) * stride, size, of_run, CHOICES, BLOCK)
        choices = tl.arange(0, CHOICES)
        if TRACED:
            at = tl.load(of_run + 5)
            if at >= 0:
                at += layer * trace_stride + (row - tl.load(of_run)) * num_experts
                tl.store(trace + at + choices, made, mask=choices < num_experts)
        lanes = tl.arange(0, ENTRIES)
        end = tl.load(offsets + row + 1)
        for begin in range(tl.load(offsets + row), end, ENTRIES):
            n = begin + lanes
            expert = tl.load(experts + n, mask=n < end, other=-1)
            tl.store(gates + n, _at(made, expert, CHOICES), mask=expert >= 0)
        if SPANS:
            of_row = row.to(tl.int64) * num_spans
            for begin in range(0, num_spans, ENTRIES):
                n = begin + lanes
                expert = tl.load(span_experts + of_row + n, mask=n < num_spans, other=-1)
                tl.store(log_gates + of_row + n, tl.log(_at(made, expert, CHOICES)), mask=expert >= 0)


@triton.jit
def _at(made, expert, CHOICES: tl.constexpr):
    """Return the gates of some experts; 0 for -1."""
    return tl.sum(tl.where(expert[:, None] == tl.arange(0, CHOICES)[None, :], made[None, :], 0.0), 1)


@triton.jit
def _gates(router, layer, state, size, of_run, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Return the gates [CHOICES] of the row whose hidden state is at `state`; NaN if a logit is not finite."""
    num_experts = tl.load(router + 3).to(tl.int32)
    num_choices = tl.load(router + 4).to(tl.int32)
    place = tl.where(tl.load(router + 1) != 0, layer, 0)  # 0 if all layers share one
    weight = matrix_at(tl.load(router), tl.float32) + place.to(tl.int64) * num_choices * size
    flags = tl.load(router + 6).to(tl.int32)
    temperature = tl.load(router + 7).to(tl.int32).to(tl.float32, bitcast=True)
    steering = tl.load(of_run + 3).to(tl.pointer_type(tl.float32))
    has_wish = tl.load(of_run + 3) != 0
    pooled = tl.load(of_run + 4).to(tl.pointer_type(tl.float32))
    is_given = tl.load(of_run + 4) != 0
    lanes = tl.arange(0, BLOCK)
    choices = tl.arange(0, CHOICES)
    logits = tl.zeros([CHOICES], tl.float32)
    square = 0.0
    for choice in range(num_choices):
        products = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, size, BLOCK):
            i = begin + lanes
            own = tl.load(state + i, mask=(i < size) & ~is_given, other=0.0).to(tl.float32)
            given = tl.load(pooled + i, mask=(i < size) & is_given, other=0.0)
            h = own + given  # one of the two is 0
            products += h * tl.load(weight + i, mask=i < size, other=0.0)
            squares += h * h
        logits = tl.where(choices == choice, tl.sum(products, 0), logits)
        square = tl.sum(squares, 0)
        weight += size
    if (flags & _RMS_NORM) != 0:
        logits /= tl.sqrt(square / size + _NORM_EPS)
    logits /= temperature
    if (flags & _ABSOLUTE) != 0:
        logits = tl.abs(logits)
    is_choice = choices < num_choices
    is_expert = choices < num_experts
    num_lost = tl.sum(tl.where(is_choice & ~(tl.abs(logits) < _INFINITY), 1, 0), 0)
    allowed = tl.load(steering + choices, mask=is_expert & has_wish, other=1.0) != 0.0
    logits = tl.where(is_choice & allowed, logits, -_INFINITY)
    chances = tl.exp(logits - tl.max(logits, 0))
    chances /= tl.sum(chances, 0)
    left = tl.where(is_choice, chances, -1.0)
    made = tl.zeros([CHOICES], tl.float32)
    for _ in range(tl.load(router + 5).to(tl.int32)):
        first = tl.min(tl.where(left == tl.max(left, 0), choices, CHOICES), 0)
        made = tl.where(choices == first, chances, made)  # 0 for masked ones
        left = tl.where(choices == first, -1.0, left)
    if (flags & _NORMALIZE) != 0:
        made /= tl.sum(made, 0)
    made = tl.where(is_expert, made, 0.0)
    if has_wish:
        floor = tl.load(steering + num_experts + choices, mask=is_expert, other=0.0)
        ceiling = tl.load(steering + 2 * num_experts + choices, mask=is_expert, other=_INFINITY)
        made = _bounded(made, tl.where(allowed, floor, 0.0), ceiling, num_experts)
    return tl.where(num_lost == 0, made, _NAN)


@triton.jit
def _bounded(gates, low, high, num_experts):
    """Return the gates within their bounds; the others share the rest of the sum, as `mixture.steered` does it."""
    total = tl.sum(gates, 0)
    is_free = tl.where(gates > 0.0, 1, 0)
    fixed = tl.where(is_free == 1, 0.0, tl.minimum(low, high))
    for _ in range(num_experts):
        share = _share(gates, is_free, fixed, total)
        bounded = tl.minimum(tl.maximum(share, low), high)
        excess = tl.sum(tl.where(is_free == 1, bounded - share, 0.0), 0)
        by = tl.where(bounded > share, excess, tl.where(bounded < share, -excess, -1.0))
        is_broken = (is_free == 1) & (by >= 0.0)  # the bound that is broken by more in total
        fixed = tl.where(is_broken, bounded, fixed)
        is_free = tl.where(is_broken, 0, is_free)
    return tl.where(is_free == 1, _share(gates, is_free, fixed, total), fixed)


@triton.jit
def _share(gates, is_free, fixed, total):
    """Rescale the unbounded gates to share what the fixed ones leave of the sum."""
    weight = tl.sum(tl.where(is_free == 1, gates, 0.0), 0)
    taken = tl.sum(tl.where(is_free == 1, 0.0, fixed), 0)
    return tl.where(weight > 0.0, gates / tl.where(weight > 0.0, weight, 1.0) * tl.maximum(total - taken, 0.0), 0.0)
