"""`make wheel-test`: what is installed from the wheels, on a machine without a compiler, beside kernels compiled here.

Both wheels are built and installed into an environment that has nothing else, with a PATH that has no compiler. There
`weft demo` runs in an empty directory and has to name prebuilt kernels. Then one `weft serve` of that environment with
these kernels and one with WEFT_KERNELS=native answer sixteen LoRAs in turns: at least 95 % as many tokens a second.
Where torch has no fast product of bfloat16, which would hide the kernels behind it, both hold the base in float32.
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

import torch
from rich.console import Console

from benchmarks import report, results, workload
from benchmarks.backends.remote import ROOT, Remote
from benchmarks.rows import LORAS, SHORT, Goal, Other, Row, Side, at_least, batch
from benchmarks.turns import HERE, Bench, Key, Tick
from weft_training.demo.document import markdown, table

_PREBUILT, _NATIVE = "Weft, kernels of the wheel", "Weft, kernels compiled here"
_COMPILERS = ("c++", "cc", "g++", "gcc", "clang", "clang++")
_SHARE_MIN, _SHARE_WISHED = 0.95, 1.0
_KERNELS = re.compile(r"kernels (cpu \S+?)[,)]")


class Broken(Exception):
    """An installation that does not do what it should; the text has its last words."""


class Installed(NamedTuple):
    """An environment with both wheels."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What makes a process see this environment's commands alone, no compiler and no kernels of before."""
        return {"PATH": str(self.python.parent), "XDG_CACHE_HOME": str(self.directory / "cache"), "WEFT_KERNELS": ""}


def installed(directory: Path) -> Installed:
    """Build both wheels and install them, with what they depend on, into an environment; one that is there is taken."""
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
    """Run `weft demo` in an empty directory, once in an environment; what it says. Raises Broken."""
    log = made.directory / "demo.log"
    if not log.exists():
        with tempfile.TemporaryDirectory() as empty:
            log.write_text(_ran([str(made.python.with_name("weft")), "demo"], Path(empty), made.variables))
    return log.read_text()


def row() -> Row:
    """Both servers with the same sixteen LoRAs."""
    trace = batch(workload.distinct(LORAS.ids), SHORT)
    goals = at_least(_SHARE_MIN, _SHARE_WISHED), Goal(metric="step_ms"), Goal(metric="ttft_p50_ms")
    return Row(
        name="wheel",
        what="16 distinct LoRAs, rank 8",
        ours=Side(backend=_PREBUILT, trace=trace, holds=(LORAS,)),
        others=(Other(Side(backend=_NATIVE, trace=trace, holds=(LORAS,)), goals),),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--environment", type=Path, help="keep the environment here, and take the one that is here")
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--table", type=Path, help="write the table here, as Markdown")
    options = parser.parse_args()
    console = Console(stderr=True)
    command = shlex.join(["python", "-m", "benchmarks.wheel", *sys.argv[1:]])
    dtype = "auto" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    with tempfile.TemporaryDirectory(prefix="weft-wheel-") as scratch, console.status("") as status:
        status.update("building the wheels, installing them")
        made = installed((options.environment or Path(scratch, "environment")).absolute())
        status.update("weft demo")
        demo = demonstrated(made)
        if not named(demo).startswith("cpu x86-64-"):
            raise Broken(f"weft demo: the kernels are {named(demo)} and not of the wheel\n{demo}")

        def start(key: Key, log: Path, tick: Tick) -> Remote:
            variables = made.variables | {"WEFT_DTYPE": dtype}
            if key.backend == _NATIVE:
                variables |= {"PATH": os.environ["PATH"], "WEFT_KERNELS": "native"}
            settings = [f"{name}={value}" for name, value in variables.items()]
            worker = [str(made.python), "-m", "benchmarks.backends.weft_grpc"]
            return Remote([str(shutil.which("env")), *settings, *worker], log=log, threads=key.spec.threads)

        with Bench(lambda text, runs: status.update(text), start=start) as bench:
            found = bench.measure(row(), options.turns)
        kernels = {side.label: named((HERE / ".runs" / f"{side.backend}.log").read_text()) for side in found.sides}
        if kernels != {_PREBUILT: named(demo), _NATIVE: "cpu native"}:
            raise Broken(f"the servers computed with {kernels}")
    entry = {
        **results.entry(found, report.conditions(), command),
        "kernels": kernels,
        "dtype": dtype,
        "demo": demo.strip().splitlines()[-1],
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
    dtype = "bfloat16" if entry["dtype"] == "auto" else entry["dtype"]
    lines = [
        "; ".join(f"{label}: {kernels}" for label, kernels in entry["kernels"].items()) + f"; the base in {dtype}.",
        f"`weft demo` of the wheels, in an empty directory, without a compiler: {entry['demo']}",
        f"{report.line(entry['conditions'])}, median of {entry['turns']} turns, `{entry['command']}`",
    ]
    cells = markdown(results.cells([entry]), num_names=results.NUM_NAMES)
    told = [f"- {line}" for line in [*results.failures([entry]), *results.misses([entry], {})]]
    return "\n\n".join(["# Installed from the wheel, beside compiled here", cells, *told, *lines]) + "\n"


def named(text: str) -> str:
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
