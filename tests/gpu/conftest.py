"""A base on the GPU, and kernels whose steps can be captured."""

from collections.abc import Iterator

import pytest
import torch

from tests.bases import Bases
from weft.kernels.selection import Kernels, select
from weft.model import loader


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """In the interpreter these tests would crash: it reads the addresses inside device tables on the host."""
    triton = pytest.importorskip("triton")
    assert not triton.knobs.runtime.interpret, "run the tests of tests/gpu with TRITON_INTERPRET=0"


@pytest.fixture(scope="module")
def base(bases: Bases) -> loader.Base:
    return bases(device="cuda")


@pytest.fixture(scope="module")
def kernels(base: loader.Base) -> Kernels:
    chosen = select(base.device, base.dtype)
    if chosen.capture is None:
        pytest.skip(f"steps with the kernels {chosen.name} cannot be captured")
    return chosen


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raise an error if code waits for the device, or copies so that the host waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
