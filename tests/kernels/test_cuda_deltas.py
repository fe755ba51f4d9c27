"""The delta kernels for CUDA against float64, and the promise that a row's bits do not depend on its neighbours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tests.kernels import test_cpu_deltas as textbook
from tests.kernels.interpreted import DEVICE
from tests.kernels.test_cpu_deltas import Adapter, Entries, bits, mixed_adapters, residual_of
from torch import Tensor

from weft.config import AdapterLimits
from weft.kernels import step
from weft.kernels.cuda import deltas, per_row
from weft.methods.protocol import DeltaKind

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZE_IN, SIZE_OUT = textbook.SIZE_IN, textbook.SIZE_OUT
NAN = float("nan")


class Slots(NamedTuple):
    """adapters: on the host, for the formula. held: their copies, to which the site's addresses point."""

    adapters: list[Adapter]
    held: list[Adapter]
    site: deltas.Site


def slots_of(adapters: Sequence[Adapter], weight_dtype: torch.dtype) -> Slots:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def rank(kind: DeltaKind, a: Tensor | None) -> int:
        if a is None or not (kind is DeltaKind.LORA or kind in textbook.BOTTLENECKS):
            return 0
        return len(a) if kind is DeltaKind.LORA else len(a) // 2

    held = [Adapter(kind, there(a), there(b)) for kind, a, b in adapters]
    table = [(int(kind), rank(kind, a), address(a), address(b)) for kind, a, b in held]
    site = deltas.Site(
        table=torch.tensor([table], dtype=torch.int64, device=DEVICE),
        size_in=SIZE_IN,
        sizes_out=(SIZE_OUT,),
        weight_dtype=weight_dtype,
        kinds=sum(1 << kind for kind in {adapter.kind for adapter in adapters}),
        rank=max(line[1] for line in table),
    )
    return Slots(list(adapters), held, site)


def rows_of(entries: Sequence[Entries]) -> deltas.Rows:
    flat = [entry for row in entries for entry in row]
    lengths = torch.tensor([0, *(len(row) for row in entries)])
    return deltas.rows_of(
        step.Entries(
            lengths.cumsum(0).to(torch.int32).to(DEVICE),
            torch.tensor([slot for slot, _ in flat], dtype=torch.int32, device=DEVICE),
            torch.tensor([gate for _, gate in flat], dtype=FLOAT32, device=DEVICE),
        )
    )


def run(x: Tensor, y: Tensor, entries: Sequence[Entries], slots: Slots) -> Tensor:
    out = y.to(DEVICE, copy=True)
    deltas.post(x.to(DEVICE), out, rows_of(entries), slots.site, residual_of(y).to(DEVICE))
    return out.cpu()


