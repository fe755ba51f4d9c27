"""Run one target under atheris, guided by coverage: `python -m tests.reliability.fuzz NAME [libFuzzer's options]`.

`make fuzz` runs all. Without a name, the names are printed. A failure ends the process with a code other than 0 and
leaves the bytes in a file `crash-*` or `timeout-*`.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import atheris  # the extra `fuzz`

with atheris.instrument_imports(include=["weft.adapters", "weft.api", "weft.engine", "weft.methods.checkpoint"]):
    from tests.bases import Bases
    from tests.reliability.fuzz.mutation import run
    from tests.reliability.fuzz.targets import Target, targets


def main() -> None:
    files = Path(tempfile.mkdtemp(prefix="weft-fuzz-"))
    found = targets(Bases(files / "bases")(), files)
    name, *options = sys.argv[1:] or [""]
    if not name:
        print(*found)
        return
    corpus = files / "corpus"
    corpus.mkdir()
    for index, example in enumerate(found[name].examples):
        (corpus / str(index)).write_bytes(example)
    atheris.Setup([sys.argv[0], "-timeout=1", *options, str(corpus)], partial(_run, found[name]))
    atheris.Fuzz()


def _run(target: Target, data: bytes) -> None:
    run(target, data)


if __name__ == "__main__":
    main()
