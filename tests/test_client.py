"""Both clients against a real gRPC server: their requests, results, errors and retries."""

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cli.fake_service import SEED, FakeService, running
from weft.client import AsyncClient, Client, RpcFailure, calls
from weft.config import MIB, RequestLimits
from weft.errors import InvalidRequest, Overloaded, Unavailable, WeftError
from weft.v1 import generation_pb2
from weft.v1.adapter_pb2 import ADAPTER_RESIDENCY_DEVICE, ADAPTER_RESIDENCY_HOST, ADAPTER_STATE_ACTIVE
from weft.v1.adapter_service_pb2 import (
    ADAPTER_CHANGE_EXISTING,
    ADAPTER_CHANGE_SYNCED,
    REGISTER_OUTCOME_CREATED,
    REGISTER_OUTCOME_REPLACED,
    UNREGISTER_MODE_CANCEL,
    ListAdaptersRequest,
    RegisterAdapterRequest,
    UnregisterAdapterRequest,
    UploadHeader,
)

DRAINING = Unavailable("DRAINING", "the server is draining", retry_after_s=0.01)


@pytest.fixture
def fake() -> Iterator[tuple[FakeService, str]]:
    with running() as (service, address):
        yield service, address


@pytest.fixture
def service(fake: tuple[FakeService, str]) -> FakeService:
    return fake[0]


@pytest.fixture
def address(fake: tuple[FakeService, str]) -> str:
    return fake[1]


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout_s=10) as client:
        yield client


@pytest.fixture
def peft_directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"w" * (2 * MIB + 100))
    return tmp_path


def in_loop(address: str, use: Callable[[AsyncClient], Any]) -> Any:
    """Return the result of `use` on an AsyncClient."""

    async def run() -> Any:
        async with AsyncClient(address, timeout_s=10) as client:
            return await use(client)

    return asyncio.run(run())


def test_generate_sends_every_parameter_where_the_contract_has_it(service: FakeService, client: Client) -> None:
    client.generate(
        "a b",
        adapter="reverse",
        temperature=0.5,
        top_k=3,
        seed=7,
        max_new_tokens=9,
        stop=["x", "y"],
        ignore_eos=True,
        logprobs=2,
        request_id="mine",
        cache_salt="salt",
    )
    assert service.last(generation_pb2.GenerateRequest) == generation_pb2.GenerateRequest(
        request_id="mine",
        text="a b",
        adapter_id="reverse",
        sampling=generation_pb2.Sampling(temperature=0.5, top_k=3, seed=7),
        stopping=generation_pb2.Stopping(max_new_tokens=9, stop=["x", "y"], ignore_eos=True),
        options=generation_pb2.ResponseOptions(logprobs=2),
        cache_salt="salt",
    )


def test_generate_answers_the_contract_message(client: Client) -> None:
    completion = client.generate("a b")
    assert (completion.text, completion.finish.seed, completion.request_id) == ("A B", SEED, "r1")


def test_zero_is_sent_and_none_is_not(service: FakeService, client: Client) -> None:
    client.generate("a", temperature=0.0, top_k=None)
    sampling = service.last(generation_pb2.GenerateRequest).sampling
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_k")


def test_a_stop_that_is_one_text_is_one_stop(service: FakeService, client: Client) -> None:
    client.generate("a", stop="END")
    assert list(service.last(generation_pb2.GenerateRequest).stopping.stop) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "field", "answer"),
    [
        ("a", "text", "A"),
        ([3, 1], "token_ids", "3 1"),
        ([{"role": "user", "content": "hi"}], "messages", "HI"),
        ((generation_pb2.ChatMessage(role="user", content="hi"),), "messages", "HI"),
    ],
)
def test_a_prompt_is_text_tokens_or_a_conversation(
    service: FakeService, client: Client, prompt: Any, field: str, answer: str
) -> None:
    assert client.generate(prompt).text == answer
    assert service.last(generation_pb2.GenerateRequest).WhichOneof("input") == field


