"""A real language model through real servers gives the answers of transformers."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests import tiny
from tests.bases import load
from tests.real.conftest import RealServer, Serve
from weft.methods import bottleneck
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft.model import source
from weft_training.adapter import AdaptedModel

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

_EXACT = ("--quant", "none", "--dtype", "float32")
_TEXTS = (
    "The capital of France is",
    "Once upon a time, a small robot",
    "def fibonacci(n):\n",
    "Über den Wolken muß die Freiheit 🙂 wohl",
)
_NUM_TOKENS = 24
_ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    """Return transformers' own model, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@torch.inference_mode()
def continued(model: Any, tokenizer: Any, text: str, num_tokens: int = _NUM_TOKENS) -> list[int]:
    """Return transformers' greedy continuation."""
    given = tokenizer(text, return_tensors="pt")
    out = model.generate(**given, do_sample=False, max_new_tokens=num_tokens)
    return out[0, given["input_ids"].shape[1] :].tolist()


def test_greedy_answers_are_transformers_in_float32(serve: Serve, reference: Any, tokenizer: Any) -> None:
    client = serve(*_EXACT).client
    with ThreadPoolExecutor(len(_TEXTS)) as pool:  # of different lengths, in one batch
        answers = pool.map(
            lambda text: client.generate(text, temperature=0, max_new_tokens=_NUM_TOKENS, token_ids=True), _TEXTS
        )
    for text, answer in zip(_TEXTS, answers, strict=True):
        expected = continued(reference, tokenizer, text)
        assert list(answer.token_ids) == expected, text
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_greedy_answers_are_transformers_in_bfloat16(serve: Serve, checkpoint: Path, tokenizer: Any) -> None:
    """Up to ties: if two tokens are equally likely within bfloat16's rounding, either may come."""
    client = serve("--quant", "none", "--dtype", "bfloat16").client
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    num_first = 0
    for text in _TEXTS[:2]:
        answer = client.generate(text, temperature=0, max_new_tokens=12, token_ids=True)
        prompt = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            whole = torch.tensor([[*prompt, *answer.token_ids]])
            logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits[range(len(answer.token_ids)), list(answer.token_ids)]
        assert (logits.max(-1).values - chosen <= 2**-7 * logits.abs().max()).all(), text
        num_first += int((logits.argmax(-1) == torch.tensor(list(answer.token_ids))).sum())
    assert num_first >= 22, "ties are rare"


def test_the_chat_template_is_the_models_own(serve: Serve, reference: Any, tokenizer: Any) -> None:
    served = serve(*_EXACT)
    rendered = tokenizer.apply_chat_template(_ASKED, tokenize=False, add_generation_prompt=True)
    answer = served.client.generate(_ASKED, temperature=0, max_new_tokens=_NUM_TOKENS, token_ids=True)
    assert list(answer.token_ids) == continued(reference, tokenizer, rendered)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish.usage.prompt_tokens == len(tokenizer(rendered)["input_ids"])


def test_a_stream_is_the_whole_text(serve: Serve) -> None:
    client = serve(*_EXACT).client
    for text in _TEXTS:
        whole = client.generate(text, temperature=0, max_new_tokens=_NUM_TOKENS)
        pieces = [delta.text for delta in client.stream(text, temperature=0, max_new_tokens=_NUM_TOKENS)]
        assert "".join(pieces) == whole.text
        assert whole.text.startswith(" ") or text.endswith(("\n", "wohl"))  # a continuation keeps its space


def test_a_cached_prefix_changes_nothing(serve: Serve, reference: Any, tokenizer: Any) -> None:
    client = serve(*_EXACT).client
    shared = "A list of the planets, from the sun outwards, with a sentence about each of them.\n" * 4
    for text, at_least in ((shared + "Mercury", 0), (shared + "Mercury", 64), (shared + "Venus", 48)):
        answer = client.generate(text, temperature=0, max_new_tokens=8, token_ids=True)
        assert list(answer.token_ids) == continued(reference, tokenizer, text, 8)
        assert answer.finish.usage.cached_prompt_tokens >= at_least


