"""`make wheel-test`: what is installed from the wheels, on a machine without a compiler, beside kernels compiled here.

Both wheels are built and installed into an environment that has nothing else, with a PATH that has no compiler. There
`weft demo` runs in an empty directory and has to name prebuilt kernels. Then one `weft serve` of that environment with
these kernels and one with WEFT_KERNELS=native answer sixteen LoRAs in turns: at least 95 % as many tokens a second.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks import report, results, workload
from benchmarks.backends.remote import ROOT, Remote
from benchmarks.rows import LORAS, WHOLE, Goal, Other, Row, Side, at_least, batch
from benchmarks.turns import HERE, Bench, Key, Tick
from weft_training.demo.document import markdown, table

_PREBUILT, _NATIVE = "Weft, kernels of the wheel", "Weft, kernels compiled here"
_COMPILERS = ("c++", "cc", "g++", "gcc", "clang", "clang++")
_SHARE_MIN, _SHARE_WISHED = 0.95, 1.0
_KERNELS = re.compile(r"kernels (cpu \S+?)[,)]")


class Broken(Exception):
    """An installation that does not do what it should; the text has its last words."""


class Installed(NamedTuple):
    """An environment with both wheels. wheels: their sizes in bytes, by name."""

    directory: Path
    wheels: Mapping[str, int]

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What makes a process see this environment's commands alone, no compiler and no kernels of before."""
        return {"PATH": str(self.python.parent), "XDG_CACHE_HOME": str(self.directory / "cache"), "WEFT_KERNELS": ""}


def installed(scratch: Path) -> Installed:
    """Build both wheels and install them, with what they depend on, into an environment of their own."""
    wheels = []
    for source in (ROOT / "protos", ROOT):
        directory = scratch / "dist" / source.name
        _ran([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)], source, {})
        wheels += directory.glob("*.whl")
    made = Installed(scratch / "environment", {wheel.name: wheel.stat().st_size for wheel in wheels})
    venv.create(made.directory, with_pip=True, symlinks=True)
    for compiler in _COMPILERS:
        assert shutil.which(compiler, path=made.variables["PATH"]) is None
    pip = [str(made.python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    _ran([*pip, *map(str, wheels)], scratch, made.variables)
    return made


def demonstrated(made: Installed, scratch: Path) -> str:
    """Run `weft demo` in an empty directory; the kernels that it names. Raises Broken."""
    empty = scratch / "empty"
    empty.mkdir()
    said = _ran([str(made.python.with_name("weft")), "demo"], empty, made.variables)
    kernels = _named(said)
    if not kernels.startswith("cpu x86-64-"):
        raise Broken(f"weft demo: the kernels are {kernels!r} and not of the wheel\n{said}")
    return kernels


def row() -> Row:
    """Both servers with the same sixteen LoRAs."""
    trace = batch(workload.distinct(LORAS.ids), WHOLE)
    goals = at_least(_SHARE_MIN, _SHARE_WISHED), Goal(metric="step_ms"), Goal(metric="ttft_p50_ms")
    return Row(
        name="wheel",
        what="16 distinct LoRAs, rank 8",
        ours=Side(backend=_PREBUILT, trace=trace, holds=(LORAS,)),
        others=(Other(Side(backend=_NATIVE, trace=trace, holds=(LORAS,)), goals),),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--table", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args()
    console = Console(stderr=True)
    command = shlex.join(["python", "-m", "benchmarks.wheel", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="weft-wheel-") as name, console.status("") as status:
        scratch = Path(name)
        status.update("building the wheels, installing them")
        made = installed(scratch)
        status.update("weft demo")
        began = time.monotonic()
        demo = f"{demonstrated(made, scratch)}, every step right ({time.monotonic() - began:.0f} s)"

        def start(key: Key, log: Path, tick: Tick) -> Remote:
            variables = {"PATH": os.environ["PATH"], "WEFT_KERNELS": "native"} if key.backend == _NATIVE else {}
            settings = [f"{name}={value}" for name, value in (made.variables | variables).items()]
            worker = [str(made.python), "-m", "benchmarks.backends.weft_grpc"]
            return Remote([str(shutil.which("env")), *settings, *worker], log=log, threads=key.spec.threads)

        with Bench(lambda text, runs: status.update(text), start=start) as bench:
            found = bench.measure(row(), options.turns)
        kernels = {side.label: _named((HERE / ".runs" / f"{side.backend}.log").read_text()) for side in found.sides}
        if kernels[_NATIVE] != "cpu native" or kernels[_PREBUILT] != demo.partition(",")[0]:
            raise Broken(f"the servers computed with {kernels}")
    entry = {
        **results.entry(found, report.conditions(), command),
        "kernels": kernels,
        "demo": demo,
        "wheels": dict(made.wheels),
    }
    Console().print(table("From the wheel, beside compiled here", results.cells([entry]), num_names=results.NUM_NAMES))
    console.print(*results.failures([entry]), *results.misses([entry], {}), sep="\n", highlight=False)
    if options.json is not None:
        results.store([entry], options.json)
    if options.table is not None:
        options.table.write_text(_document(entry))
    raise SystemExit(any(ratio.verdict in ("missed", "not measured") for ratio in found.ratios))


def _document(entry: results.Entry) -> str:
    """The table with what it is of."""
    lines = [
        f"`weft demo` from the wheels, in an empty directory, without a compiler: {entry['demo']}.",
        ", ".join(f"{label}: {kernels}" for label, kernels in entry["kernels"].items()) + ".",
        ", ".join(f"{name}: {size / 1e6:.1f} MB" for name, size in entry["wheels"].items()) + ".",
        f"{report.line(entry['conditions'])}, median of {entry['turns']} turns, `{entry['command']}`.",
    ]
    cells = markdown(results.cells([entry]), num_names=results.NUM_NAMES)
    told = [f"- {line}" for line in [*results.failures([entry]), *results.misses([entry], {})]]
    return "\n\n".join(["# Installed from the wheel, beside compiled here", cells, *told, *lines]) + "\n"


def _named(text: str) -> str:
    """The kernels that a banner names."""
    found = _KERNELS.search(text)
    return found[1] if found else "none"


def _ran(command: Sequence[str], cwd: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | dict(variables), capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"[-3000:])
    return done.stdout


if __name__ == "__main__":
    main()
