"""Both distributions as files and installed: built without a network, in virtual environments of their own."""

import base64
import csv
import hashlib
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

from tests.deploy.files import ROOT

SERVER, CLIENT = "weft-serve", "weft-serve-client"
SOURCES = {SERVER: ".", CLIENT: "protos"}  # where each is, below the root of a tree


class Wheel(NamedTuple):
    """A wheel, and the output of hatch during the build."""

    path: Path
    said: str

    def names(self) -> set[str]:
        with zipfile.ZipFile(self.path) as archive:
            return set(archive.namelist())


def built(name: str, directory: Path, *, root: Path = ROOT, **variables: str) -> Wheel:
    """Build the wheel of a distribution into `directory`, which has no other, with the hatchling that is here.

    root: of the tree. Raises CalledProcessError if hatchling fails.
    """
    command = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory))
    environment = os.environ | variables
    done = subprocess.run(
        command, cwd=root / SOURCES[name], env=environment, check=True, capture_output=True, text=True
    )
    [path] = directory.glob("*.whl")
    return Wheel(path, done.stdout + done.stderr)


def in_both(one: Wheel, other: Wheel) -> set[str]:
    """Return the files that two wheels would install to the same path."""
    return one.names() & other.names()


class Environment:
    """A virtual environment without pip, into which wheels are put with the pip that is here.

    What is run in it sees its own packages, those in `places`, and nothing else of this process's environment.
    """

    def __init__(self, directory: Path) -> None:
        venv.create(directory, symlinks=True)
        self.bin = directory / "bin"
        [self.site] = directory.glob("lib/python*/site-packages")
        self._pip = directory / "pip"
        link([distribution("pip")], self._pip)

    def install(self, wheel: Wheel) -> None:
        self._ran("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel.path), places=[self._pip])

    def uninstall(self, name: str) -> None:
        self._ran("-m", "pip", "uninstall", "--yes", "--quiet", name, places=[self._pip])

    def python(self, code: str, *arguments: str, places: list[Path], cwd: Path | None = None) -> str:
        """Return the output of a program."""
        return self._ran("-c", code, *arguments, places=places, cwd=cwd)

    def command(self, *arguments: str, places: list[Path], cwd: Path | None = None) -> str:
        """Return the output of the command `weft`."""
        return self._ran(str(self.bin / "weft"), *arguments, places=places, cwd=cwd)

    def damage(self, name: str) -> list[str]:
        """Return the files of an installed distribution that are missing or differ from its wheel."""
        [record] = self.site.glob(f"{name.replace('-', '_')}-[0-9]*.dist-info/RECORD")
        with record.open(newline="") as rows:
            return [path for path, digest, _ in csv.reader(rows) if digest and _digest(self.site / path) != digest]

    def _ran(self, *arguments: str, places: list[Path], cwd: Path | None = None) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, places)), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = (str(self.bin / "python"), *arguments)
        done = subprocess.run(command, cwd=cwd or self.site, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


def declared(wheel: Wheel) -> list[str]:
    """Return the requirements of a wheel without extras."""
    with zipfile.ZipFile(wheel.path) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [requirement for requirement in found if "extra ==" not in requirement]


def needed(requirements: list[str]) -> Iterator[Distribution]:
    """The distributions that are here of these requirements, with what they require in turn."""
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        [name] = re.findall(r"^[\w.-]+", requirement)
        found = distribution(name)
        yield found
        yield from needed(found.requires or [])


def link(distributions: list[Distribution], directory: Path) -> Path:
    """Make a directory from which only these distributions can be imported; nothing is copied."""
    directory.mkdir()
    for found in distributions:
        tops = {path.parts[0] for path in found.files or () if path.suffix in (".py", ".so")} - {"..", "__pycache__"}
        for top in tops:
            if not (directory / top).exists():
                (directory / top).symlink_to(str(found.locate_file(top)))
    return directory


def here() -> list[Path]:
    """Where the packages of this environment lie; what is installed editable is not seen there."""
    return [Path(path) for path in sys.path if Path(path).name == "site-packages"]
