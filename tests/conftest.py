"""Fixtures shared by the suite."""

import os
from pathlib import Path

# Without a GPU, kernels for CUDA run in Triton's interpreter (tests/kernels/interpreted.py), which has to be asked for
# before anything imports Triton. With one they are compiled for it: the interpreter would read device addresses on the
# host, which crashes. The driver is looked for in the file system, since asking torch would import Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/proc/driver/nvidia/version").exists() else "1")

import pytest
import torch

from tests import shapes

shapes.check()  # before anything imports weft.methods, as tests.tiny does

from tests import tiny  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Use two threads, or one in each of several processes: more threads than cores mostly wait for each other."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint directory of a tiny random Llama."""
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")
