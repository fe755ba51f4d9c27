"""`weft generate` and `weft chat`: requests, output of the answer, and its formats."""

import errno
import json

import pytest

from tests.cli.conftest import Weft
from tests.cli.fake_service import SEED, FakeService
from weft.cli import generate
from weft.errors import InvalidRequest, Overloaded
from weft.v1.generation_pb2 import ChatMessage, GenerateRequest, ResponseOptions, Sampling, Stopping


def test_the_answer_goes_to_stdout_and_how_it_ended_to_stderr(fake: FakeService, weft: Weft) -> None:
    result = weft("generate", "hello there", "--adapter", "reverse")
    assert (result.exit_code, result.stdout) == (0, "HELLO THERE\n")
    assert result.stderr == f"stop · 5 + 2 tokens · seed {SEED} · reverse@{'cd' * 6}\n"


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_both_ways_give_the_same(fake: FakeService, weft: Weft, how: str) -> None:
    assert weft("generate", "hello there", how).stdout == "HELLO THERE\n"


def test_options_are_sent(fake: FakeService, weft: Weft) -> None:
    options = (
        "--max-new-tokens 9 --min-new-tokens 1 --temperature 0 --top-p 0.9 --top-k 4 --min-p 0.1 "
        "--repetition-penalty 1.2 --seed 7 --stop x --stop y --include-stop --ignore-eos --logprobs 0"
    )
    weft("generate", "hi", *options.split())
    request = fake.last(GenerateRequest)
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.HasField("temperature"), sampling.top_p) == (0, True, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.seed) == (4, 0.1, 1.2, 7)
    assert (stopping.max_new_tokens, stopping.min_new_tokens, list(stopping.stop)) == (9, 1, ["x", "y"])
    assert (stopping.include_stop, stopping.ignore_eos, request.options.HasField("logprobs")) == (True, True, True)


def test_what_is_not_given_is_not_sent(fake: FakeService, weft: Weft) -> None:
    weft("generate", "hi", "--no-stream")
    assert fake.last(GenerateRequest) == GenerateRequest(
        text="hi", sampling=Sampling(), stopping=Stopping(), options=ResponseOptions()
    )


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_prompt_comes_from_stdin_without_its_last_line_break(
    fake: FakeService, weft: Weft, arguments: tuple[str, ...]
) -> None:
    assert weft("generate", *arguments, stdin="one\ntwo\n\n").stdout == "ONE\nTWO\n\n"
    assert fake.last(GenerateRequest).text == "one\ntwo\n"


def test_adapters_with_weights_are_a_composition(fake: FakeService, weft: Weft) -> None:
    result = weft("generate", "hi", "--adapter", "reverse=0.25", "--adapter", "upper")
    parts = fake.last(GenerateRequest).composition.adapters
    assert [(part.adapter_id, part.weight) for part in parts] == [("reverse", 0.25), ("upper", 1.0)]
    assert f"reverse@{'cd' * 6} × 0.25" in result.stderr


@pytest.mark.parametrize("adapters", [("reverse=much",), ("reverse=",), ("reverse", "reverse=1")])
def test_wrong_weights_are_refused(fake: FakeService, weft: Weft, adapters: tuple[str, ...]) -> None:
    result = weft("generate", "hi", *(part for adapter in adapters for part in ("--adapter", adapter)))
    assert result.exit_code == 2
    assert "--adapter" in result.stderr
    assert not fake.requests


def test_json_is_one_whole_answer(fake: FakeService, weft: Weft) -> None:
    answer = json.loads(weft("generate", "hi", "--json", "--logprobs", "1").stdout)
    assert (answer["text"], answer["finish"]["seed"]) == ("HI", str(SEED))
    assert answer["logprobs"][0]["top"][0]["piece"] == "HI"
    assert weft("generate", "hi", "--json", "--stream").exit_code == 2


