"""A replay of a captured step on the CPU gives the model's results: for any base, adapters, and numbers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.bases import Bases
from tests.calls import counted
from tests.engine.captured import (
    ALL,
    NAMES,
    Held,
    check_captured_many,
    check_captured_mix,
    check_groups,
    check_kernels,
)
from tests.engine.decoding import Decoding
from tests.engine.test_captured import Forgetful, mixed
from torch import Tensor

from weft.kernels.capture import NotCapturable
from weft.kernels.cpu import elementwise, library, pointwise
from weft.kernels.cpu.capture import Arena, CpuCapture
from weft.kernels.selection import select
from weft.model import loader

pytestmark = pytest.mark.skipif(not library.available(), reason="no compiler for the kernels")

Function = Callable[[], Tensor]


def _decodings(base: loader.Base, num_captured_rows: int = 32) -> tuple[Decoding, Decoding]:
    kernels = select(base.device, base.dtype)
    return Decoding(base, kernels), Decoding(base, kernels, num_captured_rows=num_captured_rows)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("held", ALL, ids=NAMES)
def test_captured_steps_give_the_logits_of_plain_ones(bases: Bases, architecture: str, held: Held) -> None:
    base = bases.served(architecture, held.quantization, held.dtype)
    check_captured_mix(base, select(base.device, base.dtype), held)


@pytest.mark.parametrize("held", ALL, ids=NAMES)
def test_what_is_served_is_what_it_should_be(bases: Bases, held: Held) -> None:
    """The same test bodies as for a GPU."""
    base = bases.served("llama", held.quantization, held.dtype)
    kernels = select(base.device, base.dtype)
    check_groups(base)
    check_kernels(base, kernels, held)
    check_captured_many(base, kernels, held)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_steps_are_tried_before_they_are_captured_for_requests(bases: Bases, architecture: str) -> None:
    base = bases.served(architecture)
    plain, captured = _decodings(base)
    captured.runner.warm_up()
    for decoding in (plain, captured):
        decoding.start(mixed(base.shape, 13, seed=1))
    torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
    graphs = captured.runner._captured
    assert graphs is not None, "steps are captured"
    assert len(graphs.shapes) == 2, "of one row, when it was tried, and of sixteen"


def test_a_captured_row_has_the_bits_of_a_plain_one(bases: Bases) -> None:
    """If every product is computed by the kernels, rows do not depend on the padding."""
    base = bases.served(dtype="bfloat16")
    if not any(type(module).__name__ == "PackedLinear" for module in base.model.modules()):
        pytest.skip("this processor has no product of bfloat16 pairs")
    plain, captured = _decodings(base)
    for decoding in (plain, captured):
        decoding.start(mixed(base.shape, 11, seed=2))
    for _ in range(3):
        assert captured.step().equal(plain.step())


def test_steps_are_captured_where_onednn_holds_the_weights(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without a product of bfloat16 pairs: tensors in oneDNN's layout have no accessible storage."""
    monkeypatch.setattr("weft.kernels.cpu.gemm.available", lambda: False)
    base = bases.served(dtype="bfloat16")
    if not any(type(module).__name__ == "OneDnnLinear" for module in base.model.modules()):
        pytest.skip("a torch without oneDNN")
    plain, captured = _decodings(base)
    captured.runner.warm_up()
    for decoding in (plain, captured):
        decoding.start(mixed(base.shape, 11, seed=2))
    for _ in range(3):
        wanted, got = plain.step(), captured.step()
        assert (got - wanted).norm() / wanted.norm() < 3e-2
    assert captured.runner._captured is not None


def test_captures_of_several_shapes_share_memory_and_do_not_meet(bases: Bases) -> None:
    """The captures alternate, with other adapters each time, and an uncaptured step between them."""
    base = bases.served()
    plain, captured = _decodings(base, num_captured_rows=8)
    for decoding in (plain, captured):
        decoding.start(mixed(base.shape, 13, seed=3))
    for kept in (range(8), range(3), [9], range(12), range(4, 12), range(3), [9], range(13), range(8)):
        torch.testing.assert_close(captured.step(list(kept)), plain.step(list(kept)), rtol=1e-4, atol=1e-5)
    for decoding in (plain, captured):
        decoding.end()
        decoding.start([[(tiny.random_lora(base.shape, rank=5, seed=seed), 1.0)] for seed in range(8)])
        decoding.step()
    torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)


def test_a_step_that_does_not_follow_its_inputs_is_found_before_any_request(
    bases: Bases, caplog: pytest.LogCaptureFixture
) -> None:
    """Negative control of the trial: a replay that returns the captured result."""
    base = bases.served()
    kernels = replace(select(base.device, base.dtype), capture=Forgetful)
    plain, forgetful = Decoding(base, kernels), Decoding(base, kernels, num_captured_rows=8)
    forgetful.runner.warm_up()
    assert forgetful.runner._captured is None
    assert "captured decode steps are off" in caplog.text
    for decoding in (plain, forgetful):
        decoding.start([[], []])
    assert forgetful.step().equal(plain.step())


