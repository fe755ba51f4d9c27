"""A capture that needs proof begins only after steps that read nothing on the host, and room is made for it.

The real models here compute on a CPU, whose kernels read entries of adapters on the host, so steps are of the base
alone. tests/kernels/test_cuda_driver.py covers steps with adapters, with the kernels for CUDA.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from weft.methods.bnb import Linear8bitLt

import bitsandbytes
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.bases import Bases
from tests.engine.decoding import Decoding
from tests.engine.test_captured import Capturer
from weft.config import Quantization
from weft.engine.capture import captured as engine_capture
from weft.engine.capture.captured import CapturedSteps
from weft.kernels.capture import Replay
from weft.kernels.faults import CaptureLost
from weft.kernels.selection import select
from weft.model import loader


class Proven(Capturer):
    """A capture that a read on the host would break, as in CUDA graphs."""

    needs_proof = True


@pytest.fixture
def base(bases: Bases) -> loader.Base:
    return bases.served()


def _decodings(base: loader.Base, capture: Capturer, num_captured_rows: int = 32) -> tuple[Decoding, Decoding]:
    kernels = select(base.device, base.dtype)
    if kernels.driver is None:
        pytest.skip("no compiler for the kernels")
    captured = replace(kernels, capture=lambda: capture)
    return Decoding(base, kernels), Decoding(base, captured, num_captured_rows=num_captured_rows)


def _captured(decoding: Decoding) -> CapturedSteps:
    assert decoding.runner._captured is not None
    return decoding.runner._captured


# -- proofs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_models_whose_steps_stay_on_the_device_are_captured(bases: Bases, architecture: str) -> None:
    base = bases.served(architecture)
    capture = Proven()
    plain, captured = _decodings(base, capture)
    captured.runner.warm_up()
    for decoding in (plain, captured):
        decoding.start([[], [], []])
    for _ in range(2):
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
    assert capture.num_captured == 2, "of one row, when it was tried, and of four"


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.abs().max().item(),
    "if": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: x * len(x.tolist()),
    "numpy": lambda x: x * x.numpy().shape[0],
    "to": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: x * torch.tensor([1.0]),
    "nonzero": lambda x: x * len(x.nonzero()),
    "mask": lambda x: x * x[x > 0].sum(),
    "list": lambda x: x * x[:, [0]].sum(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("tries", [True, False], ids=["at the start", "at the first request"])
def test_models_that_read_on_the_host_never_meet_the_recorder(
    base: loader.Base, name: str, tries: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = Proven()
    plain, uncaptured = _decodings(base, capture)
    norm = base.model.get_submodule("model.norm")
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: READS[name](forward(x)))
    caplog.set_level(logging.WARNING)
    if tries:
        uncaptured.runner.warm_up()
    for decoding in (plain, uncaptured):
        decoding.start([[], []])
    assert uncaptured.step().equal(plain.step())
    assert capture.num_captured == 0
    assert uncaptured.runner._captured is None
    assert "cannot be captured" in caplog.text
    assert "test_proofs.py" in caplog.text, "where it reads"


def test_a_read_that_comes_with_more_rows_is_found_then(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Proven()
    plain, captured = _decodings(base, capture)
    norm = base.model.get_submodule("model.norm")
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) if x.shape[1] < 3 else forward(x) * x.sign().max().item())
    for decoding in (plain, captured):
        decoding.start([[] for _ in range(4)])
    for kept, num_captured in (([0], 1), ([0, 1], 2), ([0, 1, 2, 3], 2)):
        torch.testing.assert_close(captured.step(kept), plain.step(kept), rtol=1e-4, atol=1e-5)
        assert capture.num_captured == num_captured
    assert captured.runner._captured is None


@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.INT8])
def test_quantized_bases_are_captured(
    bases: Bases, monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> None:
    # bitsandbytes' product for CPUs with AVX-512 reads its code table on the host; that for CUDA does not.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    capture = Proven()
    plain, captured = _decodings(bases.served("llama", quantization, "bfloat16"), capture)
    for decoding in (plain, captured):
        decoding.start([[], [], []])
    wanted, got = plain.step(), captured.step()
    assert (got - wanted).norm() / wanted.norm() < 3e-2
    assert capture.num_captured == 1


def test_int8_that_looks_for_outliers_is_not(bases: Bases, caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes checks for outliers on the host, inside an operation of its own; the loader switches that off."""
    base = bases.served("llama", Quantization.INT8, "bfloat16")
    products: list[Any] = [module for module in base.model.modules() if isinstance(module, Linear8bitLt)]
    products[-1].state.threshold = 6.0
    capture = Proven()
    _, uncaptured = _decodings(base, capture)
    caplog.set_level(logging.WARNING)
    uncaptured.runner.warm_up()
    assert capture.num_captured == 0
    assert uncaptured.runner._captured is None
    assert "is_nonzero" in caplog.text


