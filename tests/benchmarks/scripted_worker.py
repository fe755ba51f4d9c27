"""A backend for tests that follows the name of a trace's first adapter. It uses only the standard library."""

import os
import sys
import time
from collections.abc import Mapping

from benchmarks import workload
from benchmarks.backends import worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record


class Scripted:
    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        if spec.quantization != "none":
            raise Cannot(f"it has no {spec.quantization}")
        print("a library prints as it loads", flush=True)
        os.write(1, b"and so does what is written in C\n")
        return {"adapters": str(len(spec.adapters)), "threads": os.environ["OMP_NUM_THREADS"]}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        del salt
        wish = trace.requests[0].adapters[0] if trace.requests[0].adapters else "serves"
        match wish:
            case "dies":
                print("the last words", file=sys.stderr, flush=True)
                os._exit(7)
            case "is silent":
                time.sleep(600)
            case "breaks":
                raise RuntimeError("no such kernel")
            case "cannot":
                raise Cannot("it has no such adapters")
        step_s = 2.0 if wish == "is slow" else 1.0
        surplus = 0 if wish == "is short" else 1
        records = [
            Record(
                arrival_s=100 + request.arrival_s,
                token_s=tuple(
                    100 + request.arrival_s + step_s * step for step in range(1, request.num_new_tokens + surplus)
                ),
                token_ids=tuple(range(request.num_new_tokens)),
            )
            for request in trace.requests
        ]
        return Outcome(records=tuple(records), notes={"client_cpu_s": 0.5})

    def close(self) -> None:
        print("closed", file=sys.stderr, flush=True)


if __name__ == "__main__":
    worker.serve(Scripted())
