"""Slots and the host cache: bytes are the only limit, tables point at weights, and dropped adapters are not found."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.loader import HostCache
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.methods import ia3, lora, prefix
from weft.methods.protocol import Adapter, BaseShape, DeltaKind, Packed, Site

CPU = torch.device("cpu")
SHAPE = BaseShape(
    sites={name: Site(index, name, 8 + index, 5 + index) for index, name in enumerate(["q", "k", "up", "down"])},
    num_layers=2,
    num_kv_heads=2,
    head_dim=3,
    embedding_size=7,
    digest="",
    name="",
)


def lora_adapter(rank: int, seed: int = 0, sites: Sequence[str] = ("q", "down")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name in sites:
        site = SHAPE.sites[name]
        a = torch.randn(rank, site.in_features, generator=generator)
        b = torch.randn(site.out_features, rank, generator=generator)
        params[name] = lora.math.LoraParams(a, b, 0.25 + seed)
    return Adapter(method=lora.METHOD, config=lora.math.LoraConfig(), sites=params)


def ia3_adapter(seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    params = {
        "k": ia3.math.Ia3Params(torch.randn(SHAPE.sites["k"].out_features, generator=generator), False),
        "down": ia3.math.Ia3Params(torch.randn(SHAPE.sites["down"].in_features, generator=generator), True),
    }
    return Adapter(method=ia3.METHOD, config=ia3.math.Ia3Config(), sites=params)


def prefix_adapter(length: int) -> Adapter:
    params = prefix.math.init(
        prefix.math.PrefixConfig(num_virtual_tokens=length), SHAPE, torch.Generator().manual_seed(0)
    )
    return Adapter(method=prefix.METHOD, config=prefix.math.PrefixConfig(), sites={}, prefix=params)


def laid_out(adapter: Adapter, dtype: torch.dtype = torch.float32) -> PackedAdapter:
    return packed_adapter.build(adapter, SHAPE, dtype=dtype)


def table(capacity_bytes: int = 1 << 20) -> SlotTable:
    return SlotTable(num_sites=len(SHAPE.sites), capacity_bytes=capacity_bytes, device=CPU)


def read(address: int, like: Tensor) -> Tensor:
    """Return the values at an address, as a kernel would read them."""
    raw = bytearray(ctypes.string_at(address, like.nbytes))
    return torch.frombuffer(raw, dtype=like.dtype).view(like.shape)


# -- packed adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_adapter_holds_every_tensor_at_an_aligned_place_of_its_own(dtype: torch.dtype) -> None:
    built = laid_out(lora_adapter(3), dtype)
    parts = sorted(part for entry in built.entries for part in (entry.first, entry.second) if part is not None)
    assert all(part.offset % 64 == 0 for part in parts)
    ends = [part.offset + part.view(built.buffer).nbytes for part in parts]
    assert all(end <= part.offset for end, part in zip(ends, parts[1:], strict=False))
    assert ends[-1] <= built.buffer.nbytes
    assert [entry.site_index for entry in built.entries] == [0, 3], "in the order of the sites"
    for entry in built.entries:
        params = lora_adapter(3).sites[entry.site_name]
        packed = entry.packed(built.buffer)
        assert packed.second is not None
        assert packed.first.dtype is packed.second.dtype is dtype
        assert packed.first.untyped_storage().data_ptr() == built.buffer.untyped_storage().data_ptr(), "a view"
        torch.testing.assert_close(packed.first, params.a.to(dtype), atol=0, rtol=0)
        torch.testing.assert_close(packed.second, (params.b.mT * params.scaling).to(dtype), atol=0, rtol=0)


def test_vectors_stay_float32_whatever_the_slots_hold() -> None:
    adapter = ia3_adapter()
    built = laid_out(adapter, torch.bfloat16)
    for entry in built.entries:
        packed = entry.packed(built.buffer)
        assert torch.equal(packed.first, adapter.sites[entry.site_name].scale)
        assert entry.kind is (DeltaKind.SCALE_INPUT if entry.site_name == "down" else DeltaKind.SCALE_OUTPUT)


def test_virtual_positions_are_no_weights_but_count_on_the_host() -> None:
    built = laid_out(prefix_adapter(5), torch.bfloat16)
    assert (built.buffer.nbytes, built.num_virtual_tokens, built.entries) == (0, 5, ())
    assert built.size_bytes == 2 * 2 * 5 * 2 * 3 * 2  # keys and values [L, P, H, D] of bfloat16
    assert built.virtual is not None
    assert built.virtual.keys.shape == (2, 5, 2, 3)
    assert built.virtual.keys.is_contiguous()


# -- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [lora_adapter(1), lora_adapter(4, 2), ia3_adapter()], ids=["r1", "r4", "ia3"])
def test_views_of_a_slot_equal_the_adapter(adapter: Adapter) -> None:
    slots = table()
    slot = slots.put(laid_out(adapter))
    assert slot is not None
    assert slots.method(slot) is adapter.method
    params = slots.params(slot)
    assert params.keys() == adapter.sites.keys()
    x, y = torch.randn(2, 8), torch.randn(2, 5)
    for name, bundle in adapter.sites.items():
        site = SHAPE.sites[name]
        x, y = torch.randn(2, site.in_features), torch.randn(2, site.out_features)
        for function, arguments in ((adapter.method.pre, (x,)), (adapter.method.post, (x, y))):
            if function is not None:
                torch.testing.assert_close(function(params[name], *arguments), function(bundle, *arguments))
    assert slots.params(slot) is params, "made once"


def test_the_table_tells_kernels_kind_rank_and_address() -> None:
    slots = table()
    adapters = [lora_adapter(2), ia3_adapter(), lora_adapter(5, 1, ["k"])]
    placed = [slots.put(laid_out(adapter)) for adapter in adapters]
    for slot, adapter in zip(placed, adapters, strict=True):
        assert slot is not None
        for site in SHAPE.sites.values():
            kind, rank, first, second = slots.table[site.index, slot].tolist()
            if site.name not in adapter.sites:
                assert kind == DeltaKind.NONE
                continue
            assert adapter.method.pack is not None
            (packed,) = adapter.method.pack(adapter.sites[site.name], torch.float32)
            assert (kind, rank) == (packed.kind, packed.rank)
            assert torch.equal(read(first, packed.first), packed.first)
            assert (second == 0) == (packed.second is None)
            if packed.second is not None:
                assert torch.equal(read(second, packed.second), packed.second)


def two_rows(seed: int) -> Adapter:
    """Return an adapter whose delta at a site is a LoRA and a scale."""
    adapter, scales = (
        lora_adapter(2, seed),
        {name: torch.randn(site.out_features) for name, site in SHAPE.sites.items()},
    )

    def pack(params: Any, dtype: torch.dtype) -> tuple[Packed, ...]:
        assert lora.METHOD.pack is not None
        scale = next(scales[name] for name, other in adapter.sites.items() if other is params)
        return (*lora.METHOD.pack(params, dtype), Packed(DeltaKind.SCALE_OUTPUT, 0, scale, None))

    return replace(adapter, method=replace(lora.METHOD, pack=pack, unpack=lambda packed: packed))


def test_an_adapter_with_two_kinds_of_delta_at_a_site_takes_two_rows_and_one_slot() -> None:
    slots = table()
    plain = slots.put(laid_out(lora_adapter(1)))
    placed = [slots.put(laid_out(two_rows(seed))) for seed in range(12)]  # more than the first table holds
    assert len(slots) == 13
    taken = [table_row for slot in placed for table_row in slots.table_rows[slot]]
    assert len(set(taken) | {plain}) == 25
    for slot in placed:
        assert slot == slots.table_rows[slot][0]
        for name, site in SHAPE.sites.items():
            kinds = slots.table[site.index, list(slots.table_rows[slot]), 0].tolist()
            assert kinds == ([DeltaKind.LORA, DeltaKind.SCALE_OUTPUT] if name in slots.params(slot) else [0, 0])
            assert [packed.kind for packed in slots.params(slot).get(name, ())] == [kind for kind in kinds if kind]
    for slot in placed:
        slots.drop(slot)
    assert not slots.table_rows
    assert {int(table_row) for table_row in slots.table[:, :, 0].any(0).nonzero()} == {plain}


def test_a_left_slot_is_empty_and_is_used_again() -> None:
    slots = table()
    first = slots.put(laid_out(lora_adapter(2)))
    assert first is not None
    assert slots.drop(first) == laid_out(lora_adapter(2)).buffer.nbytes
    assert not slots.table.any()
    assert len(slots) == slots.used_bytes == 0
    with pytest.raises(KeyError):
        slots.params(first)
    again = slots.put(laid_out(ia3_adapter()))
    assert again is not None
    assert again == first
    assert slots.params(again).keys() == ia3_adapter().sites.keys()
    assert slots.table[0, again].tolist() == [0, 0, 0, 0], "nothing of the adapter before it"


def test_bytes_decide_what_fits_to_the_byte() -> None:
    small, large = laid_out(lora_adapter(1)), laid_out(lora_adapter(8))
    slots = table(large.buffer.nbytes + small.buffer.nbytes)
    assert slots.free_bytes == slots.capacity_bytes
    first = slots.put(large)
    assert first is not None
    assert slots.put(small) is not None
    assert slots.free_bytes == 0
    assert slots.put(small) is None
    assert slots.put(laid_out(prefix_adapter(3))) is not None, "it has no weights"
    slots.drop(first)
    assert slots.free_bytes == large.buffer.nbytes


def test_slots_grow_in_number_and_keep_what_they_hold() -> None:
    slots = table()
    adapters = [lora_adapter(1 + seed % 4, seed) for seed in range(40)]
    placed = [slots.put(laid_out(adapter)) for adapter in adapters]
    assert len(set(placed)) == 40
    for slot, adapter in zip(placed, adapters, strict=True):
        assert slot is not None
        for name, bundle in adapter.sites.items():
            assert torch.equal(slots.params(slot)[name].a, bundle.a)
            site = SHAPE.sites[name]
            assert torch.equal(read(int(slots.table[site.index, slot, 2]), bundle.a), bundle.a)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_any_sequence_of_put_and_drop_keeps_the_books(operations: list[tuple[bool, int]]) -> None:
    packed_adapters = [laid_out(lora_adapter(1 + number % 5, number)) for number in range(10)]
    slots = table(3 * packed_adapters[4].buffer.nbytes)
    held: dict[AdapterSlot, int] = {}
    for put, number in operations:
        if put:
            slot = slots.put(packed_adapters[number])
            assert (slot is None) == (
                sum(packed_adapters[n].buffer.nbytes for n in [*held.values(), number]) > slots.capacity_bytes
            )
            if slot is not None:
                assert slot not in held
                held[slot] = number
        elif held:
            slot = list(held)[number % len(held)]
            assert slots.drop(slot) == packed_adapters[held.pop(slot)].buffer.nbytes
        assert slots.used_bytes == sum(packed_adapters[number].buffer.nbytes for number in held.values())
        assert len(slots) == len(held)
        busy = {AdapterSlot(int(slot)) for slot in slots.table[:, :, 0].any(0).nonzero()}
        assert busy == held.keys()
        for slot, number in held.items():
            a = lora_adapter(1 + number % 5, number).sites["q"].a
            assert torch.equal(slots.params(slot)["q"].a, a)


# -- the host --------------------------------------------------------------------------------------------------------


def digest(number: int) -> AdapterDigest:
    return AdapterDigest(f"{number:064x}")


def test_the_host_keeps_the_most_recently_used_within_its_bytes() -> None:
    one = laid_out(lora_adapter(2))
    host = HostCache(2 * one.size_bytes)
    host.put(digest(1), one)
    host.put(digest(2), one)
    assert host.get(digest(1)) is one
    host.put(digest(3), one)
    assert [digest(n) in host for n in (1, 2, 3)] == [True, False, True]
    assert host.used_bytes == 2 * one.size_bytes
    assert host.drop(digest(1)) == one.size_bytes
    assert host.drop(digest(1)) == 0
    assert host.get(digest(1)) is None


def test_a_packed_adapter_larger_than_the_host_is_not_kept_and_drives_nobody_out() -> None:
    small, large = laid_out(lora_adapter(1)), laid_out(prefix_adapter(50))
    host = HostCache(small.size_bytes)
    host.put(digest(1), small)
    host.put(digest(2), large)
    assert digest(1) in host
    assert digest(2) not in host
    assert host.used_bytes == small.size_bytes


def test_putting_again_counts_once() -> None:
    one, other = laid_out(lora_adapter(1)), laid_out(lora_adapter(2))
    host = HostCache(1 << 20)
    host.put(digest(1), one)
    host.put(digest(1), other)
    assert host.get(digest(1)) is other
    assert host.used_bytes == other.size_bytes
