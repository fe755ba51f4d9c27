"""How an adapter's bytes come from the host to the device while the device computes."""

from typing import Protocol

import torch
from torch import Tensor


class Upload(Protocol):
    """Copies buffers to one device. Only the engine thread uses it."""

    def start(self, buffer: Tensor) -> Tensor:
        """The buffer's copy on the device, which may be under way yet."""
        ...

    def join(self) -> None:
        """What the device is told to compute from now on comes after every copy that was started; nobody waits here."""
        ...


class Shared:
    """Where the host is the device: both use the same bytes."""

    def start(self, buffer: Tensor) -> Tensor:
        return buffer

    def join(self) -> None:
        pass


class SideStream:
    """To a CUDA device on a stream of its own, so that a running step and a copy do not wait for each other.

    The buffer is to be pinned: of other memory the driver makes a pinned copy first, and the host waits for that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()
        self._is_joined = True

    def start(self, buffer: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            there = torch.empty_like(buffer, device=self._device)  # of the side stream's memory: nobody else writes it
            there.copy_(buffer, non_blocking=True)
            self._copied.record()
        there.record_stream(torch.cuda.current_stream(self._device))  # once dropped, not reused before steps have read
        self._is_joined = False
        return there

    def join(self) -> None:
        if not self._is_joined:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._is_joined = True


def upload_to(device: torch.device) -> Upload:
    """The way to a device."""
    return SideStream(device) if device.type == "cuda" else Shared()
