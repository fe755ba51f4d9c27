"""On a GPU: adapters are copied to their slots during computation, and are there when a step reads them."""

import pytest
import torch

from tests import tiny
from weft.adapters import packed_adapter
from weft.adapters.slots import SlotTable
from weft.model import loader

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
_CYCLES = 1 << 28  # a tenth of a second and more


def _table(base: loader.Base) -> SlotTable:
    return SlotTable(num_sites=len(base.shape.sites), capacity_bytes=1 << 30, device=DEVICE)


def test_a_slot_holds_its_adapter_after_wait(base: loader.Base) -> None:
    adapter = tiny.random_lora(base.shape, rank=8, seed=1)
    laid_out = packed_adapter.build(adapter, base.shape, dtype=torch.float32, pinned=True)
    assert laid_out.buffer.is_pinned()
    slots = _table(base)
    slot = slots.put(laid_out)
    assert slot is not None
    slots.wait()
    for name, params in slots.params(slot).items():
        assert params.a.device == DEVICE
        torch.testing.assert_close(params.a.cpu(), adapter.sites[name].a)


def test_a_copy_does_not_wait_for_what_is_computed(base: loader.Base) -> None:
    slots = _table(base)
    laid_out = packed_adapter.build(
        tiny.random_lora(base.shape, rank=8, seed=1), base.shape, dtype=torch.float32, pinned=True
    )
    slots.put(laid_out)  # the first allocation may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)
    slots.put(laid_out)
    slots._transfer._staged.synchronize()  # pyright: ignore[reportAttributeAccessIssue]  # a CudaTransfer
    assert not torch.cuda.current_stream().query(), "the copy is there and the computation still runs"
    torch.cuda.synchronize()


def test_a_step_comes_after_the_copies_before_it(base: loader.Base) -> None:
    slots = _table(base)
    laid_out = packed_adapter.build(
        tiny.random_lora(base.shape, rank=64, seed=1), base.shape, dtype=torch.float32, pinned=True
    )
    transfer = slots._transfer
    with torch.cuda.stream(transfer._stream):  # pyright: ignore[reportAttributeAccessIssue]  # a CudaTransfer
        torch.cuda._sleep(_CYCLES)  # the copy comes late
    slot = slots.put(laid_out)
    assert slot is not None
    slots.wait()
    there = slots._held[slot].buffer.clone()  # what a step would read
    torch.cuda.synchronize()
    assert there.cpu().equal(laid_out.buffer)


def test_memory_of_a_dropped_slot_is_not_reused_while_a_step_reads_it(base: loader.Base) -> None:
    slots = _table(base)
    first, second = (
        packed_adapter.build(tiny.random_lora(base.shape, rank=8, seed=s), base.shape, dtype=torch.float32, pinned=True)
        for s in (1, 2)
    )
    slot = slots.put(first)
    assert slot is not None
    slots.wait()
    torch.cuda._sleep(_CYCLES)
    read = slots._held[slot].buffer.clone()  # the step is behind its computation
    slots.drop(slot)
    slots.put(second)
    torch.cuda.synchronize()
    assert read.cpu().equal(first.buffer)
