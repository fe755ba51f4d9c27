"""The pinned set can be installed: beside a PyTorch for CPUs and beside the one for CUDA, as the Makefile does it.

pip resolves from the index's metadata and installs nothing.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_CONSTRAINTS = _ROOT / "constraints.txt"
_SERVER, _CLIENT = (tomllib.loads((_ROOT / path).read_text()) for path in ("pyproject.toml", "protos/pyproject.toml"))
_DEPENDENCIES = [
    *_SERVER["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"],
    *_CLIENT["project"]["dependencies"],
]
_CUDA = "torch===2.13.0"  # to the letter, so that a build for CPUs, 2.13.0+cpu, does not do


def _resolved(requirements: list[str], report: Path) -> dict[str, str]:
    """Versions by name of what pip would install; skips where no index answers."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--retries", "0"]
    ended = subprocess.run(
        [*pip, "--report", str(report), *requirements], capture_output=True, text=True, timeout=240, check=False
    )
    if any(text in ended.stderr for text in ("No matching distribution found for torch", "Failed to establish")):
        pytest.skip("no package index has this PyTorch")
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found}


def test_the_cuda_set_resolves_and_torch_brings_its_own_triton(tmp_path: Path) -> None:
    requirements = ["--constraint", str(_CONSTRAINTS), _CUDA, *_DEPENDENCIES]
    found = _resolved(requirements, tmp_path / "cuda.json")
    if not any(name.startswith("nvidia-") for name in found):
        pytest.skip("the index has no PyTorch for CUDA")
    assert found["triton"]
    assert "triton" not in _CONSTRAINTS.read_text()


def test_a_pin_beside_the_cuda_set_does_not_resolve(tmp_path: Path) -> None:
    """The negative control: what was pinned once."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--retries", "0"]
    ended = subprocess.run([*pip, _CUDA, "triton==3.6.0"], capture_output=True, text=True, timeout=240, check=False)
    if "No matching distribution found for torch" in ended.stderr or "Failed to establish" in ended.stderr:
        pytest.skip("no package index has this PyTorch")
    assert "ResolutionImpossible" in ended.stderr


def test_the_interpreter_is_an_extra_of_its_own() -> None:
    extras = _SERVER["project"]["optional-dependencies"]
    holding = [name for name, packages in extras.items() if any(package.startswith("triton") for package in packages)]
    assert holding == ["interpret"]
    assert ".[interpret]" in (_ROOT / "Makefile").read_text()
