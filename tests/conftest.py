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

shapes.check()  # before anything imports weft.methods, as tests.bases does

from tests.bases import Bases  # noqa: E402
from weft.methods.protocol import BaseShape  # noqa: E402
from weft.model.loader import Base  # noqa: E402


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
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Return the tiny bases, for tests of more than one, or of one that is quantized or changed."""
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def architecture() -> str:
    """Return the architecture of `path` and `base`; a module of several overrides this by a fixture with parameters."""
    return "llama"


@pytest.fixture(scope="module")
def path(bases: Bases, architecture: str) -> Path:
    """Return the checkpoint of `base`, which tests only read."""
    return bases.path(architecture)


@pytest.fixture(scope="module")
def base(bases: Bases, architecture: str) -> Base:
    """Return the base as a server holds it, in float32 and shared; see `Bases`."""
    return bases(architecture)


@pytest.fixture(scope="module")
def shape(base: Base) -> BaseShape:
    """Return the shape of `base`, for tests of files and formulas, which compute nothing with it."""
    return base.shape


@pytest.fixture(scope="module")
def llama(bases: Bases) -> Base:
    """Return the Llama of `base`, whatever the module's architectures are."""
    return bases()