def test_steps_that_read_numbers_on_the_way_run_unrecorded(
    bases: Bases, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.served()
    plain, uncaptured = _decodings(base)
    norm = base.model.get_submodule("model.norm")
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) * (1 if x.abs().sum() > 0 else 0))
    caplog.set_level(logging.WARNING)
    uncaptured.runner.warm_up()
    assert uncaptured.runner._captured is None
    assert "cannot be captured" in caplog.text
    assert "is_nonzero" in caplog.text
    for decoding in (plain, uncaptured):
        decoding.start([[], []])
    assert uncaptured.step().equal(plain.step())


def test_a_captured_step_asks_no_module_and_as_much_for_any_adapters(bases: Bases) -> None:
    base = bases.served()
    calls = []
    for num_adapters in (1, 16, 64):
        _, captured = _decodings(base, num_captured_rows=64)
        captured.start(
            [[(tiny.random_lora(base.shape, rank=1 + row % 16, seed=row % num_adapters), 1.0)] for row in range(64)]
        )
        captured.step()
        for request in captured.requests:
            request.output.append(5)
        step = captured.built(captured.requests)
        calls.append(counted(lambda step=step, runner=captured.runner: runner.forward(step))[1])
    assert calls[0] == calls[1] == calls[2]
    assert not [name for name in calls[0] if name.startswith("modeling_llama.py")]
    assert calls[0]["capture.py:CpuCapture.__call__.<locals>.replay"] == 1
    assert calls[0].total() < 500


# -- functions ---------------------------------------------------------------------------------------------------------


def _again(function: Function, inputs: list[Tensor]) -> None:
    """Check that a capture follows its inputs."""
    with torch.inference_mode():
        replay = CpuCapture()(function)
        for _ in range(3):
            for one in inputs:
                one.copy_(torch.randn(one.shape)) if one.is_floating_point() else one.add_(1).remainder_(3)
            wanted = function()
            assert replay().equal(wanted)
            assert replay() is replay()


def test_kernels_and_what_torch_does_between_them_follow_the_inputs() -> None:
    with torch.inference_mode():
        x, gain, at = torch.randn(3, 40), torch.rand(40), torch.tensor([2, 0, 1])

        def function() -> Tensor:
            wide = elementwise.rms_norm(x, gain, 1e-6)
            first, second = wide.split([8, 32], -1)  # views
            rotated = torch.cat([-second[:, 16:], second[:, :16]], -1) * 2.0 + second
            sums, places = rotated.max(0)  # two tensors
            rows = torch.zeros(3, 40)
            rows[:, :8] = first  # changes in place
            rows[:, 8:] += sums + places.float()
            rows = rows.index_select(0, at).t().contiguous()
            return elementwise.gate(rows, rows.flip(0), "silu") + torch.arange(3)

    _again(function, [x, at])


