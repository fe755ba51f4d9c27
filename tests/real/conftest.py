"""A real language model, SmolLM2-135M-Instruct from its package, and real servers of it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Served, serving
from weft.client import Client
from weft.model import source
from weft_training.demo.real import model

START_S = 240.0


@pytest.fixture(scope="session")
def gguf() -> Path:
    """Return the path of the model's file."""
    return model.path()


@pytest.fixture(scope="session")
def checkpoint(gguf: Path) -> Path:
    """The directory that the file is dequantized into, in the user's cache, where a server looks too."""
    return source.resolve(gguf).directory


class RealServer(NamedTuple):
    """A server of the model, and a client of it."""

    served: Served
    client: Client

    def run(self, *arguments: str) -> str:
        """Return the output of a `weft` command that calls this server."""
        return self.served.run(sys.executable, "-m", "weft", *arguments, timeout_s=START_S)


Serve = Callable[..., RealServer]


@pytest.fixture(scope="module")
def serve(gguf: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start `weft serve FILE.gguf` with more arguments; once for the same arguments in a module."""
    del checkpoint  # it is converted by now, so that a server starts at once
    started: dict[Sequence[str], RealServer] = {}
    with ExitStack() as stack:

        def start(*arguments: str) -> RealServer:
            if arguments not in started:
                store = tmp_path_factory.mktemp("store")
                command = [sys.executable, "-m", "weft", "serve", str(gguf), "--store", str(store), "--device", "cpu"]
                command += ["--port", "0", "--metrics-port", "0", "--num-threads", "1", *arguments]
                served = stack.enter_context(serving(command))
                client = stack.enter_context(Client(served.address, timeout_s=START_S))
                started[arguments] = RealServer(served, client)
            return started[arguments]

        yield start