def formula(x: Tensor, y: Tensor, entries: Sequence[Entries], slots: Slots) -> Tensor:
    return textbook.reference(x, y, entries, textbook.slots_of(slots.adapters, slots.site.weight_dtype))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(params=["per row", "tiles"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose one of the two programs, whatever the number of rows."""
    monkeypatch.setattr(deltas, "PER_ROW_MAX", {"per row": 1 << 30, "tiles": 0}[request.param])
    return request.param


@pytest.mark.parametrize(
    ("popularity", "size", "dtype", "weight_dtype"),
    [
        ("identical", 35, FLOAT32, FLOAT32),  # more than a tile
        ("identical", 35, FLOAT32, BFLOAT16),
        ("identical", 35, BFLOAT16, FLOAT32),
        ("identical", 35, BFLOAT16, BFLOAT16),
        ("networks", 20, FLOAT32, BFLOAT16),
        ("networks", 1, BFLOAT16, FLOAT32),
        ("distinct", 18, BFLOAT16, BFLOAT16),
        ("distinct", 5, FLOAT32, FLOAT32),
        ("composed", 9, FLOAT32, FLOAT32),
        ("composed", 9, BFLOAT16, BFLOAT16),
    ],
)
@pytest.mark.usefixtures("program")
def test_post_is_the_formula(popularity: str, size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    slots = slots_of(mixed_adapters(weight_dtype), weight_dtype)
    entries = textbook.batch_of(popularity, size, len(slots.adapters))
    x, y = torch.randn(size, SIZE_IN).to(dtype), torch.randn(size, SIZE_OUT).to(dtype)
    textbook.assert_near(run(x, y, entries, slots), formula(x, y, entries, slots))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_pre_is_the_formula_and_writes_every_row(dtype: torch.dtype) -> None:
    adapters = [*mixed_adapters(FLOAT32), Adapter(DeltaKind.SCALE_INPUT, 1 + torch.randn(SIZE_IN) / 4)]
    slots, scales = slots_of(adapters, FLOAT32), [n for n, a in enumerate(adapters) if a.kind is DeltaKind.SCALE_INPUT]
    entries = [[], [(scales[0], 1.0)], [(0, 1.0)], [(scales[0], 0.5), (2, 1.0), (scales[1], -2.0)], [(scales[1], 0.0)]]
    x = torch.randn(5, SIZE_IN).to(dtype)
    out = torch.full((5, SIZE_IN), NAN, dtype=dtype, device=DEVICE)
    deltas.pre(x.to(DEVICE), out, rows_of(entries), slots.site)
    expected = x.double()
    for t, row in enumerate(entries):
        for slot, gate in row:
            if (scale := adapters[slot].a) is not None and slot in scales:
                expected[t] += gate * (scale.double() - 1) * x[t].double()
    textbook.assert_near(out.cpu(), expected)
    assert torch.equal(bits(out.cpu()[[0, 2, 4]]), bits(x[[0, 2, 4]]))


def rows_that_neighbours_change(x: Tensor, y: Tensor, entries: Sequence[Entries], slots: Slots) -> list[int]:
    """Return rows whose bits change when every second row gets other numbers and another adapter."""
    others = torch.arange(len(x)) % 2 == 1
    noisy_x, noisy_y = x.clone(), y.clone()
    noisy_x[others], noisy_y[others] = NAN, torch.randn_like(y[others])
    noisy = [[(0, -3.0)] if other else row for row, other in zip(entries, others.tolist(), strict=True)]
    before, after = run(x, y, entries, slots), run(noisy_x, noisy_y, noisy, slots)
    return [t for t in range(0, len(x), 2) if not torch.equal(bits(before[t]), bits(after[t]))]


@pytest.mark.parametrize(
    ("popularity", "dtype", "weight_dtype"),
    [("identical", FLOAT32, FLOAT32), ("networks", BFLOAT16, BFLOAT16), ("composed", FLOAT32, BFLOAT16)],
)
@pytest.mark.usefixtures("program")
def test_neighbours_do_not_change_a_rows_bits(dtype: torch.dtype, weight_dtype: torch.dtype, popularity: str) -> None:
    slots = slots_of(mixed_adapters(weight_dtype), weight_dtype)
    entries = textbook.batch_of(popularity, 8, len(slots.adapters))
    x, y = torch.randn(8, SIZE_IN).to(dtype), torch.randn(8, SIZE_OUT).to(dtype)
    assert rows_that_neighbours_change(x, y, entries, slots) == []


def test_the_detector_of_neighbours_detects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a kernel that adds a little of the row before."""
    post = deltas.post

    def leaky(x: Tensor, y: Tensor, *rest: object) -> None:
        post((x + x.roll(1, 0) * 1e-6).contiguous(), y, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(deltas, "post", leaky)
    slots = slots_of([textbook.lora(8, FLOAT32)], FLOAT32)
    x, y = torch.randn(6, SIZE_IN), torch.randn(6, SIZE_OUT)
    assert rows_that_neighbours_change(x, y, [[(0, 1.0)]] * 6, slots) == [0, 2, 4]


def test_lone_rows_have_their_bits_in_every_batch() -> None:
    """Even beside slots of larger ranks, and under another number."""
    slots = slots_of(mixed_adapters(BFLOAT16), BFLOAT16)
    entries = textbook.batch_of("composed", 7, len(slots.adapters))
    x, y = torch.randn(7, SIZE_IN).bfloat16(), torch.randn(7, SIZE_OUT).bfloat16()
    together = run(x, y, entries, slots)
    for t in (0, 3, 6):
        used = sorted({slot for slot, _ in entries[t]})
        alone = slots_of([slots.adapters[slot] for slot in used], BFLOAT16)
        renumbered = [[(used.index(slot), gate) for slot, gate in entries[t]]]
        assert torch.equal(bits(run(x[t : t + 1], y[t : t + 1], renumbered, alone)), bits(together[t : t + 1]))


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16)])
@pytest.mark.usefixtures("program")
def test_a_zero_gate_contributes_nothing(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    vectors = torch.cat([torch.tensor([1.0, 1.0, 1e-5]), torch.full((8 + 3 * SIZE_OUT,), NAN)])
    poison = [
        Adapter(DeltaKind.LORA, *(torch.full((8, size), NAN, dtype=weight_dtype) for size in (SIZE_IN, SIZE_OUT))),
        Adapter(DeltaKind.SCALE_OUTPUT, torch.full((SIZE_OUT,), NAN)),
        Adapter(DeltaKind.BIAS, torch.full((SIZE_OUT,), NAN)),
        *(
            Adapter(kind, torch.full((2 * 8, SIZE_OUT), NAN, dtype=weight_dtype), vectors)
            for kind in textbook.BOTTLENECKS
        ),
    ]
    mixed = mixed_adapters(weight_dtype)
    slots = slots_of([*mixed, *poison], weight_dtype)
    poisoned = range(len(mixed), len(mixed) + len(poison))
    x, y = torch.randn(20, SIZE_IN).to(dtype), torch.randn(20, SIZE_OUT).to(dtype)
    bits(y)[[1, 18]] = 0x7F800001 if dtype is FLOAT32 else 0x7F81  # a signalling NaN, which any arithmetic would quiet
    # Rows with one list of slots share a tile; in it, gates differ by row.
    entries: list[Entries] = [[(slot, 1.0), (2, 1.0)] for slot in poisoned]
    open_rows = list(range(len(entries)))
    entries[1] = [(slot, 0.0) for slot in (*poisoned, 2)]
    entries += [[(slot, gate), (2, 1.0)] for slot, gate in zip(poisoned, [0.0, -0.0] * 4, strict=False)]
    entries += [[(slot, 0.0) for slot in poisoned] + [(2, 1.0)], [(2, 1.0)], [], [(7, 1.0), (8, 1.0)], [], [(3, 2.0)]]
    assert len(entries) == len(x)
    without = [[(slot, gate) for slot, gate in row if gate] for row in entries]
    got, expected = run(x, y, entries, slots), run(x, y, without, slots)
    shut = [t for t in range(len(x)) if t not in open_rows or t == 1]
    assert torch.equal(bits(got[shut]), bits(expected[shut]))
    assert all(got[t].isnan().all() for t in open_rows if t != 1)
    untouched = [t for t in range(len(x)) if not any(slot not in (7, 8) for slot, _ in without[t])]
    assert untouched == [1, 16, 17, 18]
    assert torch.equal(bits(got[untouched]), bits(y[untouched]))


@pytest.mark.usefixtures("program")
def test_rows_may_be_strided_and_entries_may_belong_to_nobody() -> None:
    slots = slots_of(mixed_adapters(FLOAT32), FLOAT32)
    entries = textbook.batch_of("composed", 5, len(slots.adapters))
    wide_x, wide_y = torch.randn(1, 5, SIZE_IN + 3), torch.randn(1, 5, SIZE_OUT + 5)
    out = wide_y.to(DEVICE, copy=True)
    rows = rows_of([*entries, [(0, NAN), (10, NAN)]])
    rows = deltas.rows_of(rows.entries._replace(offsets=rows.entries.offsets[:-1]))
    x, y = wide_x[..., :SIZE_IN], wide_y[..., :SIZE_OUT]
    deltas.post(x.to(DEVICE), out[..., :SIZE_OUT], rows, slots.site, residual_of(y).to(DEVICE))
    textbook.assert_near(out[0, :, :SIZE_OUT].cpu(), formula(x[0], y[0], entries, slots))
    assert torch.equal(out[..., SIZE_OUT:].cpu(), wide_y[..., SIZE_OUT:])


@pytest.mark.parametrize("sizes_out", [(300, 140), (130, 257, 5)])
@pytest.mark.usefixtures("program")
def test_a_group_has_the_bits_of_its_sites(sizes_out: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many launches as for one of them; some adapters act only at some of the sites."""
    adapters = [
        [Adapter(DeltaKind.LORA, torch.randn(rank, SIZE_IN) / 14, torch.randn(rank, size) / 4) for size in sizes_out]
        for rank in (3, 16, 33)
    ]
    adapters += [[Adapter(DeltaKind.SCALE_OUTPUT, torch.randn(size)) for size in sizes_out]]
    adapters += [[Adapter(DeltaKind.BIAS, torch.randn(size)) for size in sizes_out]]
    adapters[1][0] = adapters[3][1] = Adapter(DeltaKind.NONE)
    one_by_one = [slots_of(column, FLOAT32) for column in zip(*adapters, strict=True)]
    group = replace(
        one_by_one[0].site,
        table=torch.cat([slots.site.table for slots in one_by_one]),
        sizes_out=sizes_out,
        kinds=1 << DeltaKind.LORA | 1 << DeltaKind.SCALE_OUTPUT | 1 << DeltaKind.BIAS,
        rank=33,
    )
    entries = [[(t % 5, 1.0), ((t + 1) % 5, -0.5)] for t in range(9)]
    x, y, rows = torch.randn(9, SIZE_IN, device=DEVICE), torch.randn(9, sum(sizes_out), device=DEVICE), rows_of(entries)
    together, apart = y.clone(), y.clone()
    launched = launches_of(lambda: deltas.post(x, together, rows, group), monkeypatch)
    for part, slots, size in zip(apart.split(sizes_out, -1), one_by_one, sizes_out, strict=True):
        deltas.post(x, part, rows, replace(slots.site, sizes_out=(size,)))
    assert launched == ["shrink", "expand"]
    assert torch.equal(bits(together.cpu()), bits(apart.cpu()))
    assert not torch.equal(together, y)


@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.usefixtures("program")
def test_the_largest_rank_that_is_allowed(num_rows: int) -> None:
    """Lone rows and tiles, beside a small rank."""
    rank = AdapterLimits().rank_max
    slots = slots_of([textbook.lora(rank, FLOAT32), textbook.lora(3, FLOAT32)], FLOAT32)
    entries: list[Entries] = [[(0, 1.0), (1, -0.5)]] * num_rows
    x, y = torch.randn(num_rows, SIZE_IN), torch.randn(num_rows, SIZE_OUT)
    textbook.assert_near(run(x, y, entries, slots), formula(x, y, entries, slots))


def test_empty_batches_are_nothing() -> None:
    slots = slots_of([textbook.lora(3, FLOAT32)], FLOAT32)
    for num_rows in (0, 3):
        x, y = torch.randn(num_rows, SIZE_IN), torch.randn(num_rows, SIZE_OUT)
        assert torch.equal(run(x, y, [[]] * num_rows, slots), y)


def test_long_inputs_are_summed_in_parts() -> None:
    """With a rank that is not a whole block, and few outputs."""
    a, b = torch.randn(5, 2100) / 50, torch.randn(5, 7)
    a_there, b_there = a.to(DEVICE), b.to(DEVICE)
    table = torch.tensor([[[DeltaKind.LORA, 5, a_there.data_ptr(), b_there.data_ptr()]]], device=DEVICE)
    site = deltas.Site(
        table=table, size_in=2100, sizes_out=(7,), weight_dtype=FLOAT32, kinds=1 << DeltaKind.LORA, rank=5
    )
    x, y = torch.randn(2, 2100), torch.randn(2, 7)
    out = y.to(DEVICE, copy=True)
    deltas.post(x.to(DEVICE), out, rows_of([[(0, 1.0)], [(0, -0.5)]]), site)
    gates = torch.tensor([[1.0], [-0.5]]).double()
    textbook.assert_near(out.cpu(), y.double() + gates * (x.double() @ a.double().T @ b.double()))


def launches_of(call: object, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that a call launches."""
    launched: list[str] = []
    kind = type(per_row._expand)
    take = kind.__getitem__

    def counting(kernel: object, grid: object) -> object:
        launched.append(kernel.__name__.removeprefix("_"))  # pyright: ignore[reportAttributeAccessIssue]
        return take(kernel, grid)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__getitem__", counting)
        call()  # pyright: ignore[reportCallIssue]
    return launched


@pytest.mark.usefixtures("program")
def test_launches_depend_on_kinds_not_on_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(adapters: list[Adapter], num_rows: int) -> list[str]:
        slots = slots_of(adapters, FLOAT32)
        entries = textbook.batch_of("distinct", num_rows, len(adapters))
        x, y = torch.randn(num_rows, SIZE_IN), torch.randn(num_rows, SIZE_OUT)
        return launches_of(lambda: run(x, y, entries, slots), monkeypatch)

    def network(kind: DeltaKind) -> Adapter:
        return textbook.bottleneck(kind, 4, 0, FLOAT32, norm=True)

    scale, bias = Adapter(DeltaKind.SCALE_OUTPUT, torch.ones(SIZE_OUT)), Adapter(DeltaKind.BIAS, torch.ones(SIZE_OUT))
    assert launches([textbook.lora(2, FLOAT32)], 1) == ["shrink", "expand"]
    assert launches([textbook.lora(1 + n, FLOAT32) for n in range(9)], 9) == ["shrink", "expand"]
    assert launches([scale, bias], 2) == ["expand"]
    assert launches([scale, textbook.lora(2, FLOAT32), bias], 6) == ["shrink", "expand"]
    assert launches([network(DeltaKind.BOTTLENECK)] * 3, 3) == ["fill", "shrink", "expand"]
    assert launches([network(DeltaKind.BOTTLENECK_NORMED)], 1) == ["fill", "shrink", "finish", "expand"]


def test_what_does_not_fit_is_refused() -> None:
    slots = slots_of(
        [textbook.lora(3, FLOAT32), textbook.bottleneck(DeltaKind.BOTTLENECK_SUM, 2, 0, FLOAT32, norm=False)], FLOAT32
    )
    site, rows = slots.site, rows_of([[(0, 1.0)], []])
    x, y = torch.randn(2, SIZE_IN, device=DEVICE), torch.randn(2, SIZE_OUT, device=DEVICE)
    before = y.clone()

    def tampered(**changes: Tensor) -> deltas.Rows:
        return deltas.rows_of(rows.entries._replace(**changes))

    bad_calls = [
        ("x: needs .2, 200", lambda: deltas.post(x[:1], y, rows, site, y)),
        ("y: needs .2, 548", lambda: deltas.post(x, y[:, :-1], rows, site, y)),
        ("y: needs the dtype of x", lambda: deltas.post(x, y.bfloat16(), rows, site, y)),
        ("x: needs float32 or bfloat16", lambda: deltas.post(x.half(), y.half(), rows, site, y.half())),
        ("y: needs a contiguous last", lambda: deltas.post(x, y.T.contiguous().T, rows, site, y)),
        ("x: carries a gradient", lambda: deltas.post(x.clone().requires_grad_(), y, rows, site, y)),
        ("residual: needs one", lambda: deltas.post(x, y, rows, site)),
        ("residual: needs .2, 548", lambda: deltas.post(x, y, rows, site, x)),
        ("out: needs memory of its own", lambda: deltas.pre(x, x, rows, site)),
        ("offsets: needs a contiguous vector", lambda: tampered(offsets=torch.zeros(3))),
        ("offsets: needs T", lambda: tampered(offsets=torch.empty(0, dtype=torch.int32, device=DEVICE))),
        ("gates: needs one for each of 1", lambda: tampered(gates=torch.zeros(3, device=DEVICE))),
        ("table: needs contiguous", lambda: replace(site, table=site.table.mT)),
        ("weight_dtype", lambda: replace(site, weight_dtype=torch.half)),
        ("size_in", lambda: replace(site, size_in=0)),
        ("sizes_out: needs one for each of 1", lambda: replace(site, sizes_out=(1, 2))),
        ("sizes_out: needs .* up to 3", lambda: replace(site, table=site.table.expand(4, -1, -1).contiguous())),
        ("kinds: .* of their own", lambda: replace(site, table=site.table.repeat(2, 1, 1), sizes_out=(3, 4))),
        ("rank: needs at least 1", lambda: replace(site, rank=0)),
    ]
    for text, call in bad_calls:
        with pytest.raises(ValueError, match=text):
            call()
    assert torch.equal(y, before)
