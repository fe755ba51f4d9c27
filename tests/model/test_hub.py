"""A base by its hub id, from a hub on the loopback interface; each in its own process, as HF_ENDPOINT is read once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub, tiny
from tests.families.measured import require_sentence

_NAME = "org/name"
_RESOLVE = """
import sys
from pathlib import Path
from weft.model import source
try:
    print(source.resolve(Path(sys.argv[1])).directory)
except ValueError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a base in two revisions, each with additional files that Weft does not need."""
    found = {}
    for seed, revision in enumerate(("main", "v2")):
        base = tiny.save_base(tmp_path_factory.mktemp("hub") / revision, seed=seed)
        for extra in ("consolidated.safetensors", "modeling_name.py", "pytorch_model.bin"):
            (base / extra).write_text(extra)
        found[revision] = base
    return found


@pytest.fixture
def served(bases: dict[str, Path]) -> Iterator[hub.Hub]:
    with hub.serving(hub.Hub({_NAME: bases, "org/gated": bases}, gated=frozenset({"org/gated"}))) as hub_:
        yield hub_


def _environment(served: hub.Hub, home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**inherited, "HF_ENDPOINT": served.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def _run(command: list[str], served: hub.Hub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**_environment(served, home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _resolve(model: str, served: hub.Hub, home: Path, **environment: str) -> Path:
    ended = _run(["-c", _RESOLVE, model], served, home, **environment)
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip())


def _refusal(model: str, served: hub.Hub, home: Path) -> str:
    ended = _run(["-c", _RESOLVE, model], served, home)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    text = ended.stderr.strip().splitlines()[-1]
    require_sentence(text)
    return text


def test_a_revision_is_honoured_and_only_what_is_read_is_downloaded(
    served: hub.Hub, bases: dict[str, Path], tmp_path: Path
) -> None:
    for model, revision in ((_NAME, "main"), (f"{_NAME}@v2", "v2")):
        found = _resolve(model, served, tmp_path)
        assert found.name == hub.commit_of(_NAME, revision)
        names = {path.name for path in found.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert not names & {"consolidated.safetensors", "modeling_name.py", "pytorch_model.bin"}
        assert (found / "model.safetensors").read_bytes() == (bases[revision] / "model.safetensors").read_bytes()
    served.asked.clear()
    offline = _resolve(f"{_NAME}@v2", served, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.name == hub.commit_of(_NAME, "v2")
    assert served.asked == []


def test_what_the_hub_does_not_give_ends_in_a_sentence(served: hub.Hub, tmp_path: Path) -> None:
    assert "org/gated is gated; accept its terms" in _refusal("org/gated", served, tmp_path)
    assert "org/typo is neither a path nor a model that the hub shows you" in _refusal("org/typo", served, tmp_path)
    assert "the hub's org/name has no revision v3" in _refusal(f"{_NAME}@v3", served, tmp_path)


def test_a_hub_that_is_down_is_told_at_once(served: hub.Hub, tmp_path: Path) -> None:
    served.down = "/"
    text = _refusal(_NAME, served, tmp_path)
    assert "is not in the hub's cache, and the hub answers 503; give a model directory, or connect" in text
    asked = [path for path in served.asked if "/models/" in path]
    assert len(asked) == 1  # to avoid minutes of retries


def test_a_hub_that_is_not_there(served: hub.Hub, tmp_path: Path) -> None:
    gone = hub.Hub({}, endpoint="http://127.0.0.1:9")  # discard: nothing listens there
    assert "and the hub is not reached (" in _refusal(_NAME, gone, tmp_path)


def test_a_download_without_room_is_told(served: hub.Hub, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "home").write_text("no directory")  # root may write to all other places
    else:
        (tmp_path / "home").mkdir(mode=0o500)
    text = _refusal(_NAME, served, tmp_path / "home")
    assert "what the hub gives cannot be written" in text
    assert "set HF_HOME" in text


@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_server_does_not_tell_of_each_request_to_the_hub(level: str, served: hub.Hub, tmp_path: Path) -> None:
    served.down = "/"
    ended = _run(["-m", "weft", "serve", _NAME, "--log-level", level], served, tmp_path)
    assert ended.returncode == 1
    assert served.asked
    assert ("HTTP Request: GET" in ended.stderr) == (level == "debug")  # debug is the negative control
    assert "answers 503" in ended.stderr.splitlines()[-1] or level == "debug"
