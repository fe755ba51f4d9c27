"""The routing kernel against the mathematics (weft/methods/mixture.py), and the independence of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.methods.test_mixture import BOUNDS, steering_of
from torch import Tensor

from weft.adapters.packed_adapter import build_router
from weft.adapters.slots import SlotTable
from weft.kernels.cpu import library, routing
from weft.kernels.step import Routing
from weft.methods import mixture
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams

HIDDEN = 200  # no multiple of a unit
LAYERS = 3
TOLERANCE = 2e-6  # float32, of gates: absolute


pytestmark = pytest.mark.skipif(not library.available(), reason=library.load().reason)


@dataclass
class Given:
    """A batch with one run for each mixture, whose rows take their experts in order, the first in two table rows."""

    hidden: Tensor
    table: Tensor
    experts: Tensor
    trace: Tensor | None
    offsets: Tensor
    slots: SlotTable
    kept: list[Tensor]

    def route(self, layer: int, *, log: bool = False) -> tuple[Tensor, Tensor | None]:
        values, logs = torch.full((len(self.experts),), 7.0), torch.full((len(self.experts),), 7.0)
        target = routing.Target(offsets=self.offsets, experts=self.experts, values=values)
        log_target = routing.Target(offsets=self.offsets, experts=self.experts, values=logs) if log else None
        routed = Routing((), self.table, self.experts, trace=self.trace)
        routing.route(self.hidden, layer, self.slots.routers, routed, target, log_target)
        return values, logs if log else None


def mixture_of(
    config: MixtureConfig, seed: int, *, layers: int = LAYERS, hidden: int = HIDDEN, scale: float = 0.1
) -> Mixture:
    shape = (1 if config.shared else layers, config.num_choices, hidden)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return Mixture(config, MixtureParams(weight), tuple(Expert(f"{i:064x}") for i in range(config.num_experts)))


def given(
    mixtures: Sequence[Mixture],
    *,
    rows: int = 5,
    plain: int = 2,
    dtype: torch.dtype = torch.float32,
    bounds: Sequence[tuple[tuple[bool, float, float], ...]] = (),
    pooled: Tensor | None = None,
    seed: int = 0,
) -> Given:
    """Make a batch with `plain` rows before each run, each with one entry and a gate of its own."""
    slots = SlotTable(num_sites=1, capacity_bytes=1 << 24, device=torch.device("cpu"))
    table, experts, counts, kept, traced, row = [], [], [], [], 0, 0
    for index, one in enumerate(mixtures):
        slot = slots.put(build_router(one))
        assert slot is not None
        counts += [1] * plain
        experts += [-1] * plain
        row += plain
        per_row = [0, *range(one.config.num_experts)]
        counts += [len(per_row)] * rows
        experts += per_row * rows
        steering = torch.tensor(bounds[index]).float().mT.contiguous() if bounds and bounds[index] else None
        kept += [tensor for tensor in (steering, pooled) if tensor is not None]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (steering, pooled)]
        table.append([row, row + rows, slot, *addresses, traced])
        traced += rows * one.config.num_experts
        row += rows
    hidden = torch.randn(row, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Given(
        hidden=hidden,
        table=torch.tensor(table),
        experts=torch.tensor(experts, dtype=torch.int32),
        trace=torch.full((LAYERS, traced), 9.0),
        offsets=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        slots=slots,
        kept=kept,
    )


def configs() -> list[MixtureConfig]:
    made = []
    for index in range(48):
        null = bool(index & 1)
        made.append(
            MixtureConfig(
                num_experts=3,
                top_k=1 + index % (3 + null),
                temperature=0.25 * (1 + index % 5),
                normalize=bool(index & 2),
                shared=bool(index & 4),
                null_expert=null,
                rms_norm=bool(index & 8),
                absolute=bool(index & 16),
            )
        )
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_gates_equal_the_mathematics(bounds: tuple[tuple[bool, float, float], ...], dtype: torch.dtype) -> None:
    mixtures = [mixture_of(config, seed) for seed, config in enumerate(configs())]
    batch = given(mixtures, dtype=dtype, bounds=[bounds] * len(mixtures))
    for layer in range(LAYERS):
        got, logs = batch.route(layer, log=True)
        assert batch.trace is not None
        assert logs is not None
        for (first, last, _, _, _, traced_at), one in zip(batch.table.tolist(), mixtures, strict=True):
            weight = one.params.at(layer).double()
            wanted = mixture.gates(one.config, weight, batch.hidden[first:last].double(), steering_of(bounds))
            entries = slice(int(batch.offsets[first]), int(batch.offsets[last]))
            both_rows = wanted[:, [0, 0, 1, 2]].float()
            torch.testing.assert_close(got[entries].view(-1, 4), both_rows, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(logs[entries], got[entries].log(), rtol=1e-6, atol=1e-6)
            told = batch.trace[layer, traced_at : traced_at + wanted.numel()].view_as(wanted)
            assert told.equal(got[entries].view(-1, 4)[:, 1:])
        assert (got[batch.experts < 0] == 7).all(), "gates that are no router's stay"


def test_the_comparison_sees_a_router_that_is_off() -> None:
    """Negative control."""
    one = mixture_of(MixtureConfig(num_experts=3, top_k=3), 1)
    batch = given([one], plain=0)
    got, _ = batch.route(0)
    wanted = mixture.gates(one.config, one.params.at(0) * 1.001, batch.hidden)
    assert (got.view(-1, 4)[:, 1:] - wanted).abs().max() > 5 * TOLERANCE
    other, _ = batch.route(1)
    assert not other.equal(got), "layers have routers of their own"


def test_what_hardly_anybody_was_given_is_no_infinite_share() -> None:
    """On a device on which such small exponentials are 0, they take no share."""
    weight = torch.tensor([0.0, -92.0, -92.0])[None, :, None].expand(1, 3, HIDDEN) / HIDDEN
    config = MixtureConfig(num_experts=3, top_k=3, shared=True)
    one = Mixture(config, MixtureParams(weight.contiguous()), tuple(Expert(f"{i:064x}") for i in range(3)))
    bounds = ((True, 0.0, 0.375), (True, 0.0, float("inf")), (True, 0.0, float("inf")))
    batch = given([one], plain=0, bounds=[bounds])
    batch.hidden.fill_(1.0)
    got, _ = batch.route(0)
    for share in (0.3125, 0.0):
        wanted = torch.tensor([0.375, 0.375, share, share]).expand(5, 4)
        if torch.allclose(got.view(-1, 4), wanted, rtol=0, atol=1e-4):
            return
    raise AssertionError(got)


def test_equal_logits_go_to_the_first() -> None:
    one = Mixture(
        MixtureConfig(num_experts=4, top_k=2, shared=True),
        MixtureParams(torch.ones(1, 4, HIDDEN)),
        tuple(Expert(f"{i:064x}") for i in range(4)),
    )
    got, _ = given([one], plain=0).route(0)
    assert got.view(-1, 5).equal(torch.tensor([0.5, 0.5, 0.5, 0, 0]).expand(5, 5))


def test_a_pooled_state_stands_for_all_rows() -> None:
    one, pooled = mixture_of(MixtureConfig(num_experts=3, top_k=2), 2), torch.randn(HIDDEN)
    got, _ = given([one], plain=0, pooled=pooled, dtype=torch.bfloat16).route(1)
    wanted = mixture.gates(one.config, one.params.at(1), pooled[None])
    torch.testing.assert_close(got.view(-1, 4)[:, 1:], wanted.expand(5, 3), rtol=0, atol=TOLERANCE)
    assert got.view(-1, 4).equal(got.view(-1, 4)[:1].expand(5, 4))


def test_a_row_s_bits_are_its_own() -> None:
    """Whatever the other rows hold, wherever the row lies, however many there are and however many threads."""
    one = mixture_of(MixtureConfig(num_experts=3, top_k=2, rms_norm=True), 3)
    batch = given([one] * 4, rows=200, seed=1)
    wanted, _ = batch.route(2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        again, _ = batch.route(2)
    finally:
        torch.set_num_threads(before)
    assert again.equal(wanted)
    first, last = batch.table[2, :2].tolist()
    mine = slice(int(batch.offsets[first]), int(batch.offsets[last]))
    other = given([one] * 4, rows=200, seed=2)
    other.hidden[first:last] = batch.hidden[first:last]
    moved, _ = other.route(2)
    assert moved[mine].equal(wanted[mine])
    assert not moved.equal(wanted), "negative control"
    alone = given([one], rows=1, plain=0)
    alone.hidden[0] = batch.hidden[first]
    assert alone.route(2)[0].equal(wanted[mine][:4])


def test_a_row_that_is_not_finite_is_lost_alone() -> None:
    batch = given([mixture_of(MixtureConfig(num_experts=3, top_k=1), 4)], plain=0)
    wanted, _ = batch.route(0)
    batch.hidden[2, 5] = float("nan")
    got, _ = batch.route(0)
    assert got.view(-1, 4)[2].isnan().all()
    assert got.view(-1, 4)[[0, 1, 3, 4]].equal(wanted.view(-1, 4)[[0, 1, 3, 4]])


def test_what_cannot_be_is_refused_and_nothing_is_written() -> None:
    one = mixture_of(MixtureConfig(num_experts=3, top_k=1), 5)

    def refused(match: str, **changes: Tensor) -> None:
        batch = given([one], plain=0)
        for name, value in changes.items():
            setattr(batch, name, value)
        with pytest.raises(ValueError, match=match):
            batch.route(0)
        assert batch.trace is None or (batch.trace == 9).all()

    batch = given([one], plain=0)
    table = batch.table
    refused("offsets", table=table.clone().index_fill_(1, torch.tensor([1]), 6))
    refused("slots: one is outside", table=table.clone().index_fill_(1, torch.tensor([2]), 99))
    refused("routers", table=table.clone().index_fill_(1, torch.tensor([2]), 3))  # a slot without a router
    refused("routers", table=table.clone().index_fill_(1, torch.tensor([5]), 1))  # beyond the trace
    refused("routers", experts=torch.full_like(batch.experts, 3))
    refused("routers", hidden=torch.randn(5, HIDDEN + 1))
    refused("hidden", hidden=torch.randn(5, HIDDEN).half())
    refused("offsets", offsets=batch.offsets[:-1].clone())
