"""The wheels, built once in a run."""

import fcntl
import os
from pathlib import Path

import pytest

from tests.deploy.distributions import CLIENT, SERVER, Wheel, built
from weft.kernels.cpu import build, library

WHOLE = bool(os.environ.get("WEFT_WHEEL_WHOLE"))
"""Whether wheels have every set of instructions, as for `make wheel-test`: that takes a minute."""


def instruction_sets() -> list[str]:
    """What the wheel of this run carries: the best that this processor runs, or all."""
    runs = [name for name, (_, needed) in build.INSTRUCTION_SETS.items() if needed <= library.processor_features()]
    return list(build.INSTRUCTION_SETS) if WHOLE else (runs or list(build.INSTRUCTION_SETS))[:1]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """Both distributions, built once however the tests are spread over processes."""
    directory = _shared(tmp_path_factory) / "wheels"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return {name: _once(name, directory / name) for name in (SERVER, CLIENT)}


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all processes of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _once(name: str, directory: Path) -> Wheel:
    for path in directory.glob("*.whl"):
        return Wheel(path, "")
    return built(name, directory, WEFT_WHEEL_KERNELS=" ".join(instruction_sets()))
