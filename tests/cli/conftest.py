"""A fake server for the commands, and a way to run one."""

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from tests.cli.fake_service import FakeService, running
from weft.cli import app

Weft = Callable[..., Result]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    """The service that commands reach without `--server`."""
    with running() as (service, address):
        monkeypatch.setenv("WEFT_SERVER", address)
        yield service


@pytest.fixture
def weft() -> Weft:
    """Runs `weft` with these arguments in this process."""

    def run(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)

    return run
