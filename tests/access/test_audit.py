"""The audit log: its chain, what a changed file shows, a crash, a full disk, and what a server records."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter
from typer.testing import CliRunner

from tests.access.conftest import bearer
from tests.server.conftest import Sources
from tests.server.files import upload_messages
from tests.server.live import WAIT_S, LiveServer, wait_until
from weft.api.access.audit_chain import BrokenChain, Head, sealed, verify
from weft.api.access.audit_log import AuditLog
from weft.api.access.secret_file import UnusableAccess
from weft.api.access.token import Token
from weft.cli import app
from weft.v1 import adapter_service_pb2 as pb


def counter() -> Counter:
    return Counter("lines", "Lines.", ["outcome"], registry=CollectorRegistry())


def count(lines: Counter, outcome: str) -> float:
    return lines.labels(outcome)._value.get()


def log_of(path: Path, *events: str, lines: Counter | None = None, **facts: Any) -> None:
    log = AuditLog(path, lines or counter())
    log.start()
    for event in events:
        log.record(event, **facts)
    log.close()


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verified(path: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["audit", "verify", str(path), *options])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def test_the_chain_continues_over_restarts(path: Path) -> None:
    log_of(path, "start", "stop", note='"quoted", \\ and \u20ac and a\nline')
    log_of(path, "start", "rpc", "stop")
    found = entries(path)
    assert [entry["seq"] for entry in found] == [1, 2, 3, 4, 5]
    assert [entry["event"] for entry in found] == ["start", "stop", "start", "rpc", "stop"]
    assert [entry["previous"] for entry in found[1:]] == [entry["digest"] for entry in found[:-1]]
    assert path.stat().st_mode & 0o777 == 0o600
    result = verified(path)
    assert (result.exit_code, result.stdout) == (0, f"5 lines, unbroken; the last one is {found[-1]['digest']}\n")


def test_every_changed_byte_is_found(path: Path) -> None:
    """Negative control of the chain: each byte of the file, also of the last line, changed alone."""
    log_of(path, *("one", "two", "three"), tenant="acme")
    whole = path.read_bytes()
    for offset in range(len(whole)):
        changed = bytearray(whole)
        changed[offset] ^= 1
        number = whole[:offset].count(b"\n") + 1
        with pytest.raises(BrokenChain) as broken:
            verify(io.BytesIO(changed))
        assert broken.value.line == number, offset


@pytest.mark.parametrize(
    ("name", "order", "line"),
    [
        ("removed", [0, 1, 3, 4], 3),
        ("first removed", [1, 2, 3, 4], 1),
        ("swapped", [0, 2, 1, 3, 4], 2),
        ("repeated", [0, 1, 1, 2, 3, 4], 3),
        ("last swapped", [0, 1, 2, 4, 3], 4),
    ],
)
def test_moved_lines_are_found(path: Path, name: str, order: list[int], line: int) -> None:
    log_of(path, *"abcde")
    assert verified(path).exit_code == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[index] for index in order))
    result = verified(path)
    assert result.exit_code == 1
    assert f"line {line}: " in " ".join(result.stderr.split())


def test_a_line_that_was_written_again_is_found(path: Path) -> None:
    """Its number and its own digest are right; the next line continues another one."""
    log_of(path, *"abc", tenant="acme")
    lines = path.read_bytes().splitlines(keepends=True)
    second = entries(path)[1]
    facts = {name: second[name] for name in second if name not in ("seq", "previous", "digest")} | {"tenant": "other"}
    _, lines[1] = sealed(Head(1, second["previous"]), facts)
    path.write_bytes(b"".join(lines))
    assert "line 3: " in verified(path).stderr


def test_lines_cut_off_are_found_by_a_digest_kept_elsewhere(path: Path) -> None:
    log_of(path, *"abc")
    kept = entries(path)[-1]["digest"]
    log_of(path, "d")
    assert verified(path, "--holds", kept).exit_code == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    assert verified(path).exit_code == 0
    assert "cut off" in verified(path, "--holds", kept).stderr


@pytest.mark.parametrize("cut", [1, 2, 40, 100, "all"])
def test_a_torn_line_stays_and_is_told(path: Path, cut: int | str, caplog: pytest.LogCaptureFixture) -> None:
    """What a killed server or a power cut leaves: the next start says so in the chain."""
    log_of(path, "a", "b")
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    torn = last[: -1 if cut == "all" else -int(cut)]
    path.write_bytes(whole.removesuffix(last) + torn)
    if torn != last.removesuffix(b"\n"):
        assert "line 2: " in verified(path).stderr
    log_of(path, "c")
    assert path.read_bytes().startswith(whole.removesuffix(last) + torn + b"\n"), "nothing is removed"
    result = verified(path)
    assert result.exit_code == 0, result.stderr
    tail = [json.loads(line) for line in path.read_text().splitlines()[2:]]
    assert [entry["event"] for entry in tail] == ["repair", "c"]
    assert len(tail[0]["torn"]) == (0 if torn == last.removesuffix(b"\n") else 1)
    assert "left unfinished" in caplog.text
    # A torn line that is changed or removed afterwards is found as any other.
    if tail[0]["torn"]:
        lines = path.read_bytes().splitlines(keepends=True)
        for wrong in ([lines[0], *lines[2:]], [lines[0], b"x" + lines[1], *lines[2:]]):
            path.write_bytes(b"".join(wrong))
            assert verified(path).exit_code == 1


def test_a_repair_that_was_torn_itself(path: Path) -> None:
    log_of(path, "a")
    with path.open("ab") as file:
        file.write(b'{"seq":2,"time\n{"seq":2,"event":"rep')
    log_of(path, "b")
    assert verified(path).exit_code == 0
    assert len(entries_but(path, 2)[1]["torn"]) == 2


def entries_but(path: Path, torn: int) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in (lines[0], *lines[1 + torn :])]


def test_a_file_that_is_no_audit_log_is_not_appended_to(path: Path) -> None:
    path.write_text("root:x:0:0\n")
    with pytest.raises(UnusableAccess, match=r"audit_log_file: .* does not end as an audit log"):
        AuditLog(path, counter())
    assert path.read_text() == "root:x:0:0\n"
    with pytest.raises(UnusableAccess, match="cannot be appended to: No such file"):
        AuditLog(path.parent / "absent" / "audit.log", counter())
    os.mkfifo(path.parent / "fifo")
    with pytest.raises(UnusableAccess, match="regular file"):
        AuditLog(path.parent / "fifo", counter())


def test_two_servers_do_not_share_a_file(path: Path) -> None:
    first = AuditLog(path, counter())
    with pytest.raises(UnusableAccess, match="another server that runs"):
        AuditLog(path, counter())
    first.close()
    AuditLog(path, counter()).close()


def test_a_full_queue_loses_lines_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = counter()
    log = AuditLog(path, lines, queue_max=3)  # not started: nothing leaves the queue
    for number in range(10):
        log.record("rpc", number=number)
    assert count(lines, "lost") == 7
    assert caplog.text.count("lines are being lost") == 1
    log.start()
    wait_until(lambda: count(lines, "written") == 3)
    log.record("later")
    log.close()
    assert [(entry["event"], entry.get("lost", 0)) for entry in entries(path)] == [
        ("rpc", 7),
        ("rpc", 0),
        ("rpc", 0),
        ("later", 0),
    ]
    assert verified(path).exit_code == 0


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter
from weft.api.access.audit_log import AuditLog

lines = Counter("lines", "Lines.", ["outcome"], registry=CollectorRegistry())
path = Path(sys.argv[1])
log = AuditLog(path, lines)
log.start()

def wait(outcome, wanted):
    while lines.labels(outcome)._value.get() < wanted:
        time.sleep(0.005)

log.record("before")
wait("written", 1)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))  # the next line fits in part
for number in range(3):
    log.record("during", number=number)
    wait("lost", number + 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.record("after")
log.close()
"""


