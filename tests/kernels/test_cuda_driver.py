"""The CUDA driver in whole steps of a tiny model: its logits equal the reference driver's; and its launches.

Models run on the kernels' device (tests/kernels/interpreted.py), in float32.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.bases import Bases
from tests.engine.decoding import Decoding
from tests.engine.test_captured import Capturer, mixed
from tests.kernels.interpreted import DEVICE, INTERPRETED
from tests.kernels.partial_steps import step_of
from tests.mixing.compositions import FLOAT32_TOLERANCE, mixes, rows
from tests.mixing.mixtures import mixtures
from tests.serving import Row, Step, error
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.slots import SlotTable
from weft.kernels.cuda import attention, deltas
from weft.kernels.cuda.driver import DriverFactory
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.kernels.step import Entries
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.protocol import Adapter, DeltaKind, SiteKind
from weft.model import loader, paged_attention

CUDA = Kernels(name="cuda", driver=DriverFactory(torch.float32))


@pytest.fixture(scope="module")
def base(bases: Bases) -> loader.Base:
    return bases(device=DEVICE.type)


def assert_same(base: loader.Base, listed: list[Row], *, last_only: bool = False) -> None:
    """Check that the kernels give the reference driver's logits, and that adapters change them."""
    got = Step(base, CUDA).logits(listed, last_only=last_only)
    wanted = Step(base, REFERENCE).logits(listed, last_only=last_only)
    plain = Step(base, REFERENCE).logits([Row(row.tokens) for row in listed], last_only=last_only)
    assert max(error(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)) < FLOAT32_TOLERANCE
    assert max(error(mine, theirs) for mine, theirs in zip(got, plain, strict=True)) > 100 * FLOAT32_TOLERANCE


def test_compositions_are_those_of_the_reference(base: loader.Base) -> None:
    assert_same(base, [Row(row.tokens[:4], adapters=row.adapters) for row in rows(mixes(base.shape, seed=3, count=4))])