def test_integers_and_what_has_no_elements_pass() -> None:
    with torch.inference_mode():
        ids, table = torch.tensor([1, 2, 0]), torch.randn(3, 8, dtype=torch.bfloat16)

        def function() -> Tensor:
            return torch.cat([table[ids].float(), torch.empty(3, 0)], -1) + torch.ones(0).sum()

    _again(function, [ids])


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero().float(),
        lambda x: x.unique(),
        lambda x: x * float(torch.equal(x, x)),
        lambda x: x.masked_select(x > 0),
    ],
    ids=["item", "branch", "mask", "nonzero", "unique", "equal", "masked_select"],
)
def test_what_depends_on_numbers_is_refused(reads: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode():
        x = torch.randn(5)
        with pytest.raises(NotCapturable):
            CpuCapture()(lambda: reads(x))


def test_a_kernel_that_refuses_ends_the_replay_with_its_reason() -> None:
    from weft.kernels.cpu import attention

    with torch.inference_mode():
        cache = attention.Cache(keys=torch.zeros(2, 16, 1, 8), values=torch.zeros(2, 16, 1, 8))
        key, slots = torch.ones(1, 1, 8), torch.zeros(1, dtype=torch.int64)

        def function() -> Tensor:
            attention.store(key, key, cache, slots)
            return key + key

        replay = CpuCapture()(function)
        slots[0] = 99
        with pytest.raises(ValueError, match="kv_slots"):
            replay()
        slots[0] = 20
        assert replay().equal(2 * key)
        assert cache.keys[1, 4, 0].equal(key[0, 0])


def test_constants_stay_while_a_recording_does() -> None:
    """A tensor that a function makes on each call and only a kernel's record points at."""
    with torch.inference_mode():
        x = torch.ones(64)

        def function() -> Tensor:
            return x + torch.tensor([3.0] * 64)

        replay = CpuCapture()(function)
        others = [torch.full((64,), 7.0) for _ in range(200)]  # would take the constant's memory
        assert replay().equal(torch.full((64,), 4.0))
        del others


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_place_is_taken_again_once_nobody_holds_it() -> None:
    arena = Arena()
    arena.begin()
    first = arena.like(torch.empty(100))
    view = first[10:20]
    second = arena.like(torch.empty(100))
    assert first.data_ptr() != second.data_ptr()
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    assert arena.holds(view)
    assert not arena.holds(torch.empty(1))
    at = first.data_ptr()
    del first
    assert arena.like(torch.empty(50)).data_ptr() not in (at, second.data_ptr()), "a view of it is held"
    del view
    assert arena.like(torch.empty(90)).data_ptr() == at
    held = arena.num_bytes
    arena.begin()
    assert {arena.like(torch.empty(100)).data_ptr() for _ in range(4)} == {at}
    assert arena.num_bytes == held


def test_memory_of_a_step_does_not_grow_with_its_layers() -> None:
    def num_bytes(layers: int) -> int:
        tapes = CpuCapture()
        with torch.inference_mode():
            x, gain = torch.randn(16, 256), torch.ones(256)

            def function() -> Tensor:
                y = x
                for _ in range(layers):
                    y = y + elementwise.rms_norm(y, gain, 1e-6)
                return y

            tapes(function)
        return tapes._arena.num_bytes

    assert num_bytes(40) == num_bytes(4)


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_have_the_bits_of_torch(dtype: torch.dtype) -> None:
    aten = torch.ops.aten
    torch.manual_seed(0)
    a, b = (3 * torch.randn(2, 3, 5, 70)).to(dtype), torch.randn(1, 3, 1, 70).to(dtype)
    a[0, 0, 0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40])
    swapped = a.transpose(1, 2)  # strided
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.add.Tensor, (a, b), {}),
        (aten.mul.Tensor, (a, b), {}),
        (aten.mul.Tensor, (swapped, swapped), {}),
        (aten.add.Tensor, (a[..., ::2], b[..., 1::2]), {}),
        (aten.neg.default, (swapped,), {}),
        (aten.cat.default, ([a, swapped.transpose(1, 2)], -1), {}),
        (aten.cat.default, ([a[..., :3], a], 3), {}),
        (aten.clone.default, (swapped,), {"memory_format": torch.contiguous_format}),
        (aten.to.dtype, (swapped, torch.float32 if dtype is torch.bfloat16 else torch.bfloat16), {}),
        (aten.add.Tensor, (a.view(-1), a.view(-1)), {}),
        (aten.add.Tensor, (a.sum(), a.sum()), {}),
    ]
    for operation, args, kwargs in cases:
        wanted = operation(*args, **kwargs)
        given = torch.full_like(wanted, 5.0)
        assert pointwise.compute(operation, args, kwargs, given), operation
        assert torch.equal(given.isnan(), wanted.isnan()), operation
        assert given.nan_to_num(1.5, 2.5, 3.5).equal(wanted.nan_to_num(1.5, 2.5, 3.5)), operation
        assert given.signbit()[~given.isnan()].equal(wanted.signbit()[~wanted.isnan()]), operation


@pytest.mark.parametrize(
    ("operation", "args", "kwargs"),
    [
        ("add.Tensor", (torch.ones(2), torch.ones(2)), {"alpha": 2}),
        ("add.Tensor", (torch.ones(2), 3.0), {}),
        ("mul.Tensor", (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)), {}),
        ("mul.Tensor", (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)), {}),
        ("neg.default", (torch.ones(1, 1, 1, 1, 1, 2),), {}),
        ("sub.Tensor", (torch.ones(2), torch.ones(2)), {}),
    ],
)
def test_operations_that_no_kernel_knows_are_left_to_torch(operation: str, args: Any, kwargs: Any) -> None:
    name, _, overload = operation.partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload)
    out = torch.full_like(found(*args, **kwargs), 9)
    assert not pointwise.compute(found, args, kwargs, out)
    assert (out == 9).all(), "nothing was written"


def test_no_recording_is_made_where_none_is_asked_for() -> None:
    """Kernels that run outside a capture are not logged, even after one."""
    noted: list[str] = []
    x, gain = torch.ones(1, 8), torch.ones(8)
    with library.logging_to(lambda kernel, *_: noted.append(kernel)):
        elementwise.rms_norm(x, gain, 1e-6)
    elementwise.rms_norm(x, gain, 1e-6)
    assert noted == ["weft_rms_norm"]
    assert CpuCapture()._arena.num_bytes == 0