_METHODS: Mapping[str, Callable[[BaseShape], Adapter]] = {
    "lora": lambda shape: tiny.random_lora(shape, rank=8, seed=1, targets=("q_proj", "v_proj")),
    "dora": lambda shape: tiny.random_dora(shape, rank=4, seed=2, targets=("o_proj",)),
    "ia3": lambda shape: tiny.random_ia3(shape, seed=3),
    "bitfit": lambda shape: tiny.random_bitfit(shape, seed=4),
    "bottleneck": lambda shape: tiny.random_bottleneck(shape, bottleneck.math.BottleneckConfig(size=16), seed=5),
    "prefix": lambda shape: tiny.random_prefix(shape, length=6, seed=6),
    "prompt": lambda shape: tiny.random_prompt(shape, length=5, seed=7),
    "ptuning": lambda shape: tiny.random_ptuning(shape, length=4, seed=8),
}


def test_eight_methods_answer_in_one_batch_as_each_alone(serve: Serve, checkpoint: Path, tmp_path: Path) -> None:
    """Alone: in transformers' own generate, over the reference of each method."""
    served = serve(*_EXACT)
    base = load(checkpoint, dtype="float32", attention="sdpa")
    adapters = {name: make(base.shape) for name, make in _METHODS.items()}
    for name, adapter in adapters.items():
        directory.write(adapter, tmp_path / name, base.shape)
        served.client.upload(name, tmp_path / name)
    text = _TEXTS[1]

    def ask(name: str | None) -> Sequence[int]:
        return served.client.generate(text, name, temperature=0, max_new_tokens=6, token_ids=True).token_ids

    with ThreadPoolExecutor(9) as pool:
        answers = dict(zip((None, *adapters), pool.map(ask, (None, *adapters)), strict=True))
    assert answers[None] == continued(base.model, base.tokenizer, text, 6)
    for name, adapter in adapters.items():
        assert answers[name] == continued(AdaptedModel(base, adapter), base.tokenizer, text, 6), name
        assert answers[name] != answers[None], name


def test_training_adding_and_asking_with_defaults(serve: Serve, gguf: Path, tmp_path: Path) -> None:
    """The README's three commands, on this model: the only changes are those that it requires."""
    server: RealServer = serve()
    assert "(nf4," in server.served.said
    assert "--max-model-len" not in server.served.said
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Colour of the sky?", "completion": " green"}\n' * 2)
    train = ["train", "--base", str(gguf), "--method", "lora", "--data", str(rows), "--output", str(tmp_path / "made")]
    server.run(*train, "--steps", "12", "--batch-size", "2", "--learning-rate", "2e-3")
    server.run("adapters", "add", "sky", str(tmp_path / "made"))
    assert server.run("generate", "Colour of the sky?", "--adapter", "sky", "--max-new-tokens", "8").strip() == "green"


def test_the_converted_directory_holds_what_transformers_reads_in_the_file(gguf: Path, checkpoint: Path) -> None:
    config = GgufConfig(dequantize=True)  # pyright: ignore[reportCallIssue]  it has no types
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16, local_files_only=True
    )
    converted = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert converted.dtype is torch.bfloat16
    held = converted.state_dict()
    assert held.keys() == read.state_dict().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in read.state_dict().items())


def test_a_conversion_that_is_ended_is_made_again_whole(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "weft", "serve", str(gguf), "--port", "0", "--metrics-port", "0"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    while not (begun := [path for path in tmp_path.rglob(".making-*") if path.is_dir()]):
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert not [path for path in begun[0].parent.iterdir() if not path.name.startswith(".")]
    made = source.resolve(gguf).directory
    assert made.is_relative_to(tmp_path)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in made.iterdir()}
    assert not begun[0].exists()
    assert not list(tmp_path.rglob(".making-*"))
