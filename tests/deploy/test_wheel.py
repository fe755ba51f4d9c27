"""The wheel carries CPU kernels that run on old systems, without a compiler, and compute what the reference does.

`make wheel-test` does this with every set of instructions; otherwise it is done with the best that this processor runs.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.deploy.conftest import WHOLE, instruction_sets
from tests.deploy.distributions import SERVER, Wheel, built
from tests.deploy.files import ROOT
from weft.kernels.cpu import build, library

# What manylinux_2_28 allows (PEP 600 and auditwheel's policy).
FLOORS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
EQUALITY = ("attention", "deltas", "elementwise", "gemm", *(("routing",) if WHOLE else ()))
# Two of many routers' cases take two thirds of their time.
_LONG = "tests/kernels/test_cpu_routing.py::test_gates_equal_the_mathematics[none-torch."
SLOW = [f"--deselect={_LONG}{dtype}]" for dtype in ("float32", "bfloat16")]


def too_new(content: bytes) -> list[str]:
    """The symbol versions that a library needs, or defines, above the floors."""
    found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)(?=\0)", content)
    versions = {(name.decode(), tuple(map(int, number.split(b".")))) for name, number in found}
    return sorted(f"{name}_{number}" for name, number in versions if number > FLOORS[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="prebuilt for x86-64 only")
def test_the_wheel_carries_kernels_for_old_systems(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    assert wheels[SERVER].path.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    site = tmp_path / "site"
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel.path) as archive:
            archive.extractall(site)
    libraries = sorted((site / "weft/kernels/cpu/prebuilt").iterdir())
    assert {path.stem for path in libraries} == set(instruction_sets())
    sources = {path.name for path in Path(build.__file__).parent.iterdir() if path.suffix in (".cpp", ".h")}
    assert sources <= {path.name for path in (site / "weft/kernels/cpu").iterdir()}
    for path in libraries:
        content = path.read_bytes()
        assert b"\0GLIBC_2.2.5\0" in content  # what is searched for is found
        assert too_new(content) == [], path.name
    for name in instruction_sets():  # best first: each is chosen once the better are gone
        if build.INSTRUCTION_SETS[name][1] <= library.processor_features():
            require_equal_to_the_reference(name, site, tmp_path)
        (site / f"weft/kernels/cpu/prebuilt/{name}.so").unlink()


def test_a_symbol_that_is_too_new_is_seen() -> None:
    """Negative control."""
    assert too_new(b"\0GLIBC_2.28\0GLIBC_2.34\0GLIBCXX_3.4.29\0") == ["GLIBCXX_(3, 4, 29)", "GLIBC_(2, 34)"]


def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path: Path) -> None:
    wheel = built(SERVER, tmp_path / "dist", CXX=str(tmp_path / "absent"))
    assert wheel.path.name.endswith("-py3-none-any.whl")
    assert "no prebuilt CPU kernels: no C++ compiler" in wheel.said


def require_equal_to_the_reference(name: str, site: Path, tmp_path: Path) -> None:
    """Run the kernels' own tests with the package in `site`, whose best library is `name`, and without a compiler."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "WEFT_KERNELS")}
    environment |= {"PYTHONPATH": str(site), "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    kind = "from weft.kernels.cpu import library; print(library.load().kind, library.__file__)"
    command = (sys.executable, "-c", kind)
    said = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert said.split() == [name, str(site / "weft/kernels/cpu/library.py")]
    tests = [f"tests/kernels/test_cpu_{kernel}.py" for kernel in EQUALITY]
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, *SLOW)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d{2,} passed", done.stdout), done.stdout[-400:]
    assert not (tmp_path / "cache" / "weft" / "kernels").exists()


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (set(), None),
        (build.INSTRUCTION_SETS["x86-64-v3"][1], "x86-64-v3"),
        (build.INSTRUCTION_SETS["x86-64-v4"][1] - {"avx512dq"}, "x86-64-v3"),
        (build.INSTRUCTION_SETS["x86-64-v4"][1], "x86-64-v4"),
        (build.INSTRUCTION_SETS["x86-64-v4-bf16"][1] | {"amx_tile"}, "x86-64-v4-bf16"),
    ],
)
def test_the_best_that_the_processor_runs_is_chosen(tmp_path: Path, features: set[str], wanted: str | None) -> None:
    assert library.prebuilt(tmp_path, features) is None  # as in a checkout
    for name in build.INSTRUCTION_SETS:
        (tmp_path / f"{name}.so").touch()
    found = library.prebuilt(tmp_path, features)
    assert found == (None if wanted is None else (wanted, tmp_path / f"{wanted}.so"))
