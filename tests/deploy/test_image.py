"""The Dockerfile and the Compose files agree with the server, without a container engine."""

import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from tests.deploy.files import DEPLOY, ROOT, configured, document, entrypoint, instructions, size
from weft.api.access.exposure import require_safe
from weft.api.access.secret_file import UnusableAccess
from weft.config import ServerConfig, WeftConfig
from weft.kernels.cpu import build
from weft.settings import knobs

DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"
ENGINE_STOP_S = 31  # api/serve.py: 30 s for the engine, 1 s for the calls that are left


def last_stage() -> list[tuple[str, str]]:
    found = instructions(DOCKERFILE)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def argument(name: str) -> str:
    [only] = [argument for instruction, argument in last_stage() if instruction == name]
    return only


def python_code(instruction: str, mark: str) -> str:
    """The code after `python -c` of the one instruction that contains `mark`."""
    [found] = [argument for name, argument in last_stage() if name == instruction and mark in argument]
    if instruction == "HEALTHCHECK":
        command = json.loads(found[found.index("CMD") + len("CMD") :])
        assert command[:2] == ["python", "-c"]
        return command[2]
    return re.fullmatch(r'python -c "(.*)"', found).group(1)  # type: ignore[union-attr]


def compose_config(monkeypatch: pytest.MonkeyPatch) -> WeftConfig:
    service = document(COMPOSE)["services"]["weft"]
    found, words = configured([*entrypoint(), *service["command"]], service.get("environment", {}), monkeypatch)
    assert found is not None, words
    return found


def test_the_image_starts_the_server_with_flags_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found, words = configured([*entrypoint(), "/models/any"], {}, monkeypatch)
    assert found is not None, words
    assert (found.server.host, found.server.metrics_host) == ("0.0.0.0", "0.0.0.0")
    assert str(found.store) in json.loads(argument("VOLUME"))
    assert argument("EXPOSE").split() == [str(found.server.port), str(found.server.metrics_port)]


def test_the_image_is_not_open_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found, words = configured([*entrypoint(), "/models/any"], {}, monkeypatch)
    assert found is not None, words
    with pytest.raises(UnusableAccess, match=r"host: 0\.0\.0\.0 is reachable"):
        require_safe(found.server, found.access)
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"weft:local /models/weft-demo (--tls[^`]*)```", page)
    found, words = configured([*entrypoint(), "/models/any", *shown.replace("\\\n", " ").split()], {}, monkeypatch)
    assert found is not None, words
    assert require_safe(found.server, found.access) == []


def test_a_misspelt_flag_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found, words = configured([*entrypoint(), "/models/any", "--drain-timeout=30"], {}, monkeypatch)
    assert found is None
    assert "--drain-timeout" in words


def test_environment_variables_are_knobs() -> None:
    known = {knob.variable for knob in knobs()} | {"WEFT_CONFIG", "WEFT_SERVER"}
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert set(re.findall(r"\bWEFT_[A-Z_]+\b", path.read_text(encoding="utf-8"))) <= known, path


def test_the_server_is_nobody_and_told_to_end_politely() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", argument("USER"))
    assert argument("STOPSIGNAL") == "SIGTERM"
    order = [name for name, _ in last_stage()]
    assert order.index("USER") < order.index("VOLUME") < order.index("ENTRYPOINT")


def test_caches_are_below_the_volumes() -> None:
    environment = dict(part.split("=", 1) for part in argument("ENV").split() if "=" in part)
    volumes = json.loads(argument("VOLUME"))
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert any(environment[variable].startswith(volume) for volume in volumes), variable


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = set()
    for name, argument in instructions(DOCKERFILE):
        if name == "COPY" and "--from" not in argument:
            copied |= set(argument.split()[:-1])
    assert {path for path in copied if not any(path.startswith(f"{above}/") for above in copied)} == allowed
    assert all((ROOT / path).exists() for path in copied)
    assert "**/__pycache__" in ignored


def test_the_build_step_compiles_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code = python_code("RUN", "kernels")
    try:
        exec(code, {})
    except build.KernelsUnavailable as reason:
        pytest.skip(str(reason))
    assert Path(capsys.readouterr().out.strip()).is_file()


class Readiness(BaseHTTPRequestHandler):
    """Answers as the server does: 200 if it is ready, else 503."""

    is_ready = True

    def do_GET(self) -> None:
        is_asked = self.path == "/readyz" and "Authorization" not in self.headers
        self.send_response(200 if is_asked and self.is_ready else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def healthcheck(port: int) -> int:
    code = python_code("HEALTHCHECK", "readyz")
    assert code.count(f"127.0.0.1:{ServerConfig().metrics_port}") == 1
    code = code.replace(f":{ServerConfig().metrics_port}", f":{port}")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30).returncode


def test_the_health_check_tells_a_server_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Readiness) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert healthcheck(server.server_address[1]) == 0
            monkeypatch.setattr(Readiness, "is_ready", False)
            assert healthcheck(server.server_address[1]) == 1
        finally:
            server.shutdown()
            thread.join()


def test_the_health_check_tells_that_nobody_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: no answer comes, and no other process can take it
        assert healthcheck(taken.getsockname()[1]) == 1


def test_yaml_parses() -> None:
    paths = [path for suffix in ("*.yaml", "*.yml") for path in DEPLOY.rglob(suffix)]
    assert len(paths) > 10
    for path in paths:
        assert all(found for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))), path


def test_compose_starts_the_server_with_flags_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compose_config(monkeypatch)
    service = document(COMPOSE)["services"]["weft"]
    targets = {mount["target"]: mount for mount in service["volumes"]}
    assert str(found.store) in targets
    assert not targets[str(found.store)].get("read_only")
    assert str(found.model.path.parent) in targets
    assert all(str(source) in targets for source in found.allowed_sources)
    published = {int(port.split(":")[-1]) for port in service["ports"]}
    assert published == {found.server.port, found.server.metrics_port}


def test_compose_gives_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compose_config(monkeypatch)
    service = document(COMPOSE)["services"]["weft"]
    assert int(service["stop_grace_period"].removesuffix("s")) > found.server.drain_timeout_s + ENGINE_STOP_S
    assert found.engine.kv_cache_bytes
    used = found.residency.device_bytes + found.residency.host_bytes + found.engine.kv_cache_bytes
    assert used < size(service["mem_limit"]) - (1 << 30)


def test_compose_publishes_on_the_loopback_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compose_config(monkeypatch)
    assert len(require_safe(found.server, found.access)) == 2, "open inside of the container, which is said"
    for name, service in document(COMPOSE)["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"], name


def test_compose_mounts_what_there_is() -> None:
    services = document(COMPOSE)["services"].values()
    for mount in (mount for service in services for mount in service["volumes"]):
        if mount["type"] == "bind":
            assert (DEPLOY / mount["source"]).exists(), mount
        else:
            assert mount["source"] in document(COMPOSE)["volumes"], mount


def test_build_arguments_are_the_dockerfiles() -> None:
    declared = {argument.partition("=")[0] for name, argument in instructions(DOCKERFILE) if name == "ARG"}
    given = document(DEPLOY / "compose.cuda.yaml")["services"]["weft"]["build"]["args"]
    assert given.keys() <= declared
