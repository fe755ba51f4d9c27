"""Uploads: the protocol, its violations, and that nothing of a broken one is left: rows 20-28 of the bad inputs."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.server.conftest import Sources
from tests.server.files import Files, chunk, upload_header, upload_messages
from tests.server.live import WAIT_S, LiveServer, refused, wait_until
from weft.adapters.ingest import CONFIG_FILE
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.v1 import adapter_service_pb2
from weft.v1.adapter_service_pb2_grpc import AdapterServiceStub

Messages = Iterator[adapter_service_pb2.UploadAdapterRequest]
MIB = 1 << 20


@pytest.fixture(scope="module")
def files(sources: Sources) -> Files:
    return sources.parts("lora-9").files()


def _header(files: Files, change: Callable[[Any], object] = lambda header: None) -> Any:
    header = upload_header("uploaded", files)
    change(header)
    return adapter_service_pb2.UploadAdapterRequest(header=header)


def _body(files: Files) -> Messages:
    return (message for message in list(upload_messages("uploaded", files))[1:])


def _file(name: str, size_bytes: int, sha256: str = "0" * 64) -> adapter_service_pb2.UploadFile:
    return adapter_service_pb2.UploadFile(name=name, size_bytes=size_bytes, sha256=sha256)


def test_an_upload_is_registered_whole(server: LiveServer, files: Files) -> None:
    """In small chunks and with the files in either order; the result equals that of registering the directory."""
    created = server.client.upload(upload_messages("uploaded", files, chunk_bytes=1000))
    assert created.outcome == adapter_service_pb2.REGISTER_OUTCOME_CREATED
    answer = server.client.generate("uploaded")
    assert answer.digest == created.adapter.digest
    again = server.client.upload(upload_messages("uploaded", files))
    assert again.outcome == adapter_service_pb2.REGISTER_OUTCOME_UNCHANGED
    server.client.unregister("uploaded")
    header = upload_header("uploaded", files)
    turned = adapter_service_pb2.UploadHeader(adapter_id="uploaded", files=reversed(header.files))
    messages = [
        adapter_service_pb2.UploadAdapterRequest(header=turned),
        chunk(0, 0, files.weights),
        chunk(1, 0, files.config),
    ]
    assert server.client.upload(messages).adapter.digest == answer.digest
    assert server.client.generate("uploaded").tokens == answer.tokens
    path = files.write(server.config.allowed_sources[0] / "uploaded")
    registered = server.client.register("uploaded", path)
    assert registered.outcome == adapter_service_pb2.REGISTER_OUTCOME_UNCHANGED
    server.client.unregister("uploaded")


def test_checking_only_keeps_nothing(server: LiveServer, files: Files) -> None:
    checked = server.client.upload(upload_messages("uploaded", files, validate_only=True))
    assert checked.outcome == adapter_service_pb2.REGISTER_OUTCOME_CREATED
    assert checked.adapter.method == "lora"
    assert checked.adapter.rank == 8
    refused(lambda: server.client.get("uploaded"), "NOT_FOUND", "ADAPTER_NOT_FOUND")


BROKEN: dict[str, tuple[Callable[[Files], Any], str]] = {
    "20-nothing": (lambda files: [], "UPLOAD_PROTOCOL"),
    "20-no-part": (lambda files: [adapter_service_pb2.UploadAdapterRequest()], "UPLOAD_PROTOCOL"),
    "20-chunk-first": (lambda files: [chunk(0, 0, b"x")], "UPLOAD_PROTOCOL"),
    "20-header-twice": (lambda files: [_header(files), _header(files)], "UPLOAD_PROTOCOL"),
    "20-header-at-the-end": (lambda files: [_header(files), *_body(files), _header(files)], "UPLOAD_PROTOCOL"),
    "20-no-files": (lambda files: [_header(files, lambda header: header.ClearField("files"))], "UPLOAD_PROTOCOL"),
    "20-one-file": (lambda files: [_header(files, lambda header: header.files.pop())], "UPLOAD_PROTOCOL"),
    "20-a-file-twice": (
        lambda files: [_header(files, lambda header: header.files.extend(header.files[:1]))],
        "UPLOAD_PROTOCOL",
    ),
    "21-zero-bytes": (
        lambda files: [_header(files, lambda header: header.files[1].CopyFrom(_file(WEIGHTS_FILE, 0)))],
        "UPLOAD_TRUNCATED",
    ),
    "21-header-only": (lambda files: [_header(files)], "UPLOAD_TRUNCATED"),
    "21-one-file-only": (lambda files: [_header(files), chunk(0, 0, files.config)], "UPLOAD_TRUNCATED"),
    "21-cut-off": (lambda files: [*upload_messages("uploaded", files, chunk_bytes=1000)][:-1], "UPLOAD_TRUNCATED"),
    "22-more-bytes": (lambda files: [_header(files), chunk(0, 0, files.config + b" ")], "UPLOAD_PROTOCOL"),
    "22-more-chunks": (
        lambda files: [_header(files), *_body(files), chunk(1, len(files.weights), b"x")],
        "UPLOAD_PROTOCOL",
    ),
    "22-repeated": (lambda files: [_header(files), chunk(0, 0, b"{"), chunk(0, 0, b"{")], "UPLOAD_PROTOCOL"),
    "22-skipped": (lambda files: [_header(files), chunk(0, 0, b"{"), chunk(0, 2, b"{")], "UPLOAD_PROTOCOL"),
    "22-other-file": (lambda files: [_header(files), chunk(1, 0, b"{")], "UPLOAD_PROTOCOL"),
    "22-no-file": (lambda files: [_header(files), chunk(2, 0, b"{")], "UPLOAD_PROTOCOL"),
    "22-empty-chunk": (lambda files: [_header(files), chunk(0, 0, b"")], "UPLOAD_PROTOCOL"),
    "22-large-chunk": (
        lambda files: [
            _header(files, lambda header: header.files.reverse()),
            chunk(0, 0, b"x" * (MIB + 1)),
        ],
        "UPLOAD_PROTOCOL",
    ),
    "23-too-large": (
        lambda files: [_header(files, lambda header: header.files[1].CopyFrom(_file(WEIGHTS_FILE, 512 * MIB + 1)))],
        "ADAPTER_TOO_LARGE",
    ),
    "23-2-to-64": (
        lambda files: [_header(files, lambda header: header.files[1].CopyFrom(_file(WEIGHTS_FILE, 2**64 - 1)))],
        "ADAPTER_TOO_LARGE",
    ),
    "23-config-too-large": (
        lambda files: [_header(files, lambda header: header.files[0].CopyFrom(_file(CONFIG_FILE, 256 * 1024 + 1)))],
        "ADAPTER_TOO_LARGE",
    ),
    **{
        f"25-{name}": (
            lambda files, digest=digest: [
                _header(files, lambda header: header.files[1].CopyFrom(_file(WEIGHTS_FILE, 9, digest)))
            ],
            "CHECKSUM_INVALID",
        )
        for name, digest in {
            "missing": "",
            "short": "0" * 63,
            "long": "0" * 65,
            "upper-case": "A" * 64,
            "no-hex": "g" * 64,
            "prefixed": "sha256:" + "0" * 57,
        }.items()
    },
    "26-other-digest": (
        lambda files: [
            _header(files, lambda header: header.files[0].CopyFrom(_file(CONFIG_FILE, len(files.config)))),
            *_body(files),
        ],
        "CHECKSUM_MISMATCH",
    ),
    "30-pickle": (
        lambda files: [_header(files, lambda header: header.files[1].CopyFrom(_file("adapter_model.bin", 9)))],
        "FORMAT_UNSUPPORTED",
    ),
    "32-path": (
        lambda files: [_header(files, lambda header: header.files[1].CopyFrom(_file(f"../{WEIGHTS_FILE}", 9)))],
        "FORMAT_UNSUPPORTED",
    ),
}


@pytest.mark.parametrize("row", BROKEN)
def test_row(row: str, server: LiveServer, files: Files) -> None:
    make, reason = BROKEN[row]
    refused(lambda: server.client.upload(make(files)), "INVALID_ARGUMENT", reason, retry=False)
    assert server.staging() == []


def test_row_23_nothing_is_stored_of_what_is_too_large(server: LiveServer, files: Files) -> None:
    """The header alone decides: the server does not wait for a byte."""
    sent = threading.Event()

    def messages() -> Messages:
        yield _header(files, lambda header: header.files[1].CopyFrom(_file(WEIGHTS_FILE, 1 << 40)))
        assert sent.wait(WAIT_S)

    try:
        refused(lambda: server.client.upload(messages()), "INVALID_ARGUMENT", "ADAPTER_TOO_LARGE", "limit 536870912")
    finally:
        sent.set()


def test_row_26_tells_both_digests(server: LiveServer, files: Files) -> None:
    wrong, right = hashlib.sha256(b"x").hexdigest(), hashlib.sha256(files.config).hexdigest()
    header = _header(files, lambda header: header.files[0].CopyFrom(_file(CONFIG_FILE, len(files.config), wrong)))
    failure = refused(
        lambda: server.client.upload([header, *_body(files)]), "INVALID_ARGUMENT", "CHECKSUM_MISMATCH", wrong, right
    )
    assert (failure.metadata["limit"], failure.metadata["given"]) == (wrong, right)


def test_row_27_an_upload_that_stalls(tight: LiveServer, files: Files) -> None:
    """Silence, and a trickle: one byte now and then does not keep the place of an upload."""
    idle_s = tight.config.server.upload_idle_timeout_s

    def silent() -> Messages:
        yield _header(files)
        time.sleep(4 * idle_s)

    def trickling() -> Messages:
        yield _header(files)
        for offset in range(len(files.config)):
            time.sleep(idle_s / 4)
            yield chunk(0, offset, files.config[offset : offset + 1])

    for messages in (silent(), trickling()):
        started = time.monotonic()
        refused(
            lambda messages=messages: tight.client.upload(messages), "DEADLINE_EXCEEDED", "UPLOAD_STALLED", retry=False
        )
        assert time.monotonic() - started < 20 * idle_s
        assert tight.staging() == []


def test_row_28_a_client_that_leaves(server: LiveServer, files: Files) -> None:
    go_on = threading.Event()

    def messages() -> Messages:
        yield _header(files)
        yield chunk(0, 0, files.config[:10])
        go_on.wait(WAIT_S)

    call = server.client.adapters.UploadAdapter.future(messages())
    wait_until(lambda: len(server.staging()) > 0)
    call.cancel()
    started = time.monotonic()
    wait_until(lambda: server.staging() == [])
    assert time.monotonic() - started < 5, "promised is one second"
    go_on.set()
    assert call.cancelled()
    refused(lambda: server.client.get("uploaded"), "NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_uploads_have_places(server: LiveServer, files: Files) -> None:
    """A limited number is received at a time, a bounded line waits, and a free place is taken again."""
    go_on = threading.Event()

    def slow(name: str) -> Messages:
        messages = upload_messages(name, files, chunk_bytes=20_000)
        yield next(messages)
        yield next(messages)
        go_on.wait(WAIT_S)
        yield from messages

    most, waiting = server.config.server.uploads_max, server.config.server.uploads_waiting_max
    calls = [server.client.adapters.UploadAdapter.future(slow(f"slow-{i}")) for i in range(most)]
    wait_until(lambda: len(server.staging()) == 2 * most)  # a directory and its lock each
    # One more than may wait: the last to come is refused, while the others are held back.
    line = [
        server.client.adapters.UploadAdapter.future(upload_messages(f"waits-{i}", files)) for i in range(waiting + 1)
    ]
    wait_until(lambda: any(call.done() for call in line))
    [late] = [index for index, call in enumerate(line) if call.done()]
    failure = refused(line[late].result, "RESOURCE_EXHAUSTED", "UPLOADS_FULL", retry=True)
    assert failure.metadata["limit"] == str(most + waiting)
    assert len(server.staging()) == 2 * most
    # An unfinished upload is invisible, and occupies no id.
    refused(lambda: server.client.get("slow-0"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    refused(lambda: server.client.generate("slow-0"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    refused(lambda: server.client.unregister("slow-0"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    go_on.set()
    for index, call in enumerate(calls):
        assert call.result(WAIT_S).adapter.adapter_id == f"slow-{index}"
        server.client.unregister(f"slow-{index}")
    for index, call in enumerate(line):
        if index != late:
            assert call.result(WAIT_S).adapter.adapter_id == f"waits-{index}"
            server.client.unregister(f"waits-{index}")
    server.client.upload(upload_messages("uploaded", files))
    server.client.unregister("uploaded")


def test_sixteen_uploads_at_once_from_a_stock_client(server: LiveServer, files: Files) -> None:
    async def upload_all() -> list[Any]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.serving.port}") as channel:
            stub = AdapterServiceStub(channel)
            messages = (upload_messages(f"at-once-{i}", files, chunk_bytes=1000) for i in range(16))
            return await asyncio.gather(*map(stub.UploadAdapter, messages))

    assert [one.adapter.adapter_id for one in asyncio.run(upload_all())] == [f"at-once-{i}" for i in range(16)]
    for index in range(16):
        server.client.unregister(f"at-once-{index}")


def _refused_early(server: LiveServer, num_uploads: int) -> tuple[list[str], list[int]]:
    """Return a stock client's errors for uploads refused by their header, and its counts of written messages."""
    written = []
    file = _file(WEIGHTS_FILE, 8 * MIB)

    def messages() -> Messages:
        config = _file(CONFIG_FILE, 2)
        header = adapter_service_pb2.UploadHeader(adapter_id="NO ID", files=[config, file])
        yield adapter_service_pb2.UploadAdapterRequest(header=header)
        written.append(1)
        for offset in range(0, 8 * MIB, MIB):
            yield chunk(1, offset, bytes(MIB))
            written[-1] += 1

    async def upload_all() -> tuple[list[str], list[int]]:
        seen = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.serving.port}") as channel:
            for _ in range(num_uploads):
                try:
                    await AdapterServiceStub(channel).UploadAdapter(messages())
                except grpc.aio.AioRpcError as error:
                    seen.append(error.code().name)
        return seen, written

    return asyncio.run(upload_all())


