"""The commands of docs/public.md work as written, with an address of loopback, and its table is that of the gate."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.access.test_gate import RPCS
from tests.server.test_serve_process import Nursery, ServerProcess
from weft.api.access.audit_chain import verify
from weft.api.access.principal import Role
from weft.api.access.requirements import PUBLIC, SUFFICIENT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "public.md").read_text()
PLACES = {  # for the test: an address that no other machine reaches, free ports, and the base of the repository
    "DNS:weft.example.org": "DNS:localhost,IP:127.0.0.1",
    "--host 0.0.0.0": "--host 127.0.0.1 --port 0 --metrics-port 0 --num-threads 1 --device cpu --store store",
    "path/to/hf-model": str(ROOT / "models" / "weft-demo"),
}


def commands(section: str) -> list[str]:
    """Return the commands of the first code block of a section, each whole."""
    _, _, text = PAGE.partition(f"\n## {section}\n")
    found = re.search(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found
    text = found[1]
    for place, here in PLACES.items():
        text = text.replace(place, here)
    return text.replace("\\\n", " ").splitlines()


def run(command: str, directory: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_five_commands(nursery: Nursery, tmp_path: Path) -> None:
    certificate, token, serve, variables, generate = commands("A public address in five commands")
    for command in (certificate, token):
        run(command, tmp_path)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    words = [
        str(tmp_path / word) if re.fullmatch(r"\w+\.(crt|key|json|log)|store", word) else word
        for word in shlex.split(serve)
    ]
    assert words[:2] == ["weft", "serve"]
    process = ServerProcess(nursery, tmp_path / "log", words[2:])
    try:
        process.wait_ready()
        here = variables.replace("weft.example.org:50051", f"127.0.0.1:{process.port}")
        assert run(f"{here}\n{generate}", tmp_path).strip()
        with pytest.raises(AssertionError, match="TOKEN_MISSING"):
            run(f"{here}\nunset WEFT_TOKEN\n{generate}", tmp_path)
        process.signal(signal.SIGTERM)
        assert process.exit_code() == 0
    finally:
        process.end()
    with (tmp_path / "audit.log").open("rb") as lines:
        assert verify(lines).seq == 2, "start and stop"


def test_the_table_is_that_of_the_gate() -> None:
    rows = dict(re.findall(r"^\| (\w[\w, ]+) \| (.+?) \|$", PAGE, re.MULTILINE))
    written = {name: roles for names, roles in rows.items() for name in names.split(", ") if name != "RPCs"}
    assert written.keys() == {rpc.rpartition("/")[2] for rpc in RPCS}
    for rpc in RPCS:
        roles = written[rpc.rpartition("/")[2]]
        if rpc in PUBLIC:
            assert roles == "none, and no token"
        else:
            assert {Role(role) for role in roles.split(" or ")} == SUFFICIENT[rpc]
