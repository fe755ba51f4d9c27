"""`make wheel-test`: an installation from the wheels, on a machine without a compiler, beside kernels compiled here.

Both wheels are built and installed into an environment that has nothing else, with a PATH that has no compiler. There
`weft demo` runs in an empty directory and must name prebuilt kernels. Then the Python of that environment measures
these beside kernels that are compiled for this processor (benchmarks/prebuilt.py).
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks.backends.remote import ROOT

_COMPILERS = ("c++", "cc", "g++", "gcc", "clang", "clang++")
_KERNELS = re.compile(r"kernels (cpu \S+?)[,)]")


class Broken(Exception):
    """An installation that does not work as it should; the text has its last output."""


class Installed(NamedTuple):
    """An environment with both wheels."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that hide all commands but this environment's, every compiler and older kernels."""
        return {"PATH": str(self.python.parent), "XDG_CACHE_HOME": str(self.directory / "cache"), "WEFT_KERNELS": ""}


def installed(directory: Path) -> Installed:
    """Build both wheels and install them with their dependencies into an environment; an existing one is reused."""
    made = Installed(directory)
    if made.python.with_name("weft").exists():
        return made
    wheels: list[Path] = []
    for source in (ROOT / "protos", ROOT):
        target = directory / "wheels" / source.name
        _ran([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)], source, {})
        wheels += target.glob("*.whl")
    venv.create(directory, with_pip=True, symlinks=True)
    for compiler in _COMPILERS:
        assert shutil.which(compiler, path=made.variables["PATH"]) is None
    pip = [str(made.python), "-m", "pip", "install", "--quiet", "--no-compile"]
    pip += ["--constraint", str(ROOT / "constraints.txt")]
    _ran([*pip, *map(str, wheels)], directory, made.variables)
    return made


def demonstrated(made: Installed) -> str:
    """Run `weft demo` in an empty directory, once per environment; return its output. Raises Broken."""
    log = made.directory / "demo.log"
    if not log.exists():
        with tempfile.TemporaryDirectory() as empty:
            log.write_text(_ran([str(made.python.with_name("weft")), "demo"], Path(empty), made.variables))
    return log.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="keep the environment here, and take the one that is here")
    parser.add_argument("measure", nargs=argparse.REMAINDER, help="-- and options of benchmarks.prebuilt")
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="weft-wheel-") as scratch, console.status("") as status:
        status.update("building the wheels, installing them")
        made = installed((options.environment or Path(scratch, "environment")).absolute())
        status.update("weft demo")
        demo = demonstrated(made)
        if not named(demo).startswith("cpu x86-64-"):
            raise Broken(f"weft demo: the kernels are {named(demo)} and not of the wheel\n{demo}")
        console.print(demo, highlight=False, markup=False)
        status.update("measuring")
        command = [str(made.python), "-m", "benchmarks.prebuilt", "--demo", demo.strip().splitlines()[-1]]
        native = made.variables | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        print(_ran([*command, *(one for one in options.measure if one != "--")], ROOT, native))


def named(text: str) -> str:
    """Return the kernels that a banner names, wherever its lines break."""
    found = _KERNELS.search(" ".join(text.split()))
    return found[1] if found else "none"


def _ran(command: Sequence[str], cwd: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | dict(variables), capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"[-3000:])
    return done.stdout


if __name__ == "__main__":
    main()
