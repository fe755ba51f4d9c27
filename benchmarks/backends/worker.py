"""A backend in its own Python process: JSON commands on stdin, one a line, and one JSON line on stdout for each.

    {"load": {"model": "/…/bench-80m", "adapters": [["lora-00", "/…/lora-00"]], …}}   → {"loaded": {versions}}
    {"run": {"trace": "/…/trace.jsonl", "salt": "turn 3"}}                            → {"records": […], "notes": {…}}
    {"stop": {}}                                                                      → {"stopped": {}}
    anything the backend cannot do                                                    → {"cannot": "reason"}
    a fault                                                                           → {"failed": "the error"}

Libraries may print to stdout: the answers go through a private copy of it, and stdout itself is redirected to stderr,
which the suite keeps as the backend's log. Standard library only.

A backend is a module with a class like `Backend`, which ends in `if __name__ == "__main__": worker.serve(Mine())`. Its
entry in `benchmarks/backends/catalog.py` names its environment.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from benchmarks import workload


class Cannot(Exception):
    """A task that this backend cannot do; the text is the reason that the table shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """A backend's model, adapters and limits.

    model: a Hugging Face directory, bfloat16 weights.
    adapters: (id, PEFT directory) of all adapters that requests name, given before the first run; () for base only.
    threads: CPU threads of the computation.
    max_num_seqs: largest number of requests in the batch.
    max_model_len: tokens of the longest request, prompt and answer.
    quantization: "none" leaves the weights as in the file; "nf4" and "int8" are bitsandbytes'.
    adapter_device_bytes: room for adapters on the device, if the backend has such a limit; None is its default.
    """

    model: str
    adapters: tuple[tuple[str, str], ...] = ()
    threads: int = 2
    max_num_seqs: int = 16
    max_model_len: int = 1024
    quantization: str = "none"
    adapter_device_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Outcome of one request, in seconds on one monotonic clock with any zero.

    arrival_s: when it was due: the start of the run plus its `arrival_s`, even if the backend was late.
    token_s: when each token reached the caller; as many as were requested.
    token_ids: the tokens; () if the backend does not report them.
    """

    arrival_s: float
    token_s: tuple[float, ...]
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run: records in the order of the trace's requests, and numbers beside them (a client's CPU time, …)."""

    records: tuple[Record, ...]
    notes: Mapping[str, float] = field(default_factory=dict)


class Backend(Protocol):
    """A way to serve a base with adapters."""

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        """Load what `spec` names, ready for the first run. Returns the versions by package.

        Raises Cannot with the reason.
        """
        ...

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        """Answer the trace, each request when it is due; no answer may use a cache of another `salt`.

        Make the trace's registrations when they are due, and undo them after the run. Raises Cannot with the reason.
        """
        ...

    def close(self) -> None:
        """End everything that was started. Called once, even without a load before it."""
        ...


def serve(backend: Backend) -> None:
    """Answer the commands on stdin until `stop` or the end of input."""
    answers = _private_stdout()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            answer = _answered(backend, command)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if "stop" in command:
                break
    finally:
        backend.close()


def _private_stdout() -> TextIO:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # also output from below Python
    return answers


def _answered(backend: Backend, command: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        match command:
            case {"load": spec}:
                return {"loaded": dict(backend.load(load_spec(spec)))}
            case {"run": {"trace": path, "salt": salt}}:
                outcome = backend.run(workload.read(Path(path)), salt)
                return {"records": [asdict(record) for record in outcome.records], "notes": dict(outcome.notes)}
            case {"stop": _}:
                return {"stopped": {}}
            case _:
                return {"failed": f"{command!r} is no command"}
    except Cannot as reason:
        return {"cannot": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def load_spec(entry: Mapping[str, Any]) -> LoadSpec:
    """Parse a `load` command. Raises TypeError for an unknown field."""
    adapters: Sequence[Sequence[str]] = entry.get("adapters", ())
    return LoadSpec(**{**entry, "adapters": tuple((adapter_id, path) for adapter_id, path in adapters)})


def outcome(answer: Mapping[str, Any]) -> Outcome:
    """Parse the answer to a `run`."""
    records = tuple(
        Record(
            arrival_s=record["arrival_s"],
            token_s=tuple(record["token_s"]),
            token_ids=tuple(record["token_ids"]),
        )
        for record in answer["records"]
    )
    return Outcome(records=records, notes=answer["notes"])
