"""Many tensors in one buffer, and the way to a device and back."""

import torch

from weft.kernels.device import IN_PLACE, Frame, transfer_to

TENSORS = [
    torch.arange(5),
    torch.arange(3, dtype=torch.int32),
    torch.empty(0, 4),
    torch.tensor([[1.5, -2.0], [3.0, 4.0]]),
    torch.tensor([0.1, 0.2], dtype=torch.float64),
    torch.tensor([], dtype=torch.int32),
]


def test_a_frame_has_room_for_everything_and_nothing_overlaps() -> None:
    frame = Frame.of(TENSORS)
    buffer = torch.zeros(frame.size_bytes, dtype=torch.uint8)
    for view, tensor in zip(frame.views(buffer), TENSORS, strict=True):
        assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
        assert not view.numel() or (view.data_ptr() - buffer.data_ptr()) % 16 == 0
        view.copy_(tensor)
    for view, tensor in zip(frame.views(buffer), TENSORS, strict=True):
        assert view.equal(tensor)


def test_the_host_moves_nothing_unless_it_is_told_where_to() -> None:
    assert all(moved is given for moved, given in zip(IN_PLACE.to_device(TENSORS), TENSORS, strict=True))
    assert IN_PLACE.to_host(TENSORS[0]) is TENSORS[0]
    buffer = torch.zeros(1 << 10, dtype=torch.uint8)
    moved = IN_PLACE.to_device(TENSORS, buffer)
    assert all(one.equal(given) for one, given in zip(moved, TENSORS, strict=True))
    assert all(view.equal(given) for view, given in zip(Frame.of(TENSORS).views(buffer), TENSORS, strict=True))


def test_a_cpu_is_reached_directly() -> None:
    assert type(transfer_to(torch.device("cpu"))) is type(IN_PLACE)
