"""The delta kernels for CUDA against float64, and the promise that a row's bits do not depend on its neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels import test_cpu_deltas as textbook
from tests.kernels.interpreted import DEVICE
from tests.kernels.test_cpu_deltas import Adapter, Entries, bits, mixed_adapters, residual_of
from weft.kernels.cpu.deltas import Kind
from weft.kernels.cuda import deltas

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZE_IN, SIZE_OUT = textbook.SIZE_IN, textbook.SIZE_OUT
NAN = float("nan")


class Slots(NamedTuple):
    """adapters: on the host, where the formula reads them. held: their copies, which the site's addresses lead to."""

    adapters: list[Adapter]
    held: list[Adapter]
    site: deltas.Site


def slots_of(adapters: Sequence[Adapter], weight_dtype: torch.dtype) -> Slots:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def rank(kind: Kind, a: Tensor | None) -> int:
        if a is None or not (kind is Kind.LORA or kind in textbook.BOTTLENECKS):
            return 0
        return len(a) if kind is Kind.LORA else len(a) // 2

    held = [Adapter(kind, there(a), there(b)) for kind, a, b in adapters]
    table = [(int(kind), rank(kind, a), address(a), address(b)) for kind, a, b in held]
    site = deltas.Site(
        table=torch.tensor(table, dtype=torch.int64, device=DEVICE),
        size_in=SIZE_IN,
        size_out=SIZE_OUT,
        weight_dtype=weight_dtype,
        kinds=sum(1 << kind for kind in {adapter.kind for adapter in adapters}),
        rank=max(line[1] for line in table),
    )
    return Slots(list(adapters), held, site)


def rows_of(entries: Sequence[Entries]) -> deltas.Rows:
    flat = [entry for row in entries for entry in row]
    lengths = torch.tensor([0, *(len(row) for row in entries)])
    return deltas.Rows(
        offsets=lengths.cumsum(0).to(torch.int32).to(DEVICE),
        slots=torch.tensor([slot for slot, _ in flat], dtype=torch.int32, device=DEVICE),
        gates=torch.tensor([gate for _, gate in flat], dtype=FLOAT32, device=DEVICE),
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


@pytest.fixture(params=["lone rows", "tiles"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two programs runs, whatever the number of rows."""
    monkeypatch.setattr(deltas, "LONE_ROWS_MAX", {"lone rows": 1 << 30, "tiles": 0}[request.param])
    return request.param


@pytest.mark.parametrize("popularity", ["identical", "networks", "distinct", "composed"])
@pytest.mark.parametrize("weight_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.usefixtures("program")
def test_post_is_the_formula(dtype: torch.dtype, weight_dtype: torch.dtype, popularity: str) -> None:
    slots = slots_of(mixed_adapters(weight_dtype), weight_dtype)
    size = 35  # more than a tile
    entries = textbook.batch_of(popularity, size, len(slots.adapters))
    x, y = torch.randn(size, SIZE_IN).to(dtype), torch.randn(size, SIZE_OUT).to(dtype)
    textbook.assert_near(run(x, y, entries, slots), formula(x, y, entries, slots))
