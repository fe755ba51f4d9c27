"""The CPU delta kernels against float64, and the promise that a row's bits are its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.kernels import step
from weft.kernels.cpu import deltas, library
from weft.methods.protocol import DeltaKind

pytestmark = pytest.mark.skipif(not library.available(), reason=library.load().reason or "the kernels are there")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NAN = float("nan")
SIZE_IN, SIZE_OUT = 200, 548  # no multiples of 32; several chunks of outputs
RANKS = (1, 3, 8, 16, 64)
BOTTLENECKS = (
    DeltaKind.BOTTLENECK,
    DeltaKind.BOTTLENECK_SUM,
    DeltaKind.BOTTLENECK_RESIDUAL,
    DeltaKind.BOTTLENECK_NORMED,
)
ACTIVATIONS = (torch.nn.functional.relu, torch.nn.functional.gelu, torch.nn.functional.silu)  # by number
Entries = list[tuple[int, float]]  # (slot, gate) of one row


class Adapter(NamedTuple):
    """One slot at the test's site; `a` and `b` depend on the kind, as in the table."""

    kind: DeltaKind
    a: Tensor | None = None
    b: Tensor | None = None


class Slots(NamedTuple):
    adapters: list[Adapter]
    site: deltas.Site

    def shuffled(self) -> tuple["Slots", list[int]]:
        """Return the same adapters under other numbers, and the new number of each."""
        order = torch.randperm(len(self.adapters)).tolist()
        moved = [self.adapters[old] for old in order]
        return slots_of(moved, self.site.weight_dtype), [order.index(old) for old in range(len(order))]


def slots_of(adapters: list[Adapter], weight_dtype: torch.dtype) -> Slots:
    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def rank(kind: DeltaKind, a: Tensor | None) -> int:
        if a is None or not (kind is DeltaKind.LORA or kind in BOTTLENECKS):
            return 0
        return len(a) if kind is DeltaKind.LORA else len(a) // 2

    rows = [(int(kind), rank(kind, a), address(a), address(b)) for kind, a, b in adapters]
    site = deltas.Site(
        table=torch.tensor(rows, dtype=torch.int64), size_in=SIZE_IN, size_out=SIZE_OUT, weight_dtype=weight_dtype
    )
    return Slots(adapters, site)


def lora(rank: int, weight_dtype: torch.dtype) -> Adapter:
    a = torch.randn(rank, SIZE_IN) * SIZE_IN**-0.5
    b = torch.randn(rank, SIZE_OUT) * rank**-0.5
    return Adapter(DeltaKind.LORA, a.to(weight_dtype), b.to(weight_dtype))


def bottleneck(kind: DeltaKind, rank: int, activation: int, weight_dtype: torch.dtype, *, norm: bool) -> Adapter:
    has_norm = norm or kind is DeltaKind.BOTTLENECK_NORMED
    down, up = torch.randn(rank, SIZE_OUT) * SIZE_OUT**-0.5, torch.randn(rank, SIZE_OUT) * rank**-0.5
    vectors = [torch.tensor([activation, has_norm, 1e-5]), torch.randn(rank), torch.randn(SIZE_OUT)]
    if has_norm:
        vectors += [1 + torch.randn(SIZE_OUT) / 4, torch.randn(SIZE_OUT)]
    return Adapter(kind, torch.cat([down, up]).to(weight_dtype), torch.cat(vectors))


def mixed_adapters(weight_dtype: torch.dtype) -> list[Adapter]:
    """Every rank and kind; the input scale and the idle slot do nothing in `post`."""
    return [
        *(lora(rank, weight_dtype) for rank in RANKS),
        Adapter(DeltaKind.SCALE_OUTPUT, 1 + torch.randn(SIZE_OUT) / 4),
        Adapter(DeltaKind.BIAS, torch.randn(SIZE_OUT)),
        Adapter(DeltaKind.NONE),
        Adapter(DeltaKind.SCALE_INPUT, 1 + torch.randn(SIZE_IN) / 4),
        lora(8, weight_dtype),
        *(
            bottleneck(kind, rank, activation, weight_dtype, norm=norm)
            for kind, rank, activation, norm in zip(
                (*BOTTLENECKS, *BOTTLENECKS),
                (8, 3, 1, 16, 33, 7, 64, 2),
                (0, 1, 2, 0, 1, 2, 0, 2),
                (1, 0, 1, 1, 0, 1, 0, 1),
                strict=True,
            )
        ),
    ]


