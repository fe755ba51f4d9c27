"""The pinned set can be installed: beside a PyTorch for CPUs and beside the one for CUDA, as the image does it.

What the Dockerfile runs is run here, but that pip resolves from the index's metadata and installs nothing.
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
_OWN = "--no-deps ./protos ."  # the line that installs what the image is of
_CUDA = "torch===2.13.0"  # to the letter, so that a build for CPUs, 2.13.0+cpu, does not do

# pip resolves from the metadata at the ends of wheels, and would then fetch what is left of them: gigabytes for CUDA.
# And it hashes a thousand tags for each wheel that an index lists, which is most of its time.
_PIP = """
import sys
from pip._internal.cli.main import main
from pip._internal.models.wheel import Wheel
from pip._internal.operations.prepare import RequirementPreparer

known = {}

def supported(wheel, tags):
    found = known.get(id(tags)) or known.setdefault(id(tags), frozenset(tags))
    return not found.isdisjoint(wheel.file_tags)

def end(preparer, requirements, *rest, **options):
    print("Would install", *("-".join(one.link.filename.split("-")[:2]) for one in requirements if one.link))
    sys.exit()

Wheel.supported = supported
RequirementPreparer.prepare_linked_requirements_more = end
main(sys.argv[1:])
"""
_FLAGS = "--dry-run --use-feature=fast-deps --retries 0 --timeout 10"


class Ended(NamedTuple):
    """The versions that pip would install, by name, and its output."""

    is_resolved: bool
    versions: dict[str, str]
    errors: str


def _run(command: str, directory: Path, arguments: dict[str, str], *, anew: bool = True) -> Ended:
    """Run a line of the Dockerfile with the arguments of a build; skips where no index answers.

    anew: as if nothing were installed; what is need not be looked for on an index.
    """
    pip = directory / "resolve.py"
    pip.write_text(_PIP)
    flags = f"{_FLAGS} --ignore-installed" if anew else _FLAGS
    command = command.replace("/opt/weft/bin/pip install", f'"{sys.executable}" "{pip}" install {flags}')
    command = command.replace("/opt/weft/bin/python", f'"{sys.executable}"')
    ended = subprocess.run(
        ["sh", "-ec", command],
        cwd=directory,
        env=arguments | os.environ,
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


def _pip_lines(dockerfile: str) -> list[str]:
    """The commands of a Dockerfile that install from an index, in order."""
    joined = dockerfile.replace("\\\n", " ")
    runs = re.findall(r"^RUN (.*)$", joined, re.MULTILINE)
    return [run for run in runs if "pip install" in run and not run.endswith(_OWN)]


def _arguments(dockerfile: str) -> dict[str, dict[str, str]]:
    """By variant what an image is built with: the defaults, and what the Dockerfile's head says for CUDA."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    for_cuda = dict(re.findall(r"^#.*--build-arg (\w+)=(\S+)", dockerfile, re.MULTILINE))
    return {"cpu": defaults, "cuda": defaults | for_cuda}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What the Dockerfile copies before it installs."""
    (tmp_path / "protos").mkdir()
    for name in ("constraints.txt", "pyproject.toml", "protos/pyproject.toml"):
        shutil.copy(_ROOT / name, tmp_path / name)
    return tmp_path


def test_the_image_for_cpus_resolves(context: Path) -> None:
    """torch by itself; the others beside it, as they were installed here with the same constraints."""
    arguments = _arguments(_DOCKERFILE)["cpu"]
    for_torch, for_all = _pip_lines(_DOCKERFILE)
    torch = _run(for_torch, context, arguments).versions
    assert list(torch) == ["torch"]
    if not torch["torch"].endswith("+cpu") or torch["torch"] != version("torch"):
        pytest.skip("what is installed here is another PyTorch")
    found = _run(f"{for_all} torch==={torch['torch']}", context, arguments, anew=False)
    assert found.is_resolved, found.errors[-2000:]
    assert not [name for name in found.versions if name in ("torch", "triton") or name.startswith("nvidia-")]


@pytest.mark.slow
def test_the_image_for_cuda_resolves_and_torch_brings_its_own_triton(context: Path) -> None:
    """All of it anew."""
    for_torch, for_all = _pip_lines(_DOCKERFILE)
    assert for_torch.endswith(" torch")
    found = _run(f"{for_all} {_CUDA}", context, _arguments(_DOCKERFILE)["cuda"])
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
    for_all = _pip_lines(_DOCKERFILE)[1].partition("&&")[2]
    ended = _run(f"{for_all} {_CUDA}", context, _arguments(_DOCKERFILE)["cuda"])
    assert not ended.is_resolved
    assert "ResolutionImpossible" in ended.errors


def test_the_dockerfile_is_read_as_it_is_meant() -> None:
    lines = _pip_lines(_DOCKERFILE)
    assert len(lines) == 2
    assert all("--constraint constraints.txt" in line for line in lines)
    assert len(_pip_lines(_DOCKERFILE.replace(_OWN, "."))) == 3
    arguments = _arguments(_DOCKERFILE)
    assert arguments["cpu"]["TORCH_INDEX_URL"].endswith("/cpu")
    assert arguments["cuda"]["TORCH_INDEX_URL"] == arguments["cpu"]["PIP_INDEX_URL"]


def test_the_interpreter_is_an_extra_of_its_own() -> None:
    assert "triton" not in _CONSTRAINTS.read_text()
    extras = _SERVER["project"]["optional-dependencies"]
    holding = [name for name, packages in extras.items() if any(package.startswith("triton") for package in packages)]
    assert holding == ["interpret"]
    assert ".[interpret]" in (_ROOT / "Makefile").read_text()