def test_several_adapters_are_a_composition(client: Client) -> None:
    finish = client.generate("a", adapter={"reverse": 0.25, "upper": -1}).finish
    assert [(part.adapter_id, part.weight) for part in finish.effective_adapters] == [("reverse", 0.25), ("upper", -1)]


def test_a_part_can_say_where_it_acts(service: FakeService, client: Client) -> None:
    whole = generation_pb2.WeightedAdapter(adapter_id="upper", weight=1.0)
    part = generation_pb2.WeightedAdapter(
        adapter_id="reverse", weight=0.5, token_ranges=[generation_pb2.TokenRange(begin=3, end=9)]
    )
    client.generate("a", adapter=[part, whole])
    assert list(service.last(generation_pb2.GenerateRequest).composition.adapters) == [part, whole]


def test_no_adapter_is_the_base(service: FakeService, client: Client) -> None:
    client.generate("a")
    assert service.last(generation_pb2.GenerateRequest).WhichOneof("target") is None


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: given -1"),
        ({"temperature": "hot"}, TypeError, "temperature: given 'hot'"),
        ({"temprature": 1.0}, TypeError, "unknown parameters: temprature"),
    ],
)
def test_a_wrong_parameter_is_named_and_nothing_is_sent(
    service: FakeService, client: Client, parameters: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.generate("a", **parameters)
    assert not service.requests


def test_a_stream_gives_deltas_and_then_its_finish(client: Client) -> None:
    with client.stream("a b c", logprobs=0) as answer:
        with pytest.raises(RuntimeError, match="not been read"):
            _ = answer.finish
        deltas = list(answer)
    assert [delta.text for delta in deltas] == ["A", " B", " C"]
    assert all(delta.logprobs for delta in deltas)
    assert (answer.request_id, answer.finish.finish_reason) == ("r1", generation_pb2.FINISH_REASON_STOP)


def test_an_async_stream_gives_the_same(address: str) -> None:
    async def use(client: AsyncClient) -> Any:
        async with client.stream("a b c") as answer:
            return [delta.text async for delta in answer], answer.finish.seed

    assert in_loop(address, use) == (["A", " B", " C"], SEED)


def test_leaving_a_stream_ends_the_request(service: FakeService, client: Client) -> None:
    for _ in client.stream("forever"):
        break
    assert service.left.wait(5)


def test_closing_a_stream_that_was_never_read_ends_the_request(service: FakeService, client: Client) -> None:
    with client.stream("forever"):
        while not service.requests:
            time.sleep(0.01)
    assert service.left.wait(5)


def test_leaving_an_async_stream_ends_the_request(service: FakeService, address: str) -> None:
    async def use(client: AsyncClient) -> bool:
        async with client.stream("forever") as answer:
            async for _ in answer:
                break
        return await asyncio.to_thread(service.left.wait, 5)

    assert in_loop(address, use)


def test_upload_sends_both_files_in_chunks_with_their_hashes(
    service: FakeService, client: Client, peft_directory: Path
) -> None:
    seen: list[tuple[int, int]] = []
    uploaded = client.upload("reverse", peft_directory, pin=True, progress=lambda *progress: seen.append(progress))
    assert uploaded.outcome == REGISTER_OUTCOME_CREATED
    assert uploaded.adapter.state == ADAPTER_STATE_ACTIVE
    header = service.last(UploadHeader)
    assert (header.adapter_id, header.pin, header.replace) == ("reverse", True, False)
    assert not header.HasField("expected_digest")
    assert service.uploaded == {path.name: path.read_bytes() for path in peft_directory.iterdir()}
    config_bytes = len(service.uploaded["adapter_config.json"])
    total = config_bytes + 2 * MIB + 100
    sent = [config_bytes, config_bytes + MIB, config_bytes + 2 * MIB, total]
    assert seen == [(done, total) for done in sent]


def test_async_upload_sends_the_same(service: FakeService, address: str, peft_directory: Path) -> None:
    uploaded = in_loop(address, lambda client: client.upload("reverse", peft_directory, replace=True))
    assert uploaded.outcome == REGISTER_OUTCOME_CREATED
    assert service.uploaded == {path.name: path.read_bytes() for path in peft_directory.iterdir()}


@pytest.mark.parametrize("is_async", [False, True])
def test_an_upload_that_the_server_refuses_at_once_fails_with_its_reason(
    service: FakeService, address: str, client: Client, peft_directory: Path, is_async: bool
) -> None:
    service.failures.append(Overloaded("UPLOADS_FULL", "uploads: max 2", retry_after_s=1))

    def upload() -> Any:
        if is_async:
            return in_loop(address, lambda client: client.upload("reverse", peft_directory))
        return client.upload("reverse", peft_directory)

    with pytest.raises(RpcFailure, match="UPLOADS_FULL: uploads: max 2"):
        upload()


def test_upload_of_a_directory_without_an_adapter_sends_nothing(
    service: FakeService, client: Client, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        client.upload("reverse", tmp_path)
    assert not service.requests


def test_upload_of_a_pickle_says_how_to_convert_it(service: FakeService, client: Client, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match=r"torch\.load\('adapter_model\.bin', weights_only=True\)"):
        client.upload("reverse", tmp_path)
    assert not service.requests


def test_register_says_what_it_expects(service: FakeService, client: Client) -> None:
    client.register("reverse", "demo/reverse")
    again = client.register("reverse", "demo/other", replace=True, expected_digest="", validate_only=True)
    assert again.outcome == REGISTER_OUTCOME_REPLACED
    assert service.last(RegisterAdapterRequest) == RegisterAdapterRequest(
        adapter_id="reverse", source="demo/other", replace=True, expected_digest="", validate_only=True
    )


def test_adapters_are_listed_over_all_pages(service: FakeService, address: str, client: Client) -> None:
    for number in range(5):
        service.put(f"a{number}")
    expected = ["a0", "a1", "a2", "a3", "a4"]
    assert [adapter.adapter_id for adapter in client.adapters()] == expected
    assert [adapter.adapter_id for adapter in in_loop(address, lambda client: client.adapters())] == expected


def test_adapters_can_be_filtered(service: FakeService, client: Client) -> None:
    service.put("a", "lora")
    service.put("b", "ia3")
    assert [adapter.adapter_id for adapter in client.adapters(method="ia3", state="active")] == ["b"]
    assert service.last(ListAdaptersRequest).state == ADAPTER_STATE_ACTIVE
    with pytest.raises(ValueError, match="state must be one of loading, active, draining, failed, quarantined, given"):
        client.adapters(state="happy")


def test_unregister_waits_longer_than_the_drain(service: FakeService, client: Client) -> None:
    service.put("reverse")
    freed = client.unregister("reverse", cancel=True, drain_timeout_s=1.5, allow_missing=True)
    request = service.last(UnregisterAdapterRequest)
    assert (request.mode, request.timeout.ToMilliseconds(), request.allow_missing) == (
        UNREGISTER_MODE_CANCEL,
        1500,
        True,
    )
    assert freed.freed_kv_blocks == 7


def test_load_unload_and_one_adapter(service: FakeService, client: Client) -> None:
    service.put("reverse")
    assert client.load("reverse", pin=True).pinned
    assert client.adapter("reverse").residency == ADAPTER_RESIDENCY_DEVICE
    assert client.unload("reverse", "host").residency == ADAPTER_RESIDENCY_HOST
    with pytest.raises(ValueError, match="residency must be one of device, host, disk, given 'moon'"):
        client.load("reverse", "moon")


def test_watch_tells_what_is_there(service: FakeService, address: str, client: Client) -> None:
    service.put("reverse")
    expected = [(ADAPTER_CHANGE_EXISTING, "reverse"), (ADAPTER_CHANGE_SYNCED, "")]
    with client.watch() as watch:
        assert [(event.change, event.adapter.adapter_id) for event in watch] == expected

    async def use(client: AsyncClient) -> Any:
        async with client.watch() as watch:
            return [(event.change, event.adapter.adapter_id) async for event in watch]

    assert in_loop(address, use) == expected


def test_model_info_and_tokenize(address: str, client: Client) -> None:
    assert client.model_info().model_name == "tiny"
    tokens = client.tokenize([{"role": "user", "content": "ab"}], pieces=True)
    assert (list(tokens.token_ids), list(tokens.pieces), tokens.num_tokens) == ([97, 98], ["a", "b"], 2)
    assert in_loop(address, lambda client: client.tokenize("ab")).num_tokens == 2


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_carries_all_that_the_status_says(
    service: FakeService, address: str, client: Client, is_async: bool, is_stream: bool
) -> None:
    error = Overloaded("QUEUE_FULL", "queue: max 4", metadata={"limit": 4}, retry_after_s=0.25)
    service.failures.append(error)

    async def ask(client: AsyncClient) -> Any:
        return [delta async for delta in client.stream("a")] if is_stream else await client.generate("a")

    def fail() -> Any:
        if is_async:
            return in_loop(address, ask)
        return list(client.stream("a")) if is_stream else client.generate("a")

    with pytest.raises(RpcFailure, match=r"^QUEUE_FULL: queue: max 4$") as raised:
        fail()
    failure = raised.value.failure
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert (dict(failure.metadata), failure.retry_after_s) == ({"limit": "4"}, 0.25)
    assert len(service.requests) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_unavailable_is_tried_again(service: FakeService, address: str, client: Client, is_async: bool) -> None:
    service.failures.extend([DRAINING, DRAINING])
    completion = in_loop(address, lambda client: client.generate("a")) if is_async else client.generate("a")
    assert completion.text == "A"
    assert len(service.requests) == 3


def test_unavailable_is_not_tried_for_ever(service: FakeService, client: Client) -> None:
    service.failures.extend([DRAINING] * 10)
    with pytest.raises(RpcFailure, match="DRAINING"):
        client.adapter("reverse")
    assert len(service.requests) == 4


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (Overloaded("QUEUE_FULL", "full", retry_after_s=0.01), lambda client: client.generate("a")),
        (InvalidRequest("PROMPT_INVALID", "bad"), lambda client: client.generate("a")),
        (DRAINING, lambda client: list(client.stream("a"))),
        (DRAINING, lambda client: list(client.watch())),
        (DRAINING, lambda client: client.unregister("a")),
    ],
)
def test_nothing_else_is_tried_again(
    service: FakeService, client: Client, error: WeftError, call: Callable[[Client], Any]
) -> None:
    service.failures.append(error)
    with pytest.raises(RpcFailure, match=error.reason):
        call(client)
    assert len(service.requests) == 1


