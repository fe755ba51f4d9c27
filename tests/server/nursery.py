"""Starts server processes quickly: run as a script, it imports everything once and then forks one per line of input.

A forked child is `weft serve` with arguments of its own, from `main()` on; only the imports are shared. Nothing that
starts a thread runs before the fork: no model, no channel.

    in    {"start": ["serve", …], "log": path}    out    pid
    in    {"wait": pid}                           out    exit code

With "first": path, the child runs that script before.
"""

import json
import os
import runpy
import signal
import sys
from typing import NoReturn


def main() -> None:
    import weft.api.serve
    import weft.cli  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                _serve(command["start"], command["log"], command.get("first"))
            print(pid, flush=True)
        else:
            _, status = os.waitpid(command["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


def _serve(arguments: list[str], log: str, first: str | None) -> NoReturn:
    import weft.cli

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nowhere, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if first is not None:
        runpy.run_path(first, run_name="__main__")
    sys.argv = ["weft", *arguments]
    weft.cli.main()
    sys.exit(99)  # not reached: a command ends with SystemExit


if __name__ == "__main__":
    main()
