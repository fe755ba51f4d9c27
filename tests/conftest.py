"""Fixtures shared by the suite."""

import os

# Kernels for CUDA run in Triton's interpreter (tests/kernels/interpreted.py), which has to be asked for before anything
# imports Triton; with TRITON_INTERPRET=0 they are compiled for the GPU that is there.
os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest
import torch

from tests import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Two, or one in each of several processes: more than cores would wait for each other most of the time."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a tiny random Llama."""
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")
