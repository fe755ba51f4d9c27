"""A real language model, SmolLM2-135M-Instruct from its package, and real servers of it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from weft.client import Client
from weft.model import source
from weft_training.demo.real import model

START_S = 240.0


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The file."""
    return model.path()


@pytest.fixture(scope="session")
def checkpoint(gguf: Path) -> Path:
    """The directory that the file is dequantized into, in the user's cache, where a server looks too."""
    return source.resolve(gguf).directory


class Served(NamedTuple):
    """A server that is ready. said: what it wrote."""

    address: str
    said: str
    client: Client

    def run(self, *arguments: str) -> str:
        """What a `weft` command says that talks to this server."""
        environment = {**os.environ, "WEFT_SERVER": self.address}
        command = [sys.executable, "-m", "weft", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S)
        assert done.returncode == 0, done.stderr
        return done.stdout


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def serve(gguf: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start `weft serve FILE.gguf` with more arguments; once for the same arguments in a module."""
    del checkpoint  # it is converted by now, so that a server starts at once
    started: dict[Sequence[str], tuple[subprocess.Popen[str], Served]] = {}

    def start(*arguments: str) -> Served:
        if arguments not in started:
            store = tmp_path_factory.mktemp("store")
            command = [sys.executable, "-m", "weft", "serve", str(gguf), "--store", str(store), "--device", "cpu"]
            command += ["--port", "0", "--metrics-port", "0", "--num-threads", "1", *arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line == "ready\n":
                    break
            port = re.search(r"gRPC +127\.0\.0\.1:(\d+)", said)
            assert port, said
            address = f"127.0.0.1:{port[1]}"
            started[arguments] = process, Served(address, said, Client(address, timeout_s=START_S))
        return started[arguments][1]

    yield start
    for process, served in started.values():
        served.client.close()
        process.terminate()
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(60) == 0
