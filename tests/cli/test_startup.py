"""`weft` itself: version, help without the slow imports, and the arguments that it passes to the trainer."""

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.cli.conftest import Weft
from weft import __version__

SLOW = ("torch", "transformers", "grpc", "google.protobuf", "pydantic_settings", "weft_training")


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("adapters", "ls", "--help"), ("--version",)])
def test_help_imports_nothing_slow(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([name for name in {SLOW} if name in sys.modules], file=sys.stderr))\n"
        "from weft.cli import main\n"
        "main()"
    )
    done = run_python(code, *arguments)
    assert done.returncode == 0
    assert done.stderr == "[]\n"


def test_a_command_for_a_server_does_not_import_torch() -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'grpc' in sys.modules))\n"
        "from weft.cli import main\n"
        "main()"
    )
    done = run_python(code, "info", "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == "False True\n"


def test_python_m_weft_is_the_command() -> None:
    command = [sys.executable, "-m", "weft", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stdout) == (0, f"weft {__version__}\n")


def test_an_unknown_command_is_a_usage_error(weft: Weft) -> None:
    result = weft("weave")
    assert result.exit_code == 2
    assert "No such command" in result.stderr


def module(name: str, monkeypatch: pytest.MonkeyPatch, **contents: Callable[..., Any]) -> None:
    """Replace one of the trainer's modules."""
    made = ModuleType(name)
    made.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, made)


def test_train_hands_all_arguments_over(weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module("weft_training.command", monkeypatch, app=lambda **given: calls.append(given))
    arguments = ["--help", "--rank", "8", "data.jsonl", "-x", "--", "--last"]
    assert weft("train", *arguments).exit_code == 0
    assert calls == [{"args": arguments, "prog_name": "weft train"}]


def test_demo_hands_all_arguments_over(weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    module("weft_training.demo.tour", monkeypatch, main=lambda arguments: len(arguments))
    assert weft("demo", "--fast", "--help").exit_code == 2


@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_missing_trainer_is_told(weft: Weft, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for name in list(sys.modules):
        if name.startswith("weft_training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "weft_training", None)  # makes its import fail
    result = weft(command, "--help")
    assert result.exit_code == 1
    assert "weft_training" in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[1] == "install the train extra: pip install 'weft-serve[train]'"
