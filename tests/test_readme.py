"""What the README tells people to type does what it says."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from tests.commands import Served, serving
from weft.v1.generation_pb2 import GenerateRequest, GenerateResponse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PLACES = {  # what stands in the README for the reader's own
    "path/to/hf-model": "models/weft-demo",
    "path/to/peft-dir": "adapters_store/demo/reverse-lora",
    "path/to/other-peft-dir": "adapters_store/demo/upper-ia3",
}


def block(section: str, language: str = "", *, holds: str = "") -> str:
    """The first code block of a section that holds a text."""
    _, _, text = README.partition(f"\n## {section}\n")
    text = text.partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return next(found for of, found in blocks if of == language and holds in found)


def typed(line: str, *more: str) -> list[str]:
    """A line of the README as the command and its arguments, with our paths."""
    words = shlex.split(line, comments=True)
    for place, path in PLACES.items():
        words = [re.sub(rf"(^|=){re.escape(place)}$", rf"\g<1>{path}", word) for word in words]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:], *more]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that the README starts."""
    serve = block("Serve your own", holds="weft serve").splitlines()[0]
    store = str(tmp_path_factory.mktemp("store"))
    command = typed(serve, "--port", "0", "--metrics-port", "0", "--store", store, "--device", "cpu")
    with serving(command, cwd=ROOT) as served:
        yield served


def test_the_commands(served: Served) -> None:
    _, *lines = block("Serve your own", holds="weft serve").splitlines()
    outputs = [served.run(*typed(line)) for line in lines]
    assert len(outputs) == 4
    assert "support" in outputs[-1]
    assert "billing" in outputs[-1]


def test_the_python_client(served: Served) -> None:
    source = block("Serve your own", "python")
    assert "127.0.0.1:50051" in source
    source = source.replace("127.0.0.1:50051", served.address).replace('"billing"', '"from-python"')
    assert served.run(sys.executable, "-c", source.replace("path/to/peft-dir", PLACES["path/to/peft-dir"])).strip()


def test_the_call_from_anything_that_speaks_grpc(served: Served) -> None:
    words = shlex.split(block("Serve your own", holds="grpcurl").replace("\\\n", " "))
    body = words[words.index("-d") + 1]
    request = json_format.Parse(body, GenerateRequest())
    assert request.adapter_id == "reverse-lora"
    request.adapter_id = "support"  # the same adapter, under the name that the README serves it
    with grpc.insecure_channel(served.address) as channel:
        call = channel.unary_unary(
            f"/{words[-1]}",
            request_serializer=GenerateRequest.SerializeToString,
            response_deserializer=GenerateResponse.FromString,
        )
        assert call(request, timeout=60).text == "cba"


@pytest.mark.parametrize(("by_recipe", "trained_on"), [(False, "weft-demo"), (True, "unquantized; this server holds")])
def test_training_with_defaults_then_serving_with_defaults(
    served: Served, tmp_path: Path, by_recipe: bool, trained_on: str
) -> None:
    """The recipe holds the base unquantized and the server in NF4: it serves, and says so."""
    name = f"trained-{'by-recipe' if by_recipe else 'by-flags'}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc = ", "completion": "cba"}\n{"text": "a fox."}\n')
    output = str(tmp_path / "my-adapter")
    places = {"rows.jsonl": str(tmp_path / "rows.jsonl"), "my-adapter": output}
    line = block("Train", holds="weft train").strip()
    if by_recipe:
        line = "weft train training/recipes/lora.yaml --data rows.jsonl --output my-adapter"
    served.run(*(places.get(word, word) for word in typed(line, "--steps", "11", "--batch-size", "2")))
    served.run(*typed(f"weft adapters add {name} {output}"))
    assert name in served.run(*typed(f'weft generate "abc = " --adapter {name} --max-new-tokens 4 --json'))
    assert trained_on in served.run(*typed(f"weft adapters show {name}"))
    card = (tmp_path / "my-adapter" / "README.md").read_text()
    assert "in any quantization" in card
    assert "path: weft-demo\n" in card


def test_training(tmp_path: Path) -> None:
    line = block("Train", holds="weft train").strip()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc = ", "completion": "cba"}\n{"text": "a fox."}\n')
    places = {"rows.jsonl": str(tmp_path / "rows.jsonl"), "my-adapter": str(tmp_path / "my-adapter")}
    command = [places.get(word, word) for word in typed(line, "--steps", "2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "my-adapter").iterdir()} >= {"adapter_config.json"}


def test_what_the_documents_name_is_there() -> None:
    documents = README + (ROOT / "ARCHITECTURE.md").read_text()
    folders = "tests|deploy|protos|models|adapters_store|training|benchmarks"
    paths = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", documents))
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert len(README.splitlines()) <= 150
