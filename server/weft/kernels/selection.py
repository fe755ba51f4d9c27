"""Select the implementation that computes the deltas and attention on a device.

Kernels compute the same as the reference (methods/driver.py, model/paged_attention.py), faster. The reference itself
runs on a device that has no kernels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from weft.kernels.capture import Capture, CudaGraphs
from weft.kernels.cpu import driver, elementwise, library
from weft.kernels.cpu.attention import Attend
from weft.kernels.cpu.capture import CpuCapture
from weft.kernels.slot_tables import CaptureKey, SlotTables
from weft.kernels.step import Step
from weft.methods.inject import Driver

_log = logging.getLogger(__name__)


def _whole_key(slots: SlotTables, slot_of_entry: Tensor) -> CaptureKey:
    return slots.capture_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """An implementation of the hot operations.

    name: for logs and build info.
    driver: makes a step's driver from the slot tables and the step on the device; None for the reference driver.
    attend: makes paged attention (model/paged_attention.py, Attend) for a KV pool's (keys, values); None for the
        reference.
    capture: makes the `Capture` of decode steps (kernels/capture.py); None if driver or attention cannot be captured.
    captures_ahead: whether a capture takes so long that the usual steps are captured before the first request.
    capture_key: everything besides shapes on which a step's driver bases decisions, given each entry's slot: int32 [N].
    rms_norm, gate: functions that model/elementwise.py puts into the model; None leaves it as it is.
    nf4: the function that model/nf4_linear.py puts into the model; None leaves it as it is.
    """

    name: str
    driver: Callable[[SlotTables, Step], Driver] | None = None
    attend: Callable[[Sequence[Tensor], Sequence[Tensor]], Callable[..., Tensor]] | None = None
    capture: Callable[[], Capture] | None = None
    captures_ahead: bool = False
    capture_key: Callable[[SlotTables, Tensor], CaptureKey] = _whole_key
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] | None = None
    gate: Callable[[Tensor, Tensor, str], Tensor] | None = None
    nf4: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None


REFERENCE = Kernels(name="reference")


def select(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest implementation for a device and the base's dtype."""
    if device.type == "cuda":
        return _for_cuda(dtype)
    if device.type != "cpu":
        return REFERENCE
    loaded = library.load()
    if loaded.functions is None:
        _log.warning("%s; the slower reference path runs instead", loaded.reason)
        return REFERENCE
    return Kernels(
        name=f"cpu {loaded.kind}",
        driver=driver.DriverFactory(dtype),
        attend=Attend,
        capture=CpuCapture,
        capture_key=driver.capture_key,
        rms_norm=elementwise.rms_norm,
        gate=elementwise.gate,
    )


def _for_cuda(dtype: torch.dtype) -> Kernels:
    if find_spec("triton") is None:
        _log.warning("Triton is not installed; the slower reference path runs instead")
        return REFERENCE
    from weft.kernels.cuda import attention, nf4  # importable only with Triton
    from weft.kernels.cuda import driver as cuda_driver

    if dtype not in cuda_driver.DTYPES:
        _log.warning("the kernels need float32 or bfloat16, given %s; the slower reference path runs instead", dtype)
        return REFERENCE
    return Kernels(
        name="cuda",
        driver=cuda_driver.DriverFactory(dtype),
        attend=attention.Attend,
        nf4=nf4.multiply,
        capture=CudaGraphs,
        captures_ahead=True,
    )
