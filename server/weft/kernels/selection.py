"""Which implementation computes the deltas and attention on a device.

Kernels are faster equals of the reference (methods/driver.py, model/paged_attention.py); where none exists for a
device, the reference itself runs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from weft.kernels import recording
from weft.kernels.cpu import driver, elementwise, library
from weft.kernels.cpu.tape import Tapes
from weft.kernels.recording import Record
from weft.kernels.step import Step
from weft.methods.inject import Driver

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """An implementation of the hot operations.

    name: for logs and build info.
    driver: makes a step's driver from (slot table, step on the device); None for the reference driver.
    attend: makes paged attention (model/paged_attention.py, Attend) for a KV pool's (keys, values); None for the
        reference.
    recorder: makes what records steps of decode rows (kernels/recording.py), where driver and attention read nothing
        but tensors that stay where they are; None where steps are told anew each time.
    records_ahead: whether recording takes so long that the steps that will come are recorded before requests do.
    decisions: what a step's driver decides from (slot table, slots) beside shapes, as bytes; None where it decides from
        the table's outline alone.
    rms_norm, gate: what model/elementwise.py puts into the model; None leaves it as it is.
    nf4: what model/nf4_linear.py puts into the model; None leaves it as it is.
    """

    name: str
    driver: Callable[[Any, Step], Driver] | None = None
    attend: Callable[[Sequence[Tensor], Sequence[Tensor]], Callable[..., Tensor]] | None = None
    recorder: Callable[[], Record] | None = None
    records_ahead: bool = False
    decisions: Callable[[Any, Tensor], bytes] | None = None
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] | None = None
    gate: Callable[[Tensor, Tensor, str], Tensor] | None = None
    nf4: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None


REFERENCE = Kernels(name="reference")


def select(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest implementation for a device and the base's dtype."""
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
        attend=driver.Attend,
        recorder=Tapes,
        decisions=driver.decisions,
        rms_norm=elementwise.rms_norm,
        gate=elementwise.gate,
    )


def _for_cuda(dtype: torch.dtype) -> Kernels:
    if find_spec("triton") is None:
        _log.warning("Triton is not installed; the slower reference path runs instead")
        return REFERENCE
    from weft.kernels.cuda import attention, nf4  # not before Triton is known to be there
    from weft.kernels.cuda import driver as cuda_driver

    if dtype not in cuda_driver.DTYPES:
        _log.warning("the kernels need float32 or bfloat16, given %s; the slower reference path runs instead", dtype)
        return REFERENCE
    return Kernels(
        name="cuda",
        driver=cuda_driver.DriverFactory(dtype),
        attend=attention.Attend,
        nf4=nf4.multiply,
        recorder=recording.CudaGraphs,
        records_ahead=True,
    )
