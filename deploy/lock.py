"""Write the locks of the image: each version that it installs, with the sha256 of every file of it on PyPI.

    make lock

    locks/server.txt  what the server needs, in the versions that are installed here, and so tested; without torch
    locks/cuda.txt    PyPI's torch, and what it needs beside that
    locks/build.txt   what builds the wheels of Weft

PyTorch's wheels for CPUs are on an index of their own, with versions of their own, and in no lock.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

_ROOT = Path(__file__).parents[1]
_LOCKS = Path(__file__).parent / "locks"
_PYPI = "https://pypi.org/simple/"
_JSON = "application/vnd.pypi.simple.v1+json"
_HEAD = "# Written by `make lock` (deploy/lock.py).\n"
_TORCH = "torch"


def main() -> None:
    """Write all three."""
    torch = Version(distribution(_TORCH).version).public
    server = {name: found for name, found in installed(server_requirements()).items() if name != _TORCH}
    _write("server", server)
    _write("cuda", {name: found for name, found in _with_cuda(server, torch).items() if name not in server})
    _write("build", installed(_project("pyproject.toml")["build-system"]["requires"]))


def server_requirements() -> list[str]:
    """Return the direct dependencies of the server and of its client."""
    hook = _project("pyproject.toml")["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    return [*hook["dependencies"], *_project("protos/pyproject.toml")["project"]["dependencies"]]


def installed(requirements: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of `requirements` and of all that they require, by name."""
    versions: dict[str, str] = {}
    left, seen = [Requirement(text) for text in requirements], set()
    while left:
        requirement = left.pop()
        for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == requirement.name}:
            seen.add((requirement.name, extra))
            found = distribution(requirement.name)
            versions[canonicalize_name(requirement.name)] = found.version
            left += [needed for needed in map(Requirement, found.requires or ()) if _holds(needed, extra)]
    return versions


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _project(name: str) -> dict:
    return tomllib.loads((_ROOT / name).read_text())


def _with_cuda(server: Mapping[str, str], torch: str) -> dict[str, str]:
    """Return the versions that pip installs for PyPI's torch beside `server`."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in server.items())
        constraints.flush()
        resolve = (sys.executable, str(Path(__file__).with_name("resolve.py")), "install", "--ignore-installed")
        wanted = ("--constraint", constraints.name, f"{_TORCH}==={torch}")  # to the letter: no build for CPUs
        done = subprocess.run((*resolve, *wanted), stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603  our own
    [line] = re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE)
    pairs = (item.rpartition("-") for item in line.split())
    return {canonicalize_name(name): version for name, _, version in pairs}


def _write(lock: str, versions: Mapping[str, str]) -> None:
    entries = [_entry(name, versions[name]) for name in sorted(versions)]
    (_LOCKS / f"{lock}.txt").write_text(_HEAD + "".join(entries))
    print(f"{lock}: {len(entries)} packages")


def _entry(name: str, version: str) -> str:
    """Return the requirement of one version by the hashes of its files. Raises LookupError if PyPI has none."""
    request = urllib.request.Request(f"{_PYPI}{name}/", headers={"Accept": _JSON})  # noqa: S310  https
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  https
        files = json.load(answer)["files"]
    hashes = sorted({file["hashes"]["sha256"] for file in files if _version_of(file["filename"]) == Version(version)})
    if not hashes:
        raise LookupError(f"{name}: PyPI has no file of version {version}; install one that it has, and lock again")
    return " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{digest}" for digest in hashes)]) + "\n"


def _version_of(filename: str) -> Version | None:
    try:
        return parse_wheel_filename(filename)[1] if filename.endswith(".whl") else parse_sdist_filename(filename)[1]
    except ValueError:  # a kind of file that pip does not install
        return None


if __name__ == "__main__":
    main()