def test_one_proof_serves_all_widths_of_block_tables(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    proven = []
    prove = engine_capture.host_reads.prove

    def counted(function: Callable[[], object], device: torch.device) -> None:
        proven.append(device)
        prove(function, device)

    monkeypatch.setattr(engine_capture.host_reads, "prove", counted)
    capture = Proven()
    kernels = replace(select(base.device, base.dtype), capture=lambda: capture, captures_ahead=True)
    decoding = Decoding(base, kernels, num_captured_rows=4)
    decoding.runner.warm_up()
    assert capture.num_captured == 6, "of 1, 2 and 4 rows, in two widths"
    assert len(proven) == 3


# -- room --------------------------------------------------------------------------------------------------------------


class Room(Capturer):
    """A device with room for a number of captures, which raises `error` at one too many."""

    def __init__(self, size: int, error: Exception) -> None:
        super().__init__()
        self.size = size
        self.num_tried = 0
        self._error = error
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        self.num_tried += 1
        if len(self._alive) >= self.size:
            raise self._error
        replay = super().__call__(function)
        self._alive.add(replay)
        return replay


def _out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("error", [_out_of_memory(), torch.AcceleratorError("CUDA error: out of memory")])
def test_the_older_half_makes_room(base: loader.Base, error: Exception) -> None:
    room = Room(4, error)
    plain, captured = _decodings(base, room)
    for decoding in (plain, captured):
        decoding.start([[] for _ in range(24)])
    for rows in (1, 2, 4, 8, 16, 24, 16, 8):
        torch.testing.assert_close(captured.step(range(rows)), plain.step(range(rows)), rtol=1e-4, atol=1e-5)
    assert [shape.rows for shape in _captured(captured).shapes] == [4, 24, 16, 8]
    assert room.num_captured == 6
    assert room.num_tried == 7, "1 and 2 went for 16"


def test_where_nothing_makes_room_steps_run_plainly_and_it_is_tried_again(
    base: loader.Base, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_capture, "_PATIENCE", 5)
    caplog.set_level(logging.WARNING)
    room = Room(0, _out_of_memory())
    plain, captured = _decodings(base, room)
    for decoding in (plain, captured):
        decoding.start([[], [], []])

    def step() -> None:
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)

    step()
    assert room.num_tried == 2, "once more with what there was gone"
    assert caplog.text.count("no room") == 1
    for _ in range(5):
        step()
    assert room.num_tried == 2
    step()
    assert room.num_tried == 4
    room.size = 1
    for _ in range(7):
        step()
    assert room.num_captured == 1
    assert len(_captured(captured).shapes) == 1


def test_what_is_captured_is_replayed_while_others_wait_for_room(base: loader.Base) -> None:
    room = Room(99, _out_of_memory())
    plain, captured = _decodings(base, room)
    for decoding in (plain, captured):
        decoding.start([[], [], []])
    for kept in ([0], [0, 1]):
        captured.step(kept)
        plain.step(kept)
    room.size = 0
    for kept in ([0, 1, 2], [0, 1], [0, 1, 2]):
        torch.testing.assert_close(captured.step(kept), plain.step(kept), rtol=1e-4, atol=1e-5)
    assert [shape.rows for shape in _captured(captured).shapes] == [2]
    assert room.num_tried == 4


def test_memory_that_the_first_call_lacks_is_made_too(base: loader.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is the first to take memory."""
    capture = Proven()
    plain, captured = _decodings(base, capture)
    for decoding in (plain, captured):
        decoding.start([[], [], []])
    for kept in ([0], [0, 1]):
        captured.step(kept)
        plain.step(kept)
    norm = base.model.get_submodule("model.norm")
    forward, failures = norm.forward, [_out_of_memory()]

    def once_too_little(x: Tensor) -> Tensor:
        if failures:
            raise failures.pop()
        return forward(x)

    wanted = plain.step()
    monkeypatch.setattr(norm, "forward", once_too_little)
    torch.testing.assert_close(captured.step(), wanted, rtol=1e-4, atol=1e-5)
    assert [shape.rows for shape in _captured(captured).shapes] == [2, 4]


def test_steps_are_not_captured_later_that_could_not_be_tried(base: loader.Base) -> None:
    room = Room(0, _out_of_memory())
    _, captured = _decodings(base, room)
    captured.runner.warm_up()
    assert captured.runner._captured is None


@pytest.mark.parametrize(
    "error",
    [
        CaptureLost("a capture failed"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_what_is_fatal_comes_out(base: loader.Base, error: Exception) -> None:
    _, captured = _decodings(base, Room(0, error))
    captured.start([[], []])
    with pytest.raises(RuntimeError) as raised:
        captured.step()
    assert raised.value is error