def residual_of(y: Tensor) -> Tensor:
    """Return a residual stream that moves with its row, wherever a test puts the row."""
    return y.flip(-1)


def rows_of(entries: Sequence[Entries]) -> deltas.Packed:
    flat = [entry for row in entries for entry in row]
    lengths = torch.tensor([0, *(len(row) for row in entries)])
    return deltas.pack(
        step.Entries(
            lengths.cumsum(0).to(torch.int32),
            torch.tensor([slot for slot, _ in flat], dtype=torch.int32),
            torch.tensor([gate for _, gate in flat], dtype=FLOAT32),
        )
    )


def batch_of(popularity: str, size: int, num_slots: int) -> list[Entries]:
    """Return the entries of each row, along one of punica's axes or as compositions of up to eight."""
    if popularity == "identical":
        return [[(3, 1.0)]] * size
    if popularity == "networks":  # runs of every bottleneck
        return [[(10 + t // 5 % 8, 1.0)] for t in range(size)]
    if popularity == "distinct":
        return [[(t % num_slots, 1.0)] for t in range(size)]
    if popularity == "uniform":
        return [[(int(slot), 1.0)] for slot in torch.randint(num_slots, (size,))]
    if popularity == "zipf":
        weights = 1 / torch.arange(1, num_slots + 1) ** 1.5
        return [[(int(slot), 1.0)] for slot in torch.multinomial(weights, size, replacement=True)]
    lengths = torch.randint(9, (size,)).tolist()
    rows = [
        [(int(slot), float(gate)) for slot, gate in zip(torch.randperm(num_slots)[:n], torch.randn(n), strict=False)]
        for n in lengths
    ]
    return [row for row in rows for _ in range(3)][:size]  # runs of equal rows, as a prompt makes them


def reference(x: Tensor, y: Tensor, entries: Sequence[Entries], slots: Slots) -> Tensor:
    """Return the formula's result in float64."""
    out = y.double().clone()
    for t, row in enumerate(entries):
        for slot, gate in row:
            kind, a, b = slots.adapters[slot]
            if kind is DeltaKind.LORA and a is not None and b is not None:
                out[t] += gate * (x[t].double() @ a.double().T @ b.double())
            elif kind is DeltaKind.SCALE_OUTPUT and a is not None:
                out[t] += gate * (a.double() - 1) * y[t].double()
            elif kind is DeltaKind.BIAS and a is not None:
                out[t] += gate * a.double()
            elif kind in BOTTLENECKS and a is not None and b is not None:
                out[t] += gate * bottleneck_delta(kind, a.double(), b, y[t].double(), residual_of(y)[t].double())
    return out


def bottleneck_delta(kind: DeltaKind, a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return one row's result in float64."""
    rank, size = len(a) // 2, a.shape[1]
    activation, has_norm, eps = b[:3].tolist()
    down_bias, up_bias, *norm = b.double()[3:].split([rank, size, *([size, size] if has_norm else [])])

    def f(z: Tensor) -> Tensor:
        return ACTIVATIONS[int(activation)](a[:rank] @ z + down_bias) @ a[rank:] + up_bias

    def normed(z: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(z, (size,), *norm, eps) if norm else z

    if kind is DeltaKind.BOTTLENECK_NORMED:
        return normed(y + f(y)) - y
    return f(normed({DeltaKind.BOTTLENECK: y, DeltaKind.BOTTLENECK_SUM: y + r, DeltaKind.BOTTLENECK_RESIDUAL: r}[kind]))


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Check that results are within float32's rounding of such sums, and one rounding to the output's dtype."""
    rounding = {FLOAT32: 1e-6, BFLOAT16: 2**-8}[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=1e-5)


def run(x: Tensor, y: Tensor, entries: Sequence[Entries], slots: Slots) -> Tensor:
    out = y.clone()
    deltas.post(x, out, rows_of(entries), slots.site, residual_of(y))
    return out


def bits(given: Tensor) -> Tensor:
    return given.view(torch.int32 if given.dtype is FLOAT32 else torch.int16)


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[Callable[[int], None]]:
    """Use one thread, unless a test sets more: on a busy machine two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 67])
@pytest.mark.parametrize("popularity", ["identical", "networks", "distinct", "uniform", "zipf", "composed"])
@pytest.mark.parametrize("weight_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_post_is_the_formula(dtype: torch.dtype, weight_dtype: torch.dtype, popularity: str, size: int) -> None:
    slots = slots_of(mixed_adapters(weight_dtype), weight_dtype)
    entries = batch_of(popularity, size, len(slots.adapters))
    x, y = torch.randn(size, SIZE_IN).to(dtype), torch.randn(size, SIZE_OUT).to(dtype)
    assert_near(run(x, y, entries, slots), reference(x, y, entries, slots))


@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_largest_rank_that_is_allowed(dtype: torch.dtype, num_rows: int) -> None:
    """Beside a small rank."""
    slots = slots_of([lora(AdapterLimits().rank_max, dtype), lora(3, dtype)], dtype)
    entries: list[Entries] = [[(0, 1.0), (1, -0.5)]] * num_rows
    x, y = torch.randn(num_rows, SIZE_IN).to(dtype), torch.randn(num_rows, SIZE_OUT).to(dtype)
    assert_near(run(x, y, entries, slots), reference(x, y, entries, slots))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_pre_is_the_formula_and_writes_every_row(dtype: torch.dtype) -> None:
    adapters = [*mixed_adapters(FLOAT32), Adapter(DeltaKind.SCALE_INPUT, 1 + torch.randn(SIZE_IN) / 4)]
    slots, scales = slots_of(adapters, FLOAT32), [n for n, a in enumerate(adapters) if a.kind is DeltaKind.SCALE_INPUT]
    entries = [[], [(scales[0], 1.0)], [(0, 1.0)], [(scales[0], 0.5), (2, 1.0), (scales[1], -2.0)], [(scales[1], 0.0)]]
    x, out = torch.randn(5, SIZE_IN).to(dtype), torch.full((5, SIZE_IN), torch.nan, dtype=dtype)
    deltas.pre(x, out, rows_of(entries), slots.site)
    expected = x.double()
    for t, row in enumerate(entries):
        for slot, gate in row:
            if (scale := adapters[slot].a) is not None and slot in scales:
                expected[t] += gate * (scale.double() - 1) * x[t].double()
    assert_near(out, expected)
    assert torch.equal(bits(out[[0, 2, 4]]), bits(x[[0, 2, 4]]))


def rows_with_others_in_their_bits(
    post: Callable[[Tensor, Tensor, Sequence[Entries]], Tensor], x: Tensor, y: Tensor, entries: Sequence[Entries]
) -> list[int]:
    """Return rows whose bits change in company, in another order, or beside other neighbours."""
    together = post(x, y, entries)
    order = torch.randperm(len(x))
    permuted = torch.empty_like(together)
    permuted[order] = post(x[order], y[order], [entries[t] for t in order.tolist()])
    others = torch.arange(len(x)) % 2 == 1
    noisy_x, noisy_y = x.clone(), y.clone()
    noisy_x[others], noisy_y[others] = torch.randn_like(x[others]), torch.randn_like(y[others])
    noisy_entries = [[(0, -3.0)] if other else row for row, other in zip(entries, others.tolist(), strict=True)]
    noisy = post(noisy_x, noisy_y, noisy_entries)
    return [
        t
        for t in range(len(x))
        if not torch.equal(bits(together[t]), bits(post(x[t : t + 1], y[t : t + 1], entries[t : t + 1])[0]))
        or not torch.equal(bits(together[t]), bits(permuted[t]))
        or (not others[t] and not torch.equal(bits(together[t]), bits(noisy[t])))
    ]


@pytest.mark.parametrize("popularity", ["identical", "networks", "zipf", "composed"])
@pytest.mark.parametrize("weight_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_rows_bits_are_its_own(
    dtype: torch.dtype, weight_dtype: torch.dtype, popularity: str, num_threads: Callable[[int], None]
) -> None:
    slots = slots_of(mixed_adapters(weight_dtype), weight_dtype)
    entries = batch_of(popularity, 45, len(slots.adapters))
    x, y = torch.randn(45, SIZE_IN).to(dtype), torch.randn(45, SIZE_OUT).to(dtype)
    assert rows_with_others_in_their_bits(lambda x, y, entries: run(x, y, entries, slots), x, y, entries) == []

    num_threads(2)
    two = run(x, y, entries, slots)
    num_threads(1)
    assert torch.equal(bits(run(x, y, entries, slots)), bits(two))

    moved, where = slots.shuffled()
    renumbered = [[(where[slot], gate) for slot, gate in row] for row in entries]
    assert torch.equal(bits(run(x, y, renumbered, moved)), bits(two))


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_threads_share_out_the_parts_of_a_single_block(
    dtype: torch.dtype, size: int, num_threads: Callable[[int], None]
) -> None:
    adapters = mixed_adapters(dtype)
    slots = slots_of(adapters, dtype)
    ranks = slots.site.table[:, 1]
    assert int(ranks.sum()) * SIZE_OUT > 96 << 10  # SERIAL_BELOW: one such row is work for two threads
    entries = [[(slot, 0.5) for slot in range(len(adapters))]] * size
    x, y = torch.randn(size, SIZE_IN).to(dtype), torch.randn(size, SIZE_OUT).to(dtype)
    one = run(x, y, entries, slots)
    run(torch.randn_like(x), torch.randn_like(y), entries, slots)  # no right result is left in the scratch
    num_threads(2)
    assert torch.equal(bits(run(x, y, entries, slots)), bits(one))
    assert_near(one, reference(x, y, entries, slots))


def test_the_bit_detector_detects() -> None:
    """A kernel that sums in another order beside other rows is numerically right, and is detected."""
    a, b = torch.randn(8, SIZE_IN), torch.randn(8, SIZE_OUT)
    half = SIZE_IN // 2

    def post(x: Tensor, y: Tensor, entries: Sequence[Entries]) -> Tensor:
        if len(x) == 1:
            return y + (x.double() @ a.double().T).float() @ b
        return y + (x[:, :half] @ a[:, :half].T + x[:, half:] @ a[:, half:].T) @ b

    x, y = torch.randn(20, SIZE_IN), torch.randn(20, SIZE_OUT)
    assert rows_with_others_in_their_bits(post, x, y, [[(0, 1.0)]] * 20)


@pytest.mark.parametrize("poisoned", ["lora", *BOTTLENECKS])
@pytest.mark.parametrize("weight_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_zero_gate_and_an_unused_slot_contribute_nothing(
    dtype: torch.dtype, weight_dtype: torch.dtype, poisoned: str | DeltaKind
) -> None:
    poison = [
        Adapter(DeltaKind.LORA, *(torch.full((8, size), NAN, dtype=weight_dtype) for size in (SIZE_IN, SIZE_OUT))),
        Adapter(DeltaKind.SCALE_OUTPUT, torch.full((SIZE_OUT,), NAN)),
        Adapter(DeltaKind.BIAS, torch.full((SIZE_OUT,), NAN)),
        *(
            Adapter(
                kind,
                torch.full((2 * 8, SIZE_OUT), NAN, dtype=weight_dtype),
                torch.cat([torch.tensor([1.0, 1.0, 1e-5]), torch.full((8 + 3 * SIZE_OUT,), NAN)]),
            )
            for kind in BOTTLENECKS
        ),
    ]
    mixed = mixed_adapters(weight_dtype)
    slots = slots_of([*mixed, *poison], weight_dtype)
    lora_nan, scale_nan, bias_nan, *networks_nan = range(len(mixed), len(mixed) + len(poison))
    bad, good = [(slot, 0.0) for slot in (lora_nan, scale_nan, bias_nan, *networks_nan)], [(2, 1.0)]
    x, y = torch.randn(11, SIZE_IN).to(dtype), torch.randn(11, SIZE_OUT).to(dtype)
    bits(y)[[1, 7]] = 0x7F800001 if dtype is FLOAT32 else 0x7F81  # a signalling NaN, which any arithmetic would quiet
    # Rows of one list of slots are computed as one block of four; in it, gates differ by row.
    nan = networks_nan[BOTTLENECKS.index(poisoned)] if isinstance(poisoned, DeltaKind) else lora_nan
    entries = [[(nan, 1.0), (2, 1.0)], [(nan, 0.0), (2, 0.0)], [(nan, 0.0), (2, 1.0)], [(nan, -0.0), (2, 2.0)]]
    entries += [bad, [*bad, *good], good, [], [(7, 1.0), (8, 1.0)], good, [*good, (scale_nan, 0.0)]]
    without = [[(slot, gate) for slot, gate in row if gate] for row in entries]
    got, expected = run(x, y, entries, slots), run(x, y, without, slots)
    assert torch.equal(bits(got[1:]), bits(expected[1:]))
    assert got[0].isnan().all()
    untouched = [1, 4, 7, 8]
    assert torch.equal(bits(got[untouched]), bits(y[untouched]))


def test_a_nan_stays_a_nan() -> None:
    """Also one whose rounding to bfloat16 would carry into the sign bit."""
    bias = torch.full((SIZE_OUT,), -1, dtype=torch.int32).view(FLOAT32)  # all bits set
    slots = slots_of([Adapter(DeltaKind.BIAS, bias)], FLOAT32)
    assert (
        run(torch.zeros(1, SIZE_IN).bfloat16(), torch.zeros(1, SIZE_OUT).bfloat16(), [[(0, 1.0)]], slots).isnan().all()
    )


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_rows_may_be_strided_and_their_surroundings_stay(dtype: torch.dtype) -> None:
    slots = slots_of(mixed_adapters(FLOAT32), FLOAT32)
    entries = batch_of("uniform", 11, len(slots.adapters))
    wide_x, wide_y = torch.randn(11, SIZE_IN + 9).to(dtype), torch.randn(1, 11, SIZE_OUT + 5).to(dtype)
    x, y = wide_x[:, 3 : 3 + SIZE_IN], wide_y[:, :, 2 : 2 + SIZE_OUT]
    before, expected = wide_y.clone(), run(x.contiguous(), y[0].contiguous(), entries, slots)
    wide_r = torch.randn(11, SIZE_OUT + 3).to(dtype)
    r = wide_r[:, 1 : 1 + SIZE_OUT]
    r.copy_(residual_of(y[0]))
    deltas.post(x, y, rows_of(entries), slots.site, r)
    assert torch.equal(y[0], expected)
    wide_y[:, :, 2 : 2 + SIZE_OUT] = before[:, :, 2 : 2 + SIZE_OUT]
    assert torch.equal(wide_y, before)


def test_no_rows_and_no_entries() -> None:
    slots = slots_of(mixed_adapters(FLOAT32), FLOAT32)
    deltas.post(torch.empty(0, SIZE_IN), torch.empty(0, SIZE_OUT), rows_of([]), slots.site)
    y = torch.randn(3, SIZE_OUT)
    assert torch.equal(run(torch.randn(3, SIZE_IN), y, [[], [], []], slots), y)


def test_misuse_is_named() -> None:
    slots = slots_of(mixed_adapters(FLOAT32), FLOAT32)
    site, rows = slots.site, rows_of([[(0, 1.0)], [(1, 1.0)]])
    x, y = torch.randn(2, SIZE_IN), torch.randn(2, SIZE_OUT)
    before = y.clone()
    int32, table = torch.int32, slots.site.table

    def tampered(**changes: Tensor) -> deltas.Packed:
        return deltas.pack(rows.entries._replace(**changes))

    def rank_zero() -> deltas.Site:
        broken = table.clone()
        broken[1, 1] = 0
        return deltas.Site(table=broken, size_in=SIZE_IN, size_out=SIZE_OUT, weight_dtype=FLOAT32)

    bad_calls: list[tuple[str, Callable[[], object]]] = [
        ("x: needs .2, 200", lambda: deltas.post(x[:1], y, rows, site)),
        ("x: needs .2, 200", lambda: deltas.post(x[:, :-1], y, rows, site)),
        ("y: needs .2, 548", lambda: deltas.post(x, y[:, 1:], rows, site)),
        ("y: needs the dtype of x", lambda: deltas.post(x, y.bfloat16(), rows, site)),
        ("x: needs float32 or bfloat16", lambda: deltas.post(x.half(), y, rows, site)),
        ("y: needs a contiguous last", lambda: deltas.post(x, y.T.contiguous().T, rows, site)),
        ("y: carries a gradient", lambda: deltas.post(x, y.clone().requires_grad_(), rows, site)),
        ("out: needs memory of its own", lambda: deltas.pre(x, x, rows, site)),
        ("out: needs .2, 200", lambda: deltas.pre(x, y, rows, site)),
        ("slots: one is outside", lambda: deltas.post(x, y, rows_of([[(0, 1.0)], [(len(table), 1.0)]]), site)),
        ("residual: a slot of these rows", lambda: deltas.post(x, y, rows_of([[(0, 1.0)], [(11, 1.0)]]), site)),
        ("residual: needs .2, 548", lambda: deltas.post(x, y, rows, site, x)),
        ("residual: needs the dtype of x", lambda: deltas.post(x, y, rows, site, y.bfloat16())),
        ("slots: one is outside", lambda: deltas.pre(x, x.clone(), rows_of([[(0, 1.0)], [(-1, 1.0)]]), site)),
        ("rank of at least 1", lambda: deltas.post(x, y, rows, rank_zero())),
        ("offsets: need to begin", lambda: deltas.post(x, y, tampered(offsets=torch.tensor([0, 1, 9]).int()), site)),
        ("offsets: need to begin", lambda: deltas.post(x, y, tampered(offsets=torch.tensor([0, 3, 2]).int()), site)),
        ("offsets: needs a contiguous vector", lambda: tampered(offsets=torch.zeros(3))),
        ("offsets: needs T", lambda: tampered(offsets=torch.empty(0, dtype=int32))),
        ("slots: needs a contiguous vector", lambda: tampered(slots=torch.zeros(4, dtype=int32)[::2])),
        ("gates: needs one for each of 2", lambda: tampered(gates=torch.zeros(3))),
        ("table: needs contiguous", lambda: deltas.Site(table=table.T, size_in=1, size_out=1, weight_dtype=FLOAT32)),
        ("weight_dtype", lambda: deltas.Site(table=table, size_in=1, size_out=1, weight_dtype=torch.half)),
        ("size_in", lambda: deltas.Site(table=table, size_in=0, size_out=1, weight_dtype=FLOAT32)),
    ]
    for text, call in bad_calls:
        with pytest.raises(ValueError, match=text):
            call()
    assert torch.equal(y, before)


def test_the_kinds_of_the_kernels_are_those_of_the_methods() -> None:
    header = Path(deltas.__file__).with_name("slot_cell.h").read_text()
    [words] = re.findall(r"enum DeltaKind : int64_t \{(.*?)\};", header, re.DOTALL)
    kinds = [(name, int(value)) for name, value in re.findall(r"^ *(\w+) = (\d+),", words, re.MULTILINE)]
    assert kinds == [(kind.name, kind.value) for kind in DeltaKind]


def openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_kernels_share_torchs_threads() -> None:
    """The process has one OpenMP runtime, and no thread beyond those that torch has already started.

    In a process of its own, since threads of other tests come and go here.
    """
    script = f"import {__name__} as test; test.use_all_threads()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def use_all_threads() -> None:
    torch.set_num_threads(2)
    torch.randn(1 << 20).exp_()
    before = os.listdir("/proc/self/task")
    slots = slots_of([lora(64, FLOAT32)], FLOAT32)
    run(torch.randn(256, SIZE_IN), torch.randn(256, SIZE_OUT), [[(0, 1.0)]] * 256, slots)
    assert os.listdir("/proc/self/task") == before
    assert len(openmp_runtimes()) == 1
