"""The contents of the files under deploy/, read as their users read them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml

import weft.api.serve
from weft.cli import app
from weft.config import WeftConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def document(path: Path) -> Any:
    [only] = documents(path)
    return only


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, argument) in order, continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parted = (line.partition(" ") for line in joined.splitlines() if line)
    return [(name, argument.strip()) for name, _, argument in parted]


def entrypoint() -> list[str]:
    """The arguments of `weft` that the image gives before the ones of whoever starts it."""
    [argument] = [argument for name, argument in instructions(DEPLOY / "Dockerfile") if name == "ENTRYPOINT"]
    command, *arguments = json.loads(argument)
    assert command == "weft"
    return arguments


def configured(
    arguments: Sequence[str], environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[WeftConfig | None, str]:
    """What `weft` with these arguments would serve, by the real command line; None and its words if it refuses them."""
    seen: list[WeftConfig] = []
    monkeypatch.setattr(weft.api.serve, "run", lambda config, adapters: seen.append(config) or 0)
    result = typer.testing.CliRunner().invoke(app, list(arguments), env=dict(environment))
    return (seen[0] if seen else None), result.output


def size(text: str) -> int:
    """Return the bytes of a quantity as Kubernetes ("12Gi") and Compose ("4g": binary there) write it."""
    number, unit = re.fullmatch(r"(\d+)\s*([A-Za-z]+)", text).groups()  # type: ignore[union-attr]
    return int(number) << {"k": 10, "m": 20, "g": 30, "t": 40}[unit[0].lower()]


def expressions(node: Any) -> Iterator[str]:
    """Yield every PromQL expression in an alert file or a dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from expressions(item)
