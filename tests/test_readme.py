"""The commands of the README work as described, and the paths that pages name exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from tests.commands import Served, serving
from weft.v1.generation_pb2 import GenerateRequest, GenerateResponse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
DECISIONS = ROOT / "docs" / "adr"
HEADINGS = ["Context", "Decision", "Alternatives", "Consequences"]
PACKAGES_BELOW = ("", "server", "server/weft", "training")
PLACES = {  # placeholders of the README for the reader's own paths
    "path/to/hf-model": "models/weft-demo",
    "path/to/peft-dir": "adapters_store/demo/reverse-lora",
    "path/to/other-peft-dir": "adapters_store/demo/upper-ia3",
}


def block(section: str, language: str = "", *, holds: str = "") -> str:
    """Return the first code block of the section that holds a text."""
    _, _, text = README.partition(f"\n## {section}\n")
    text = text.partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return next(found for of, found in blocks if of == language and holds in found)


def typed(line: str, *more: str) -> list[str]:
    """Parse a line of the README into the command and its arguments, with the paths of this tree."""
    words = shlex.split(line, comments=True)
    for place, path in PLACES.items():
        words = [re.sub(rf"(^|=){re.escape(place)}$", rf"\g<1>{path}", word) for word in words]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:], *more]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start the server of the README."""
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
    """The recipe holds the base unquantized, the server in NF4: the adapter is served, and the difference reported."""
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


def named_and_absent(page: Path) -> list[str]:
    """Return the paths that a page names in code or links to, and that do not exist.

    Code may leave out the directories before the package: `engine/engine.py` is below server/weft.
    """
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:\w[\w.-]*/)+[\w.*-]*)`", text))
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text))
    absent = {path for path in named if not any(next((ROOT / base).glob(path), None) for base in PACKAGES_BELOW)}
    return sorted(absent | {path for path in linked if not (page.parent / path).exists()})


def unmatched(architecture: str, directory: Path) -> list[str]:
    """Return the decisions that are listed and have no page, have a page and are not listed, or differ in the title."""
    _, _, listed = architecture.partition("\n## Decisions\n")
    lines = set(re.findall(r"^\d+\. \[.+\]\(.+\)$", listed, re.MULTILINE))
    pages = set()
    for path in directory.glob("*.md"):
        number, title = re.fullmatch(r"# (\d+)\. (.+)", path.read_text().splitlines()[0]).groups()  # type: ignore[union-attr]
        assert path.name.startswith(f"{int(number):04d}-"), path.name
        pages.add(f"{number}. [{title}](docs/adr/{path.name})")
    return sorted(lines ^ pages)


def test_what_the_documents_name_is_there() -> None:
    pages = [*ROOT.glob("*.md"), *DECISIONS.glob("*.md")]
    absent = {page.name: named_and_absent(page) for page in pages if page.name != "CHANGELOG.md"}
    assert len(absent) > 26
    assert not {name: paths for name, paths in absent.items() if paths}
    assert len(README.splitlines()) <= 150


def test_the_coverage_is_what_the_tests_require() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]
    [figure] = re.findall(r"at least (\d+) % of the lines", README)
    assert int(figure) == settings["report"]["fail_under"]


def test_a_name_of_nothing_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    page = tmp_path / "page.md"
    page.write_text(
        "`tests/absent.py`, `engine/absent.py`, [a page](absent.md#part), [another](page.md), `tests/mixing/`\n"
    )
    assert named_and_absent(page) == ["absent.md", "engine/absent.py", "tests/absent.py"]


def test_every_decision_is_listed_and_has_its_form() -> None:
    assert unmatched(ARCHITECTURE, DECISIONS) == []
    pages = sorted(DECISIONS.glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
        assert headings == [heading for heading in HEADINGS if heading in headings], page.name
        assert set(HEADINGS[:2]) <= set(headings), page.name
        assert re.search(r"^Status: \w+.*, \d{4}-\d{2}$", page.read_text(), re.MULTILINE), page.name


def test_a_decision_that_is_not_listed_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    (tmp_path / "0001-listed.md").write_text("# 1. Listed\n")
    (tmp_path / "0002-planted.md").write_text("# 2. Planted\n")
    line = "1. [Listed](docs/adr/0001-listed.md)"
    planted = "2. [Planted](docs/adr/0002-planted.md)"
    assert unmatched(f"\n## Decisions\n\n{line}\n", tmp_path) == [planted]
    (tmp_path / "0002-planted.md").unlink()
    assert unmatched(f"\n## Decisions\n\n{line}\n{planted}\n", tmp_path) == [planted]
    assert unmatched("\n## Decisions\n\n1. [Other](docs/adr/0001-listed.md)\n", tmp_path) != []