def test_a_stock_client_sees_the_status_of_an_early_refusal(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _refused_early(server, 10) == (["INVALID_ARGUMENT"] * 10, [9] * 10)

    async def nothing(*_: object, **__: object) -> None:
        pass

    # Negative control: otherwise the call ends while the client writes, and at times the client gets no other reason.
    monkeypatch.setattr("weft.api.servicers.adapters.discard", nothing)
    _, written = _refused_early(server, 3)
    assert max(written) < 9


def test_a_slow_upload_does_not_hold_its_id(server: LiveServer, files: Files, sources: Sources) -> None:
    """While bytes of other content trickle in, the adapter is served and can be removed."""
    go_on = threading.Event()
    server.client.register("shared", sources("lora-2"))

    def slow() -> Messages:
        messages = upload_messages("shared", files, replace=True)
        yield next(messages)
        go_on.wait(WAIT_S)
        yield from messages

    call = server.client.adapters.UploadAdapter.future(slow())
    wait_until(lambda: len(server.staging()) > 0)
    assert server.client.tokens("shared", 2)
    server.client.unregister("shared")
    go_on.set()
    assert call.result(WAIT_S).outcome == adapter_service_pb2.REGISTER_OUTCOME_CREATED
    server.client.unregister("shared")


def test_a_client_that_leaves_while_it_is_registered(
    server: LiveServer, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the store that has begun is completed: disk and memory agree, even if the caller has gone."""
    from weft.adapters.store import AdapterStore

    committing, go_on = threading.Event(), threading.Event()
    commit = AdapterStore.commit

    def slowly(*arguments: Any, **options: Any) -> Any:
        committing.set()
        assert go_on.wait(WAIT_S)
        return commit(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "commit", slowly)
        call = server.client.adapters.UploadAdapter.future(upload_messages("uploaded", files))
        assert committing.wait(WAIT_S)
        call.cancel()
        time.sleep(0.05)
        go_on.set()
        wait_until(lambda: server.staging() == [])
    wait_until(lambda: server.client.get("uploaded").state == 2)
    assert server.client.generate("uploaded").digest == server.client.get("uploaded").digest
    server.client.unregister("uploaded")
    assert isinstance(call, grpc.Future)