def test_a_call_has_a_deadline(address: str) -> None:
    with Client(address, timeout_s=0.2) as client, pytest.raises(RpcFailure) as raised:
        for _ in client.stream("forever"):
            pass
    assert raised.value.failure.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_can_have_its_own_deadline(client: Client) -> None:
    started = time.monotonic()
    with pytest.raises(RpcFailure, match="DEADLINE_EXCEEDED"):
        list(client.stream("forever", timeout_s=0.2))
    assert time.monotonic() - started < 5


def test_no_server_is_a_failure_too() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RpcFailure) as raised:
        client.model_info()
    assert (raised.value.failure.code, raised.value.failure.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        public = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: [str(part) for part in inspect.signature(public[name]).parameters.values()] for name in public}

    assert methods(Client) == methods(AsyncClient)
    assert methods(Client)["adapter"] == ["self", "adapter_id: str"]


def test_an_answer_has_a_deadline_only_where_one_is_given() -> None:
    """A client cuts no answer off, but the server does after ten minutes; calls that answer at once have a minute."""
    for described in (calls.generate, calls.stream):
        assert described("x").deadline_s(None) is None
        assert described("x").deadline_s(7.0) == 7.0
        assert described("x", timeout_s=5.0).deadline_s(7.0) == 5.0
    assert calls.tokenize("x").deadline_s(None) == 60.0
    assert RequestLimits().deadline_default_s == 600.0
    assert RequestLimits().deadline_max_s == 3600.0