def test_tiles_are_the_reference_too(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PER_ROW_MAX", 0)
    assert_same(base, [Row(row.tokens[:6], adapters=row.adapters) for row in rows(mixes(base.shape, seed=5, count=3))])


def test_the_head_takes_its_sample_rows(base: loader.Base) -> None:
    at_head = tiny.random_lora(base.shape, rank=3, seed=4, targets=("lm_head",))
    assert_same(base, [Row([5, 6, 7], at_head), Row([8]), Row([9, 3], at_head)], last_only=True)


def test_mixtures_are_those_of_the_reference(base: loader.Base) -> None:
    """Traces too; mixtures of both levels, with bounds, with experts of virtual positions."""
    listed = [mixed.row._replace(tokens=mixed.tokens[:3]) for mixed in mixtures(base.shape, seed=2)[2:4]]
    step, reference = Step(base, CUDA), Step(base, REFERENCE)
    for mine, theirs in zip(step.logits(listed), reference.logits(listed), strict=True):
        assert error(mine, theirs) < FLOAT32_TOLERANCE
    assert step.gates.keys() == reference.gates.keys()
    assert step.gates
    for index, gates in step.gates.items():
        theirs = reference.gates[index]
        assert gates is not None
        assert theirs is not None
        torch.testing.assert_close(torch.tensor(gates.tokens), torch.tensor(theirs.tokens), rtol=0, atol=1e-5)


def test_captured_steps_are_those_of_the_reference(base: loader.Base) -> None:
    """Padded with rows and entries of no request."""
    capture = Capturer()
    plain = Decoding(base, REFERENCE)
    captured = Decoding(base, replace(CUDA, capture=lambda: capture), num_captured_rows=8)
    network = tiny.random_bottleneck(base.shape, BottleneckConfig(form=Form.PARALLEL, size=3), seed=2)
    for decoding in (plain, captured):
        decoding.start([[(tiny.random_lora(base.shape, rank=3, seed=1), 0.5), (network, 1.0)], [], []])
    for _ in range(2):
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
    assert capture.num_captured == 1


class Proven(Capturer):
    """As for CUDA graphs."""

    needs_proof = True


@pytest.fixture
def _launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that compute nothing: in the interpreter they read tensors on the host, which a GPU does not."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(paged_attention.KVCache, "is_finite", lambda *_: True)


@pytest.mark.usefixtures("_launches_nothing")
def test_steps_with_adapters_are_proven_to_read_nothing_on_the_host(base: loader.Base) -> None:
    """With every method, and mixtures, whose router runs in each layer; products cover a few sites at once."""
    capture = Proven()
    kernels = replace(CUDA, attend=attention.Attend, capture=lambda: capture)
    captured = Decoding(base, kernels, num_captured_rows=32)
    blends = [one.row for one in mixtures(base.shape, seed=2)[1:4]]
    captured.start([*mixed(base.shape, 14, seed=1), *blends])
    captured.step()
    assert capture.num_captured == 1
    captured.step([0])
    assert capture.num_captured == 2


@pytest.mark.usefixtures("_launches_nothing")
def test_a_driver_that_reads_its_entries_is_found(base: loader.Base) -> None:
    """Negative control: as the reference driver and the driver for CPUs do."""
    capture, make = Proven(), DriverFactory(torch.float32)

    def reading(slots: Any, step: Any) -> Any:
        assert step.entries is not None
        assert min(step.entries.slots.tolist()) >= 0
        return make(slots, step)

    kernels = replace(CUDA, driver=reading, attend=attention.Attend, capture=lambda: capture)
    uncaptured = Decoding(base, kernels, num_captured_rows=8)
    uncaptured.start([[(tiny.random_lora(base.shape, rank=3, seed=1), 0.5)], []])
    uncaptured.step([1])
    assert capture.num_captured == 1, "of the base alone"
    uncaptured.step()
    assert capture.num_captured == 1
    assert uncaptured.runner._captured is None


def test_captured_steps_of_mixtures_are_those_of_the_reference(base: loader.Base) -> None:
    """With runs of no request, and a trace that is wider than needed."""
    capture = Capturer()
    plain = Decoding(base, REFERENCE)
    kernels = replace(CUDA, capture=lambda: capture)
    captured = Decoding(base, kernels, num_captured_rows=8)
    blends = [one.row for one in mixtures(base.shape, seed=2)[1:4]]
    for decoding in (plain, captured):
        decoding.start([*blends, [], [(tiny.random_lora(base.shape, rank=3, seed=1), 0.5)]])
    for _ in range(2):
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
    assert capture.num_captured == 1
    for mine, theirs in zip(captured.end()[:3], plain.end()[:3], strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(torch.tensor(mine.tokens), torch.tensor(theirs.tokens), rtol=0, atol=1e-5)


def launches_of_a_step(table: SlotTable, base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the launches of a step with a row for each of the table's adapters, once for every site.

    Fails if an element of a tensor is read while the driver is made and its kernels are launched.
    """

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    num_rows = len(table)
    offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=DEVICE)
    gates = torch.ones(num_rows, device=DEVICE)
    step = step_of(Entries(offsets, offsets[:-1], gates))
    sites = list(base.shape.sites.values())
    inputs = [torch.randn(1, num_rows, site.in_features, device=DEVICE) for site in sites]
    launched = []
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(deltas.per_row, "shrink", lambda *_, **__: launched.append("shrink"))
        patch.setattr(deltas.per_row, "expand", lambda *_: launched.append("expand"))
        patch.setattr(deltas.per_row, "scale_inputs", lambda *_: launched.append("scale_inputs"))
        driver = DriverFactory(torch.float32)(table, step)
        for site, x in zip(sites, inputs, strict=True):
            driver.apply(site, lambda x, site=site: x.new_zeros(1, num_rows, site.out_features), x)
        with pytest.raises(AssertionError, match="a tensor was read"):
            assert gates[0]
    return launched


def table_of(base: loader.Base, adapters: Sequence[Adapter]) -> SlotTable:
    table = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=1 << 28, device=DEVICE)
    for adapter in adapters:
        assert table.put(packed_adapter.build(adapter, base.shape, dtype=torch.float32)) is not None
    return table


def test_a_step_launches_as_much_for_64_adapters_as_for_one(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches wait for nothing on the device."""
    loras = [tiny.random_lora(base.shape, rank=1 + seed % 33, seed=seed) for seed in range(64)]
    num_linear = len(base.shape.of_kind(SiteKind.LINEAR))
    for count in (1, 16, 64):
        launched = launches_of_a_step(table_of(base, loras[:count]), base, monkeypatch)
        assert launched == ["shrink", "expand"] * num_linear
    both = launches_of_a_step(table_of(base, [loras[0], tiny.random_ia3(base.shape, seed=2)]), base, monkeypatch)
    assert both.count("shrink") == both.count("expand") == num_linear
    assert 0 < both.count("scale_inputs") == len(both) - 2 * num_linear


def test_a_group_is_launched_as_one_site(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless slots have a kind there that needs a separate call: then sites are computed one by one."""
    table = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=1 << 24, device=DEVICE)
    sites = [site for site in base.shape.sites.values() if site.suffix in ("q_proj", "k_proj", "v_proj")][:3]
    offsets = torch.arange(3, dtype=torch.int32, device=DEVICE)
    step = step_of(Entries(offsets, torch.zeros_like(offsets[:2]), torch.ones(2, device=DEVICE)))
    x = torch.randn(1, 2, sites[0].in_features, device=DEVICE)
    weight = torch.randn(sum(site.out_features for site in sites), sites[0].in_features, device=DEVICE)

    def calls() -> tuple[list[Tensor], list[Tensor], list[int]]:
        driver = DriverFactory(torch.float32)(table, step)
        seen: list[int] = []
        with monkeypatch.context() as patch:
            post = deltas.post
            patch.setattr(deltas, "post", lambda *given: (seen.append(len(given[3].sizes_out)), post(*given))[1])
            together = list(driver.apply_group(sites, lambda x: x @ weight.T, x))
        parts = weight.split([site.out_features for site in sites])
        apart = [driver.apply(site, lambda x, w=w: x @ w.T, x) for site, w in zip(sites, parts, strict=True)]
        return together, apart, seen

    def same(together: list[Tensor], apart: list[Tensor]) -> bool:
        return all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in zip(together, apart, strict=True))

    assert calls()[2] == []
    slot = table.put(
        packed_adapter.build(tiny.random_lora(base.shape, rank=2, seed=1), base.shape, dtype=torch.float32)
    )
    assert slot == 0
    together, apart, seen = calls()
    assert seen == [3]
    assert same(together, apart)
    monkeypatch.setattr("weft.kernels.cuda.driver._ALONE", 1 << DeltaKind.LORA)
    together, apart, seen = calls()
    assert seen == [1, 1, 1]
    assert same(together, apart)


def test_the_devices_table_is_the_hosts(base: loader.Base) -> None:
    """After every put and drop, at one address until it grows; the capture key describes its contents."""
    table = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=1 << 28, device=DEVICE)
    ranks, held = set(), []
    for seed in range(10):
        network = BottleneckConfig(form=Form.PARALLEL, size=2)
        adapter = (
            tiny.random_bottleneck(base.shape, network, seed=seed)
            if seed % 2
            else tiny.random_lora(base.shape, rank=1 + 4 * seed, seed=seed, lora_bias=True)
        )
        ranks.add(adapter.rank)
        at, size = table.device_table.data_ptr(), table.table.shape[1]
        held.append(table.put(packed_adapter.build(adapter, base.shape, dtype=torch.float32)))
        assert torch.equal(table.device_table.cpu(), table.table)
        assert table.device_table.data_ptr() != table.table.data_ptr()
        assert (table.device_table.data_ptr() == at) is (table.table.shape[1] == size)
        assert table.capture_key.table_at == table.device_table.data_ptr()
        assert table.capture_key.rank == -(-max(ranks) // 16) * 16
    assert table.table.shape[1] > 8
    kinds = memoryview(table.capture_key.kinds).cast("H")
    found = {index: {int(kind) for kind in table.table[index, :, 0]} - {0} for index in range(len(kinds))}
    assert {index: {kind for kind in DeltaKind if kinds[index] >> kind & 1} for index in found} == found
    for slot in held:
        assert slot is not None
        table.drop(slot)
        assert torch.equal(table.device_table.cpu(), table.table)
    assert not table.device_table.any()
    assert not any(memoryview(table.capture_key.kinds).cast("H"))


def test_cuda_gets_its_kernels_where_they_know_the_dtype(caplog: pytest.LogCaptureFixture) -> None:
    assert select(torch.device("cuda"), torch.bfloat16).name == "cuda"
    assert select(torch.device("cuda"), torch.float16) is REFERENCE
    assert "needs float32 or bfloat16" in caplog.text or "need float32 or bfloat16" in caplog.text


def test_without_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("weft.kernels.selection.find_spec", lambda name: None)
    assert select(torch.device("cuda"), torch.bfloat16) is REFERENCE
    assert "Triton is not installed" in caplog.text
