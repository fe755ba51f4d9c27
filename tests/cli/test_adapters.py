"""`weft adapters …` and `weft info`: requests, tables, JSON, and errors."""

import json
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Weft
from tests.cli.fake_service import FakeService
from weft.errors import AdapterConflict, AdapterUnusable, Overloaded, Unavailable, WeftError
from weft.v1.adapter_pb2 import ADAPTER_RESIDENCY_DEVICE, ADAPTER_RESIDENCY_HOST, ADAPTER_STATE_QUARANTINED
from weft.v1.adapter_service_pb2 import (
    UNREGISTER_MODE_CANCEL,
    UNREGISTER_MODE_DRAIN,
    LiftQuarantineRequest,
    LoadAdapterRequest,
    RegisterAdapterRequest,
    UnloadAdapterRequest,
    UnregisterAdapterRequest,
    UploadHeader,
)


@pytest.fixture
def peft_directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_add_uploads_a_directory(fake: FakeService, weft: Weft, peft_directory: Path) -> None:
    result = weft("adapters", "add", "reverse", str(peft_directory), "--pin")
    assert result.exit_code == 0
    assert result.stdout == f"created: reverse lora active, disk, {fake.adapters['reverse'].digest}\n"
    assert fake.uploaded["adapter_model.safetensors"] == b"weights"
    assert fake.last(UploadHeader).pin


def test_add_registers_a_source(fake: FakeService, weft: Weft) -> None:
    weft("adapters", "add", "reverse", "--source", "demo/one")
    result = weft(
        "adapters",
        "add",
        "reverse",
        "--source",
        "demo/two",
        "--replace",
        "--expected-digest",
        "",
        "--validate-only",
    )
    assert result.stdout.startswith("would be replaced: reverse lora active")
    assert fake.last(RegisterAdapterRequest) == RegisterAdapterRequest(
        adapter_id="reverse", source="demo/two", replace=True, expected_digest="", validate_only=True
    )


@pytest.mark.parametrize("arguments", [("reverse",), ("reverse", "directory", "--source", "demo")])
def test_add_wants_one_of_path_and_source(fake: FakeService, weft: Weft, arguments: tuple[str, ...]) -> None:
    result = weft("adapters", "add", *arguments)
    assert result.exit_code == 2
    assert "give PATH or --source, one of the two" in result.stderr
    assert not fake.requests


