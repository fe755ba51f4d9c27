"""The pinned set, of which the locks are made, can be installed beside a PyTorch for CPUs and beside the one for CUDA.

pip resolves from the index's metadata (deploy/resolve.py) and installs nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parents[2]
_CONSTRAINTS = _ROOT / "constraints.txt"
_DOCKERFILE = (_ROOT / "deploy" / "Dockerfile").read_text()
_SERVER, _CLIENT = (tomllib.loads((_ROOT / path).read_text()) for path in ("pyproject.toml", "protos/pyproject.toml"))
_DEPENDENCIES = [
    *_SERVER["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"],
    *_CLIENT["project"]["dependencies"],
]
_CUDA = "torch===2.13.0"  # to the letter, so that a build for CPUs, 2.13.0+cpu, does not do

_TORCH = ("--no-deps", "--constraint", "constraints.txt", "torch")
_ALL = ("--constraint", "constraints.txt", "--requirement", "requirements.txt")


class Ended(NamedTuple):
    """The versions that pip would install, by name, and its output."""

    is_resolved: bool
    versions: dict[str, str]
    errors: str


def _resolve(*wanted: str, directory: Path, index: str, anew: bool = True) -> Ended:
    """Resolve what pip is to install in `directory`; skips where no index answers.

    anew: as if nothing were installed; what is need not be looked for on an index.
    """
    flags = ["--retries", "0", "--timeout", "10", *(["--ignore-installed"] if anew else [])]
    ended = subprocess.run(
        [sys.executable, str(_ROOT / "deploy" / "resolve.py"), "install", *flags, *wanted],
        cwd=directory,
        env={"PIP_INDEX_URL": index} | os.environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "No matching distribution found for torch" in ended.stderr:
        pytest.skip("no package index has this PyTorch")
    would = re.search(r"^Would install(.*)$", ended.stdout, re.MULTILINE)
    pairs = (item.rpartition("-") for item in would[1].split()) if would else ()
    versions = {name.lower().replace("_", "-"): found for name, _, found in pairs}
    return Ended(would is not None, versions, ended.stderr)


def _arguments(dockerfile: str) -> dict[str, dict[str, str]]:
    """By variant what an image is built with: the defaults, and what the Dockerfile's head says for CUDA."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    for_cuda = dict(re.findall(r"^#.*--build-arg (\w+)=(\S+)", dockerfile, re.MULTILINE))
    return {"cpu": defaults, "cuda": defaults | for_cuda}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    shutil.copy(_CONSTRAINTS, tmp_path)
    (tmp_path / "requirements.txt").write_text("\n".join(_DEPENDENCIES))
    return tmp_path


def test_the_set_for_cpus_resolves(context: Path) -> None:
    """torch by itself; the others beside it, as they were installed here with the same constraints."""
    arguments = _arguments(_DOCKERFILE)["cpu"]
    torch = _resolve(*_TORCH, directory=context, index=arguments["TORCH_INDEX_URL"]).versions
    assert list(torch) == ["torch"]
    if not torch["torch"].endswith("+cpu") or torch["torch"] != version("torch"):
        pytest.skip("what is installed here is another PyTorch")
    wanted = (*_ALL, f"torch==={torch['torch']}")
    found = _resolve(*wanted, directory=context, index=arguments["PIP_INDEX_URL"], anew=False)
    assert found.is_resolved, found.errors[-2000:]
    assert not [name for name in found.versions if name in ("torch", "triton") or name.startswith("nvidia-")]


@pytest.mark.slow
def test_the_set_for_cuda_resolves_and_torch_brings_its_own_triton(context: Path) -> None:
    """All of it anew."""
    found = _resolve(*_ALL, _CUDA, directory=context, index=_arguments(_DOCKERFILE)["cuda"]["PIP_INDEX_URL"])
    assert found.is_resolved, found.errors[-2000:]
    if not any(name.startswith("nvidia-") for name in found.versions):
        pytest.skip("the index has no PyTorch for CUDA")
    wanted = {re.split(r"[<>=]", each)[0].replace("_", "-") for each in _DEPENDENCIES}
    assert wanted | {"triton"} <= set(found.versions)
    assert found.versions["torch"] in _CUDA


def test_a_pin_beside_the_cuda_set_does_not_resolve(context: Path) -> None:
    """The negative control: what was pinned once."""
    with (context / "constraints.txt").open("a") as constraints:
        constraints.write("triton==3.6.0\n")
    (context / "requirements.txt").write_text("triton\n")
    ended = _resolve(*_ALL, _CUDA, directory=context, index=_arguments(_DOCKERFILE)["cuda"]["PIP_INDEX_URL"])
    assert not ended.is_resolved
    assert "ResolutionImpossible" in ended.errors


def test_the_dockerfile_is_read_as_it_is_meant() -> None:
    arguments = _arguments(_DOCKERFILE)
    assert arguments["cpu"]["TORCH_INDEX_URL"].endswith("/cpu")
    assert arguments["cuda"]["TORCH_INDEX_URL"] == arguments["cpu"]["PIP_INDEX_URL"]


def test_the_interpreter_is_an_extra_of_its_own() -> None:
    assert "triton" not in _CONSTRAINTS.read_text()
    extras = _SERVER["project"]["optional-dependencies"]
    holding = [name for name, packages in extras.items() if any(package.startswith("triton") for package in packages)]
    assert holding == ["interpret"]
    assert ".[interpret]" in (_ROOT / "Makefile").read_text()
