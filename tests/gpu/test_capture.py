"""On a GPU: proven steps are captured, others are detected before, and a failed capture does no harm."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.test_host_reads import MOVES, OF_THE_HOST
from weft.kernels import host_reads
from weft.kernels.capture import CudaDevice, CudaGraphs, NotCapturable, survives_failure

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_what_moves_is_refused(moves: Callable[[Tensor], object]) -> None:
    with torch.inference_mode(), pytest.raises(NotCapturable):
        host_reads.prove(lambda: moves(torch.zeros(4, 3, device=DEVICE)), DEVICE)


@pytest.mark.parametrize("stays", OF_THE_HOST.values(), ids=OF_THE_HOST)
def test_what_is_proven_does_not_wait_and_is_captured(
    stays: Callable[[Tensor], Tensor], request: pytest.FixtureRequest
) -> None:
    x = torch.ones(4, 3, device=DEVICE)
    with torch.inference_mode():
        host_reads.prove(lambda: stays(x), DEVICE)
        wanted = stays(x)
        replay = CudaGraphs()(lambda: stays(x))
        torch.testing.assert_close(replay(), wanted)
        request.getfixturevalue("no_waiting")
        stays(x)


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    if not survives_failure(torch.__version__):
        pytest.skip("this torch does not survive it")
    x, stream = torch.ones(4, device=DEVICE), torch.cuda.current_stream()
    calls = []

    def reads_the_second_time() -> Tensor:
        calls.append(None)
        return x * x.sum().item() if len(calls) > 1 else x + 1

    record = CudaGraphs()
    with pytest.raises(NotCapturable):
        record(reads_the_second_time)
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    gc.collect()
    replay = record(lambda: x + 1)
    assert replay().tolist() == [2.0] * 4


def test_a_warm_up_says_what_it_took() -> None:
    device, num_bytes = CudaDevice(), 64 << 20
    taken = device.warm_up(lambda: torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE).sum())
    assert num_bytes <= taken < 2 * num_bytes
    held = torch.zeros(8 * num_bytes, dtype=torch.uint8, device=DEVICE)
    room = device.room_bytes()
    del held
    assert 7 * num_bytes < device.room_bytes() - room < 9 * num_bytes
