"""Copies to the device and back: a step's tensors, its results, and adapters' weights.

A step's tensors travel in one copy, and the host waits only for results.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: the widest load of a kernel


class Part(NamedTuple):
    """A tensor inside a buffer of bytes."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of `buffer` (uint8)."""
        count = int(torch.Size(self.shape).numel())
        return buffer[self.offset : self.offset + count * self.dtype.itemsize].view(self.dtype).view(self.shape)


class Frame(NamedTuple):
    """Layout of tensors, one after another, in a buffer of bytes."""

    parts: tuple[Part, ...]
    size_bytes: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Frame":
        """Return the frame for tensors of these shapes and dtypes."""
        parts, offset = [], 0
        for tensor in tensors:
            parts.append(Part(offset, tuple(tensor.shape), tensor.dtype))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(parts), offset)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors as views of `buffer` (uint8, `size_bytes` or more)."""
        return [part.view(buffer) for part in self.parts]


class Transfer(Protocol):
    """Copies between the host and one device. Only the engine thread uses it."""

    def to_device(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        """Return the tensors on the device, in order with its work. The host does not wait.

        into: uint8 on the device; the tensors are placed in it as `Frame.of` says. None allocates.
        """
        ...

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the host, after waiting until the device has computed it."""
        ...

    def stage(self, buffer: Tensor) -> Tensor:
        """Start to copy a buffer beside the device's other work. Return the copy, which can be read after `wait`."""
        ...

    def wait(self) -> None:
        """Order all later work on the device after the copies that `stage` started. The host does not wait."""
        ...


class InPlace:
    """The host as its own device: tensors stay where they are unless `into` is given."""

    def to_device(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        if into is None:
            return list(tensors)
        views = Frame.of(tensors).views(into)
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
        return views

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor

    def stage(self, buffer: Tensor) -> Tensor:
        return buffer

    def wait(self) -> None:
        pass


IN_PLACE: Transfer = InPlace()


class _Side:
    """One of two host buffers: the host fills one for the next step while the device may still read the other."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._was_read = torch.cuda.Event()

    def buffer(self, size_bytes: int) -> Tensor:
        """Wait until the device has read the buffer, then return it."""
        self._was_read.synchronize()
        if len(self._host) < size_bytes:
            self._host = torch.empty(2 * size_bytes, dtype=torch.uint8, pin_memory=True)
        return self._host[:size_bytes]

    def mark_read(self) -> None:
        """Record that the work queued so far reads the buffer."""
        self._was_read.record()


class CudaTransfer:
    """Copies to a CUDA device: steps through pinned memory on the current stream, adapters on a separate stream.

    A buffer for `stage` should be pinned. The driver first copies any other memory to pinned memory, and the host waits
    for that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._this, self._other = _Side(), _Side()
        self._stream = torch.cuda.Stream(device)
        self._staged = torch.cuda.Event()
        self._is_ordered = True  # the current stream's later work comes after every staged copy

    @torch.inference_mode()  # a buffer made in inference mode can be written only there
    def to_device(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        frame = Frame.of(tensors)
        self._this, self._other = self._other, self._this
        host = self._this.buffer(frame.size_bytes)
        for view, tensor in zip(frame.views(host), tensors, strict=True):
            view.copy_(tensor)
        if into is None:
            into = torch.empty(frame.size_bytes, dtype=torch.uint8, device=self._device)
        into[: frame.size_bytes].copy_(host, non_blocking=True)
        self._this.mark_read()
        return frame.views(into)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        return host

    def stage(self, buffer: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            there = torch.empty_like(buffer, device=self._device)  # from this stream's memory: no step writes to it
            there.copy_(buffer, non_blocking=True)
            self._staged.record()
        there.record_stream(torch.cuda.current_stream(self._device))  # not reused before steps have read it
        self._is_ordered = False
        return there

    def wait(self) -> None:
        if not self._is_ordered:
            torch.cuda.current_stream(self._device).wait_event(self._staged)
            self._is_ordered = True


def transfer_to(device: torch.device) -> Transfer:
    """Return the transfer for a device."""
    return CudaTransfer(device) if device.type == "cuda" else InPlace()
