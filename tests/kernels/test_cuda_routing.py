"""The routing kernel for CUDA against the mathematics (weft/methods/mixture.py), and the independence of its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from tests.kernels import test_cpu_routing
from tests.kernels.interpreted import DEVICE
from tests.kernels.partial_steps import step_of
from tests.methods.test_mixture import BOUNDS, steering_of
from torch import Tensor

from weft.adapters.packed_adapter import build_router
from weft.adapters.slots import SlotTable
from weft.kernels.cuda import routing
from weft.kernels.step import Entries, Routing
from weft.methods import mixture
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams

HIDDEN = 1100  # more than one iteration, and no multiple of it
LAYERS = 2
TOLERANCE = 3e-6  # float32, of gates: absolute
CHOICES = 16


@dataclass
class Given:
    """A batch with one run for each mixture, whose rows take their experts in order, the first in two table rows, and
    in spans in the opposite order. A run of no rows comes last, as padding has it."""

    hidden: Tensor
    table: Tensor
    experts: Tensor
    span_experts: Tensor | None
    log_gates: Tensor | None
    trace: Tensor | None
    offsets: Tensor
    slots: SlotTable
    kept: list[Tensor]

    def route(self, layer: int, num_choices: int = CHOICES) -> Tensor:
        gates = torch.full((len(self.experts),), 7.0, device=DEVICE)
        self.routers(gates, num_choices).enter(layer, self.hidden)
        return gates

    def routers(self, gates: Tensor, num_choices: int = CHOICES) -> routing.Routers:
        entries = Entries(self.offsets, torch.zeros_like(self.experts), gates)
        routed = Routing((), self.table, self.experts, self.span_experts, self.trace)
        return routing.Routers(self.slots, step_of(entries, routed, self.log_gates), num_choices)


mixture_of = partial(test_cpu_routing.mixture_of, layers=LAYERS, hidden=HIDDEN, scale=0.05)


def given(
    mixtures: Sequence[Mixture],
    *,
    rows: int = 2,
    plain: int = 1,
    dtype: torch.dtype = torch.float32,
    bounds: tuple[tuple[bool, float, float], ...] = (),
    pooled: Tensor | None = None,
    seed: int = 0,
) -> Given:
    """Make a batch with `plain` rows before each run, each with one entry and a gate of its own."""
    slots = SlotTable(num_sites=1, capacity_bytes=1 << 24, device=DEVICE)
    table, experts, spans, counts, kept, traced, row, slot = [], [], [], [], [], 0, 0, 0
    for one in mixtures:
        slot = slots.put(build_router(one))
        assert slot is not None
        num = one.config.num_experts
        counts += [1] * plain + [num + 1] * rows
        experts += [-1] * plain + [0, *range(num)] * rows
        spans += [[-1] * num] * plain + [list(reversed(range(num)))] * rows
        row += plain
        steering = torch.tensor(bounds, device=DEVICE).float().mT.contiguous() if bounds else None
        kept += [tensor for tensor in (steering, pooled) if tensor is not None]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (steering, pooled)]
        table.append([row, row + rows, slot, *addresses, traced])
        traced += rows * num
        row += rows
    table.append([row, row, slot, 0, 0, -1])
    slots.wait()
    hidden = torch.randn(row, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Given(
        hidden=hidden.to(DEVICE),
        table=torch.tensor(table, device=DEVICE),
        experts=torch.tensor(experts, dtype=torch.int32, device=DEVICE),
        span_experts=torch.tensor(spans, dtype=torch.int32, device=DEVICE),
        log_gates=torch.full((row, len(spans[0])), 7.0, device=DEVICE),
        trace=torch.full((LAYERS, traced), 9.0, device=DEVICE),
        offsets=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE),
        slots=slots,
        kept=kept,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_gates_equal_the_mathematics(bounds: tuple[tuple[bool, float, float], ...], dtype: torch.dtype) -> None:
    mixtures = [mixture_of(config, seed) for seed, config in enumerate(test_cpu_routing.configs()[::3])]
    batch = given(mixtures, dtype=dtype, bounds=bounds)
    assert batch.trace is not None
    assert batch.log_gates is not None
    for layer in range(LAYERS):
        got = batch.route(layer).cpu()
        for (first, last, _, _, _, traced_at), one in zip(batch.table.tolist(), mixtures, strict=False):
            weight = one.params.at(layer).double()
            wanted = mixture.gates(one.config, weight, batch.hidden[first:last].cpu().double(), steering_of(bounds))
            entries = slice(int(batch.offsets[first]), int(batch.offsets[last]))
            mine = got[entries].view(-1, 4)
            torch.testing.assert_close(mine, wanted[:, [0, 0, 1, 2]].float(), rtol=0, atol=TOLERANCE)
            logs = batch.log_gates[first:last].cpu()
            torch.testing.assert_close(logs, mine[:, 1:].flip(-1).log(), rtol=1e-6, atol=1e-6)
            told = batch.trace[layer, traced_at : traced_at + wanted.numel()].cpu().view_as(wanted)
            assert told.equal(mine[:, 1:])
        assert (got[batch.experts.cpu() < 0] == 7).all(), "gates that are no router's stay"
        assert (batch.log_gates[batch.span_experts < 0] == 7).all()


def test_the_comparison_sees_a_router_that_is_off() -> None:
    """Negative control."""
    one = mixture_of(MixtureConfig(num_experts=3, top_k=3), 1)
    batch = given([one], plain=0)
    got = batch.route(0).cpu()
    wanted = mixture.gates(one.config, one.params.at(0) * 1.001, batch.hidden.cpu())
    assert (got.view(-1, 4)[:, 1:] - wanted).abs().max() > 5 * TOLERANCE
    assert not batch.route(1).cpu().equal(got), "layers have routers of their own"


def test_what_hardly_anybody_was_given_is_no_infinite_share() -> None:
    """On a device on which such small exponentials are 0, they take no share."""
    weight = torch.tensor([0.0, -92.0, -92.0])[None, :, None].expand(1, 3, HIDDEN) / HIDDEN
    config = MixtureConfig(num_experts=3, top_k=3, shared=True)
    one = Mixture(config, MixtureParams(weight.contiguous()), tuple(Expert(f"{i:064x}") for i in range(3)))
    bounds = ((True, 0.0, 0.375), (True, 0.0, float("inf")), (True, 0.0, float("inf")))
    batch = given([one], plain=0, bounds=bounds)
    batch.hidden.fill_(1.0)
    got = batch.route(0).cpu()
    for share in (0.3125, 0.0):
        wanted = torch.tensor([0.375, 0.375, share, share]).expand(2, 4)
        if torch.allclose(got.view(-1, 4), wanted, rtol=0, atol=1e-4):
            return
    raise AssertionError(got)


def test_equal_logits_go_to_the_first() -> None:
    one = Mixture(
        MixtureConfig(num_experts=4, top_k=2, shared=True),
        MixtureParams(torch.ones(1, 4, HIDDEN)),
        tuple(Expert(f"{i:064x}") for i in range(4)),
    )
    got = given([one], plain=0).route(1).cpu()
    assert got.view(-1, 5).equal(torch.tensor([0.5, 0.5, 0.5, 0, 0]).expand(2, 5))


def test_a_pooled_state_stands_for_all_rows() -> None:
    one, pooled = mixture_of(MixtureConfig(num_experts=3, top_k=2, rms_norm=True), 2), torch.randn(HIDDEN)
    got = given([one], plain=0, pooled=pooled.to(DEVICE), dtype=torch.bfloat16).route(1).cpu()
    wanted = mixture.gates(one.config, one.params.at(1), pooled[None])
    torch.testing.assert_close(got.view(-1, 4)[:, 1:], wanted.expand(2, 3), rtol=0, atol=TOLERANCE)


def test_a_row_s_bits_are_its_own() -> None:
    """Whatever the other rows hold, and wherever the row lies."""
    one, another = (mixture_of(MixtureConfig(num_experts=3, top_k=2, rms_norm=True), seed) for seed in (3, 4))
    batch = given([another, one], seed=1)
    wanted = batch.route(1).cpu()
    first, last = batch.table[1, :2].tolist()
    mine = slice(int(batch.offsets[first]), int(batch.offsets[last]))
    other = given([another, one], seed=2)
    other.hidden[first:last] = batch.hidden[first:last]
    moved = other.route(1).cpu()
    assert moved[mine].equal(wanted[mine])
    assert not moved.equal(wanted), "negative control"
    alone = given([one], rows=1, plain=0)
    alone.hidden[0] = batch.hidden[first]
    assert alone.route(1).cpu().equal(wanted[mine][:4])


def test_a_mixture_of_many_experts_has_the_gates_of_the_mathematics() -> None:
    """More than an entry block, and as many as there is room for."""
    one = mixture_of(MixtureConfig(num_experts=40, top_k=7, null_expert=True), 6)
    batch = given([one], plain=0)
    wanted = mixture.gates(one.config, one.params.at(0), batch.hidden.cpu())
    got = batch.route(0, num_choices=64).cpu()
    torch.testing.assert_close(got.view(2, 41)[:, 1:], wanted, rtol=0, atol=TOLERANCE)


def test_a_row_that_is_not_finite_is_lost_alone() -> None:
    batch = given([mixture_of(MixtureConfig(num_experts=3, top_k=1), 4)], plain=0, rows=3)
    wanted = batch.route(0).cpu().view(-1, 4)
    batch.hidden[1, 5] = float("nan")
    got = batch.route(0).cpu().view(-1, 4)
    assert got[1].isnan().all()
    assert got[[0, 2]].equal(wanted[[0, 2]])


def test_what_is_not_asked_for_is_not_written() -> None:
    batch = given([mixture_of(MixtureConfig(num_experts=3, top_k=2), 5)])
    wanted = batch.route(1)
    batch.trace = batch.span_experts = batch.log_gates = None
    assert batch.route(1).equal(wanted)


@pytest.mark.parametrize("count", [1, 16, 64])
def test_a_layer_is_one_launch_and_reads_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of mixtures; a CUDA graph captures it."""

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: launched.append(grid)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    launched: list[tuple[int, ...]] = []
    batch = given([mixture_of(MixtureConfig(num_experts=3, top_k=2), seed) for seed in range(count)])
    gates = torch.full((len(batch.experts),), 7.0, device=DEVICE)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(routing, "_route", Counted())
        routers = batch.routers(gates)
        for layer in range(LAYERS):
            routers.enter(layer, batch.hidden)
        with pytest.raises(AssertionError, match="a tensor was read"):
            assert gates[0]
    assert launched == [(3 * count,)] * LAYERS