def test_add_of_a_directory_without_an_adapter_names_the_file(fake: FakeService, weft: Weft, tmp_path: Path) -> None:
    result = weft("adapters", "add", "reverse", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == f"{tmp_path}/adapter_config.json: No such file or directory\n"


def test_ls_is_a_table_with_a_line_for_each_adapter(fake: FakeService, weft: Weft) -> None:
    fake.put("upper", "prefix", num_virtual_tokens=10, state=ADAPTER_STATE_QUARANTINED, state_reason="NON_FINITE")
    fake.put("reverse", rank=8, residency=ADAPTER_RESIDENCY_DEVICE, pinned=True, in_flight_requests=3)
    fake.put("zero", "ia3", size_bytes=3 << 30)
    header, *lines = weft("adapters", "ls").stdout.splitlines()
    assert header.split() == ["id", "method", "state", "residency", "rank/tokens", "size", "in", "flight", "digest"]
    digests = [adapter.digest[:12] for _, adapter in sorted(fake.adapters.items())]
    assert [line.split() for line in lines] == [
        ["reverse", "lora", "active", "device", "(pinned)", "8", "1.5", "KiB", "3", digests[0]],
        ["upper", "prefix", "quarantined", "(NON_FINITE)", "disk", "10", "1.5", "KiB", "0", digests[1]],
        ["zero", "ia3", "active", "disk", "-", "3", "GiB", "0", digests[2]],
    ]


def test_ls_as_json_is_an_array(fake: FakeService, weft: Weft) -> None:
    fake.put("reverse", rank=8)
    fake.put("upper", "ia3")
    listed = json.loads(weft("adapters", "ls", "--json", "--method", "lora").stdout)
    assert [(adapter["adapter_id"], adapter["rank"], adapter["state"]) for adapter in listed] == [
        ("reverse", 8, "ADAPTER_STATE_ACTIVE")
    ]
    assert listed[0]["size_bytes"] == "1536"  # proto JSON: 64 bits are a string


def test_ls_of_nothing(fake: FakeService, weft: Weft) -> None:
    assert weft("adapters", "ls", "--json").stdout == "[]\n"
    assert weft("adapters", "ls").exit_code == 0


def test_ls_refuses_an_unknown_state(fake: FakeService, weft: Weft) -> None:
    result = weft("adapters", "ls", "--state", "happy")
    assert result.exit_code == 2
    assert result.stderr.startswith("state must be one of loading, active,")


def test_show_tells_everything(fake: FakeService, weft: Weft) -> None:
    adapter = fake.put("reverse", rank=8, modules=["self_attn.q_proj"], base_model_name="evil\x1b[2Jbase")
    adapter.draining_versions.add(digest="ef" * 32, in_flight_requests=2)
    adapter.experts.add(digest="0a" * 32, adapter_id="one", available=True)
    adapter.experts.add(digest="0b" * 32)
    shown = weft("adapters", "show", "reverse").stdout
    assert f"one@{'0a' * 32}" in shown
    assert f"one@{'0a' * 32} (not available)" not in shown
    assert f"?@{'0b' * 32} (not available)" in shown
    assert adapter.digest in shown
    assert f"{'ef' * 32}: 2 in flight" in shown
    assert "evil\\x1b[2Jbase" in shown
    assert "\x1b" not in shown
    assert json.loads(weft("adapters", "show", "reverse", "--json").stdout)["digest"] == adapter.digest


def test_times_are_those_of_this_machine(fake: FakeService, weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.put("reverse").create_time.FromSeconds(0)
    monkeypatch.setenv("TZ", "WEST+5")
    time.tzset()
    try:
        assert "1969-12-31 19:00:00-05:00" in weft("adapters", "show", "reverse").stdout
    finally:
        monkeypatch.undo()
        time.tzset()


def test_rm_asks_first(fake: FakeService, weft: Weft) -> None:
    fake.put("reverse")
    assert weft("adapters", "rm", "reverse", stdin="n\n").exit_code == 1
    assert "reverse" in fake.adapters
    assert weft("adapters", "rm", "reverse", stdin="y\n").exit_code == 0
    assert not fake.adapters
    assert fake.last(UnregisterAdapterRequest).mode == UNREGISTER_MODE_DRAIN


def test_rm_can_cancel_and_wait(fake: FakeService, weft: Weft) -> None:
    fake.put("reverse")
    result = weft("adapters", "rm", "reverse", "--yes", "--cancel", "--timeout", "2.5", "--allow-missing")
    request = fake.last(UnregisterAdapterRequest)
    assert (request.mode, request.timeout.ToMilliseconds(), request.allow_missing) == (
        UNREGISTER_MODE_CANCEL,
        2500,
        True,
    )
    assert result.stdout == (
        "removed: reverse; freed 3 MiB on the device, 0 B in host memory, 7 KV blocks; 0 requests cancelled\n"
    )


def test_lift(fake: FakeService, weft: Weft) -> None:
    fake.put("poison", "lora", state=ADAPTER_STATE_QUARANTINED, state_reason="ADAPTER_NON_FINITE")
    result = weft("adapters", "lift", "poison", "--expected-digest", "0" * 64)
    assert result.stdout.startswith("lifted: poison lora active, ")
    assert fake.last(LiftQuarantineRequest).expected_digest == "0" * 64
    weft("adapters", "lift", "poison")
    assert not fake.last(LiftQuarantineRequest).HasField("expected_digest")


def test_load_and_unload(fake: FakeService, weft: Weft) -> None:
    digest = fake.put("reverse").digest
    loaded = weft("adapters", "load", "reverse", "--pin").stdout
    assert loaded == f"loaded: reverse lora active, device (pinned), {digest}\n"
    weft("adapters", "load", "reverse", "--to", "host")
    request = fake.last(LoadAdapterRequest)
    assert (request.residency, request.HasField("pin")) == (ADAPTER_RESIDENCY_HOST, False)
    weft("adapters", "unload", "reverse", "--to", "host")
    assert fake.last(UnloadAdapterRequest).residency == ADAPTER_RESIDENCY_HOST
    assert weft("adapters", "unload", "reverse", "--to", "device").exit_code == 2


def test_watch_writes_a_line_for_each_event(fake: FakeService, weft: Weft) -> None:
    fake.put("reverse")
    first, second = weft("adapters", "watch").stdout.splitlines()
    assert first.split()[1:4] == ["existing", "reverse", "lora"]
    assert second.split()[1:] == ["synced"]
    first, second = weft("adapters", "watch", "--json").stdout.splitlines()
    assert json.loads(first)["adapter"]["adapter_id"] == "reverse"
    assert json.loads(second)["change"] == "ADAPTER_CHANGE_SYNCED"


def test_info(fake: FakeService, weft: Weft) -> None:
    told = weft("info").stdout
    assert "nf4, bfloat16, on cpu" in told
    assert "self_attn.q_proj" in told
    assert json.loads(weft("info", "--json").stdout)["sites"][0]["in_features"] == 192


@pytest.mark.parametrize(
    ("error", "line", "hint"),
    [
        (
            Overloaded("POOL_EXHAUSTED", "pool: full", retry_after_s=1.5),
            "POOL_EXHAUSTED: pool: full",
            "try again in 1.5 s",
        ),
        (AdapterConflict("VERSION_CONFLICT", "late"), "VERSION_CONFLICT: late", "`weft adapters show ID`"),
        (AdapterUnusable("ADAPTER_IN_USE", "in\nuse"), "ADAPTER_IN_USE: in use", ""),
    ],
)
def test_a_failure_is_one_line_and_what_to_do_next(
    fake: FakeService, weft: Weft, error: WeftError, line: str, hint: str
) -> None:
    fake.failures.append(error)
    result = weft("adapters", "show", "reverse")
    first, *rest = result.stderr.splitlines()
    assert (result.exit_code, first, result.stdout) == (1, line, "")
    assert len(rest) == bool(hint)
    assert hint in "".join(rest)


def test_an_error_is_red_on_a_terminal(fake: FakeService, weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    fake.failures.append(AdapterUnusable("ADAPTER_IN_USE", "text with [red]markup[/red] and \x1b[2J"))
    first = weft("adapters", "unload", "reverse").stderr.splitlines()[0]
    assert first == "\x1b[31mADAPTER_IN_USE: text with [red]markup[/red] and \\x1b[2J\x1b[0m"


def test_the_text_of_a_long_failure_stays_one_line(fake: FakeService, weft: Weft) -> None:
    fake.failures.append(AdapterUnusable("ADAPTER_IN_USE", "word " * 90))
    assert len(weft("adapters", "unload", "reverse").stderr.splitlines()) == 1


def test_no_server_is_told_with_its_address(weft: Weft) -> None:
    result = weft("adapters", "ls", "--server", "127.0.0.1:1")
    first, second = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first.startswith("UNAVAILABLE: failed to connect")
    assert second == "is `weft serve` running at 127.0.0.1:1? (--server, WEFT_SERVER)"


def test_unavailable_is_tried_again_before_it_is_told(fake: FakeService, weft: Weft) -> None:
    fake.put("reverse")
    fake.failures.append(Unavailable("DRAINING", "draining", retry_after_s=0.01))
    assert weft("adapters", "show", "reverse").exit_code == 0