def test_a_full_disk_loses_lines_and_says_so(path: Path) -> None:
    """A limit of the file size takes the place of the disk's end: the kernel writes a part of a line, then fails."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "lines are being lost" in done.stderr
    result = verified(path)
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [entry["event"] for entry in found] == ["before", "repair", "after"]
    assert found[-1]["lost"] == 3


def test_a_server_records_every_mutation(protected: LiveServer, tokens: dict[str, Token], sources: Sources) -> None:
    adapters, path = protected.client.adapters, protected.config.access.audit_log_file
    assert path is not None
    known = len(entries(path))
    metadata = (*bearer(tokens["register"]), ("x-request-id", "change-7"))
    how: dict[str, Any] = {"timeout": WAIT_S, "metadata": metadata}
    one, two = str(sources("lora-5")), str(sources("lora-6"))
    registered = adapters.RegisterAdapter(pb.RegisterAdapterRequest(adapter_id="audited", source=one), **how)
    first = registered.adapter.digest
    with pytest.raises(grpc.RpcError):
        adapters.RegisterAdapter(pb.RegisterAdapterRequest(adapter_id="audited", source=two), **how)
    messages = upload_messages("audited", sources.parts("lora-6").files(), replace=True)
    second = adapters.UploadAdapter(iter(messages), **how).adapter.digest
    adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="audited", pin=True), **how)
    adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="audited"), **how)
    adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="audited"), **how)  # changes nothing, and is not recorded
    adapters.UnregisterAdapter(pb.UnregisterAdapterRequest(adapter_id="audited"), **how)
    with pytest.raises(grpc.RpcError):
        adapters.UnregisterAdapter(pb.UnregisterAdapterRequest(adapter_id="audited"), **how)
    with pytest.raises(grpc.RpcError):  # refused: it changed nothing
        adapters.UnregisterAdapter(
            pb.UnregisterAdapterRequest(adapter_id="audited"), timeout=WAIT_S, metadata=bearer(tokens["generate"])
        )
    wait_until(lambda: len(entries(path)) >= known + 7)
    time.sleep(0.05)
    new = [entry for entry in entries(path)[known:] if entry["event"] == "rpc"]
    seen = [(e["rpc"], e["before"], e["after"], e["code"], e["reason"]) for e in new]
    assert seen == [
        ("RegisterAdapter", "", first, "OK", ""),
        ("RegisterAdapter", first, first, "ALREADY_EXISTS", "ADAPTER_EXISTS"),
        ("UploadAdapter", first, second, "OK", ""),
        ("LoadAdapter", second, second, "OK", ""),
        ("UnloadAdapter", second, second, "OK", ""),
        ("UnregisterAdapter", second, "", "OK", ""),
        ("UnregisterAdapter", "", "", "NOT_FOUND", "ADAPTER_NOT_FOUND"),
    ]
    for entry in new:
        who = {name: entry[name] for name in ("tenant", "token_id", "via", "request_id", "adapter_id")}
        assert who == {
            "tenant": "acme",
            "token_id": tokens["register"].token_id,
            "via": "token",
            "request_id": "change-7",
            "adapter_id": "audited",
        }
        assert re.match(r"ipv4:127\.0\.0\.1:\d+$", entry["peer"].replace("%3A", ":")), entry["peer"]
    assert verified(path).exit_code == 0
    written = {sample.labels["outcome"]: sample.value for sample in protected.scrape()["weft_audit_lines"].samples}
    assert written["lost"] == 0
    assert written["written"] >= 7


def test_a_server_records_its_life(protected: LiveServer) -> None:
    path = protected.config.access.audit_log_file
    assert path is not None
    first = entries(path)[0]
    assert (first["event"], first["num_adapters"]) == ("start", 0)
    assert first["base"] == protected.model.base.shape.digest
