"""How a step's tensors reach the device and its results come back: one copy each way, and one wait, for the results."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weft.adapters.slab import Part

_ALIGNMENT = 16  # bytes: what the widest loads of kernels like


class Frame(NamedTuple):
    """Where tensors lie, one behind the other, in a buffer of bytes."""

    parts: tuple[Part, ...]
    size_bytes: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Frame":
        """A frame for tensors of these shapes and dtypes."""
        parts, offset = [], 0
        for tensor in tensors:
            parts.append(Part(offset, tuple(tensor.shape), tensor.dtype))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(parts), offset)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in `buffer` (uint8, `size_bytes` or more)."""
        return [part.view(buffer) for part in self.parts]


class Transfer(Protocol):
    """The way to one device and back. Only the engine thread uses it."""

    def up(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        """The tensors on the device, in order with what the device computes; the host does not wait.

        into: uint8 on the device, where they are to lie as `Frame.of` them says; None where that does not matter.
        """
        ...

    def down(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, once the device has made it."""
        ...


class Direct:
    """Where the host is the device: nothing moves, unless it is told where to."""

    def up(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        if into is None:
            return list(tensors)
        views = Frame.of(tensors).views(into)
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
        return views

    def down(self, tensor: Tensor) -> Tensor:
        return tensor


HERE: Transfer = Direct()


class _Side:
    """One of two host buffers: the next step is written into the one while the device may still read the other."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._was_read = torch.cuda.Event()

    def buffer(self, size_bytes: int) -> Tensor:
        """The buffer, once the device has read what it held."""
        self._was_read.synchronize()
        if len(self._host) < size_bytes:
            self._host = torch.empty(2 * size_bytes, dtype=torch.uint8, pin_memory=True)
        return self._host[:size_bytes]

    def reading(self) -> None:
        """The device was told to read the buffer."""
        self._was_read.record()


class Pinned:
    """To a CUDA device, through pinned memory on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._this, self._other = _Side(), _Side()

    @torch.inference_mode()  # the host buffers may have been made in it, and then nobody else may write them
    def up(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> list[Tensor]:
        frame = Frame.of(tensors)
        self._this, self._other = self._other, self._this
        host = self._this.buffer(frame.size_bytes)
        for view, tensor in zip(frame.views(host), tensors, strict=True):
            view.copy_(tensor)
        if into is None:
            into = torch.empty(frame.size_bytes, dtype=torch.uint8, device=self._device)
        into[: frame.size_bytes].copy_(host, non_blocking=True)
        self._this.reading()
        return frame.views(into)

    def down(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        return host


def transfer_to(device: torch.device) -> Transfer:
    """The way to a device."""
    return Pinned(device) if device.type == "cuda" else Direct()
