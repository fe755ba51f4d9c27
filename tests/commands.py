"""`weft` as users run it: a server as a process of its own, and commands that call it."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """A server that is ready. said: its output. cwd: its directory and that of commands; None for the current one."""

    address: str
    said: str
    cwd: Path | None = None

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """Return the output of a command that finds this server by WEFT_SERVER, as a user's would."""
        environment = {**os.environ, "WEFT_SERVER": self.address}
        done = subprocess.run(
            arguments, cwd=self.cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def serving(command: Sequence[str], cwd: Path | None = None) -> Iterator[Served]:
    """Run `command`, which serves on a port of its choice; after the block it has ended cleanly."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line == "ready\n":
                break
        port = re.search(r"gRPC +127\.0\.0\.1:(\d+)", said)
        try:
            assert port, said
            yield Served(f"127.0.0.1:{port[1]}", said, cwd)
            process.terminate()
            process.stdout.read()
            assert process.wait(60) == 0
        finally:
            process.kill()  # if it has not ended yet
