"""A server of a local base connects to nothing and runs no code of the hub, whatever is installed beside it (B19)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.live import WAIT_S, wait_until

# Writes down each address that the process looks up or connects to, and each use of the hub's code.
_WATCH = """
import atexit, os, sys

def note(text):
    with open(os.environ["NOTED"], "a") as file:
        print(text, file=file)

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        note(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")

def state():
    constants = sys.modules.get("huggingface_hub.constants")
    note(f"offline {constants and constants.HF_HUB_OFFLINE}")

sys.addaudithook(watch)
atexit.register(state)
"""
_KERNELS = """
import sitecustomize

sitecustomize.note("imported kernels")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: sitecustomize.note(f"called {name}")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a package `kernels` in a version that transformers takes, and with the watch."""
    packages = tmp_path / "packages"
    metadata = packages / "kernels-0.18.3.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    (packages / "kernels.py").write_text(_KERNELS)
    (packages / "sitecustomize.py").write_text(_WATCH)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {
        "PYTHONPATH": str(packages),
        "NOTED": str(tmp_path / "noted"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }


def _noted(environment: dict[str, str]) -> list[str]:
    path = Path(environment["NOTED"])
    return path.read_text().splitlines() if path.exists() else []


def test_a_server_of_a_local_base_stays_offline(path: Path, environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "weft", "serve", str(path), "--store", str(tmp_path / "store")]
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*command, "--quant", "nf4", "--port", "0", "--metrics-port", "0"],
            env=environment,
            stdout=file,
            stderr=file,
        ) as server,
    ):
        try:
            wait_until(lambda: "\nready" in log.read_text() or server.poll() is not None)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0, log.read_text()
    assert [line for line in _noted(environment) if not _is_own(line)] == ["offline True"]
    assert "pip install" not in log.read_text()  # what bitsandbytes says of a missing package


def _is_own(line: str) -> bool:
    """Return whether a line is of the server's own listeners, which look up the address that they listen on."""
    return line.startswith("socket.getaddrinfo 127.0.0.1")


def test_the_watch_sees_the_hub_and_its_code(environment: dict[str, str]) -> None:
    """Negative control."""
    code = (
        "import transformers.integrations.hub_kernels\n"
        "from huggingface_hub import HfApi\n"
        "HfApi().model_info('org/name', timeout=1)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=False)
    noted = _noted(environment)
    assert "imported kernels" in noted
    assert [line for line in noted if line.startswith("socket.connect ('127.0.0.1', 9)")]
    assert "offline False" in noted