def test_logprobs_are_a_table_after_the_text(fake: FakeService, weft: Weft) -> None:
    text, header, *rows = weft("generate", "hi you", "--logprobs", "1").stdout.splitlines()
    assert (text, header.split()) == ("HI YOU", ["token", "logprob", "likeliest"])
    assert [row.split() for row in rows] == [
        ["'HI'", "-0.500", "'HI'", "-0.500"],
        ["'", "YOU'", "-0.500", "'", "YOU'", "-0.500"],
    ]


def test_gates_are_drawn_after_the_text(fake: FakeService, weft: Weft) -> None:
    """Names cannot control the terminal; gates other than 0 are visible."""
    text, header, first, second = weft("generate", "hi", "--show-gates").stdout.splitlines()
    assert (text, header.split()) == ("HI", ["expert", "layers", "mean"])
    assert "\x1b" not in first
    assert first.split()[1:] == ["▒█", "0.750", "━" * 15]
    assert second.split() == ["cdcdcdcdcdcd", "░▒", "0.250", "━" * 5]
    assert fake.last(GenerateRequest).options.gates
    # Negative control: without the option nothing is drawn.
    assert weft("generate", "hi").stdout == "HI\n"
    assert not fake.last(GenerateRequest).options.gates


def test_a_failure_ends_with_code_1(fake: FakeService, weft: Weft) -> None:
    fake.failures.append(InvalidRequest("PROMPT_INVALID", "text: must not be empty"))
    result = weft("generate", "")
    assert (result.exit_code, result.stderr) == (1, "PROMPT_INVALID: text: must not be empty\n")


def test_a_number_that_cannot_be_sent_is_refused(fake: FakeService, weft: Weft) -> None:
    result = weft("generate", "hi", "--seed", str(2**64))
    assert result.exit_code == 2
    assert result.stderr.startswith("seed: given 18446744073709551616")


def test_a_closed_pipe_is_no_failed_call(fake: FakeService, weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(generate, "write", write)
    result = weft("generate", "forever")
    assert (result.exit_code, result.stderr) == (1, "")
    assert fake.left.wait(5)


def test_chat_sends_the_whole_conversation(fake: FakeService, weft: Weft) -> None:
    result = weft("chat", "--adapter", "reverse", "--system", "be kind", stdin="hello\nand you\n")
    assert result.exit_code == 0
    request = fake.last(GenerateRequest)
    assert request.adapter_id == "reverse"
    assert list(request.messages.messages) == [
        ChatMessage(role="system", content="be kind"),
        ChatMessage(role="user", content="hello"),
        ChatMessage(role="assistant", content="HELLO"),
        ChatMessage(role="user", content="and you"),
    ]
    assert "HELLO\n" in result.stdout
    assert "AND YOU\n" in result.stdout


def test_chat_can_change_the_adapter_and_forget(fake: FakeService, weft: Weft) -> None:
    lines = [
        "hello",
        "/adapter upper=0.5 reverse",
        "hello",
        "/clear",
        "/adapter",
        "/adapter x=y",
        "hello",
        "/exit",
        "no",
    ]
    weft("chat", stdin="\n".join(lines))
    requests = [request for request in fake.requests if isinstance(request, GenerateRequest)]
    assert [request.WhichOneof("target") for request in requests] == [None, "composition", None]
    assert [len(request.messages.messages) for request in requests] == [1, 3, 1]


def test_chat_goes_on_after_a_failure(fake: FakeService, weft: Weft) -> None:
    fake.failing = GenerateRequest
    fake.failures.append(Overloaded("QUEUE_FULL", "queue: full", retry_after_s=2))
    result = weft("chat", stdin="hello\nagain")
    assert result.exit_code == 0
    assert "QUEUE_FULL: queue: full\ntry again in 2 s\n" in result.stderr
    assert [turn.content for turn in fake.last(GenerateRequest).messages.messages] == ["again"]


def test_chat_needs_a_chat_template(fake: FakeService, weft: Weft) -> None:
    fake.has_chat_template = False
    result = weft("chat")
    assert result.exit_code == 1
    assert result.stderr.startswith("the base model has no chat template\n")
