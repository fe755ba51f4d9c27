"""Environments: made once, made again when their steps change, and honest when pip fails."""

from pathlib import Path

import pytest
from benchmarks import environments
from benchmarks.environments import Environment, NotMade


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[tuple[str, ...]] = []
    made: list[Path] = []
    monkeypatch.setattr(
        environments.venv, "create", lambda path, with_pip: made.append(path) or path.mkdir(parents=True)
    )
    monkeypatch.setattr(environments, "_install", lambda python, name, arguments: installed.append(arguments))
    monkeypatch.setattr(environments, "HERE", tmp_path)
    pins = tmp_path / "pins.txt"
    pins.write_text("one==1\n")
    wanted = Environment(name="one", steps=(("torch==2",), ("--no-deps", "-r", "pins.txt")))
    ticks: list[str] = []

    def python() -> Path:
        return environments.python(wanted, ticks.append, folder=tmp_path / "environments")

    assert python() == python() == tmp_path / "environments" / "one" / "bin" / "python"
    assert installed == [("torch==2",), ("--no-deps", "-r", "pins.txt")]
    assert len(made) == 1
    assert ticks == [
        "one: making its environment",
        "one: pip install, step 1 of 2",
        "one: pip install, step 2 of 2",
    ]
    pins.write_text("one==2\n")
    python()
    assert len(made) == 2, "another pin is another environment"


def test_an_environment_that_pip_cannot_make_is_none(tmp_path: Path) -> None:
    wanted = Environment(name="none", steps=(("--no-index", "no-such-package-anywhere==1"),))
    with pytest.raises(NotMade, match="none: pip install --no-index no-such-package-anywhere==1 ended with 1\n"):
        environments.python(wanted, lambda text: None, folder=tmp_path)
    assert not list(tmp_path.glob("*/made_of.json")), "it would pass for one the next time"


def test_no_environment_is_the_projects_own() -> None:
    assert environments.python(None, lambda text: None).exists()
