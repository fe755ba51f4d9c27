"""How CudaGraphs handles lack of room and failures, on fake devices that raise the errors of torch.

`end` is the error that torch raises at the end of a failed capture, after and instead of the error within it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from weft.kernels import faults
from weft.kernels.capture import CudaGraphs, NotCapturable, Replay, survives_failure

OLD, NEW = "2.11.0+cu130", "2.12.0"
_NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
_INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


@dataclass
class Device:
    """A fake device that raises the given errors. asked: the log of its calls."""

    taken_bytes: int = 1 << 20
    free_bytes: int = 1 << 40
    warming: Exception | None = None
    within: Exception | None = None
    end: Exception | None = None
    asked: list[str] = field(default_factory=list)

    def warm_up(self, function: Callable[[], Tensor]) -> int:
        self.asked.append("warm up")
        if self.warming is not None:
            raise self.warming
        function()
        return self.taken_bytes

    def room_bytes(self) -> int:
        self.asked.append("room")
        return self.free_bytes

    def capture(self, function: Callable[[], Tensor]) -> Replay:
        self.asked.append("capture")
        result = function()
        try:
            if self.within is not None:
                raise self.within
        finally:
            if self.end is not None:
                raise self.end
        return lambda: result


def _record(device: Device, torch_version: str) -> Replay:
    return CudaGraphs(device, torch_version)(lambda: torch.ones(1))


def _out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("torch_version", [OLD, NEW])
def test_what_fits_is_captured_after_a_first_call(torch_version: str) -> None:
    device = Device()
    assert _record(device, torch_version)().equal(torch.ones(1))
    assert device.asked == ["warm up", "room", "capture"]


@pytest.mark.parametrize("torch_version", [OLD, NEW])
def test_no_capture_begins_without_room(torch_version: str) -> None:
    """With the additional room that steps with prompts need, it does."""
    tight, wide = (Device(taken_bytes=1 << 30, free_bytes=free) for free in (1 << 30, 2 << 30))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _record(tight, torch_version)
    assert "capture" not in tight.asked
    _record(wide, torch_version)
    assert "capture" in wide.asked


@pytest.mark.parametrize("torch_version", [OLD, NEW])
@pytest.mark.parametrize(
    "error",
    [
        _out_of_memory(),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("shape mismatch"),
    ],
)
def test_errors_before_a_capture_come_out_as_they_are(error: Exception, torch_version: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        _record(Device(warming=error), torch_version)
    assert raised.value is error


@pytest.mark.parametrize(
    ("within", "end"),
    [
        (torch.AcceleratorError(_NOT_PERMITTED), torch.AcceleratorError(_INVALIDATED)),
        (RuntimeError(_NOT_PERMITTED), None),
        (RuntimeError("a generator is not registered"), None),
        (None, torch.AcceleratorError(_INVALIDATED)),
    ],
)
def test_a_failed_capture_means_unrecordable_or_the_end(within: Exception | None, end: Exception | None) -> None:
    with pytest.raises(NotCapturable) as raised:
        _record(Device(within=within, end=end), NEW)
    assert str(within or end) in str(raised.value), "the cause, not what its end says"
    assert not faults.is_fatal(raised.value)
    with pytest.raises(faults.CaptureLost, match=r"torch 2\.11") as lost:
        _record(Device(within=within, end=end), OLD)
    assert faults.is_fatal(lost.value)


@pytest.mark.parametrize("end", [None, torch.AcceleratorError(_INVALIDATED)])
@pytest.mark.parametrize(
    "within",
    [
        _out_of_memory(),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_in_a_capture_memory_and_the_device_speak_for_themselves(within: Exception, end: Exception | None) -> None:
    with pytest.raises(RuntimeError) as raised:
        _record(Device(within=within, end=end), NEW)
    assert raised.value is within
    with pytest.raises(faults.CaptureLost) as lost:
        _record(Device(within=within, end=end), OLD)
    assert faults.is_fatal(lost.value)
    assert not faults.is_out_of_memory(lost.value), "nobody tries that again"


def test_an_error_of_python_is_none_of_the_captures() -> None:
    with pytest.raises(KeyError):
        _record(Device(within=KeyError("a name")), NEW)


@pytest.mark.parametrize(
    ("version", "survives"),
    [("2.11.0", False), ("2.11.1+cu130", False), ("2.12.0", True), ("2.13.0+cpu", True), ("3.0.0a0+git1", True)],
)
def test_which_torch_survives(version: str, survives: bool) -> None:
    assert survives_failure(version) is survives
