"""Fixtures of tests with real server processes."""

from collections.abc import Iterator

import pytest

from tests.reliability.pair import Pair
from tests.server.test_serve_process import Nursery


@pytest.fixture(scope="session")
def forge() -> Iterator[Nursery]:
    """Yield the process that forks servers."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def pair(forge: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Yield two servers on one store, which every test leaves running."""
    servers = Pair(forge, tmp_path_factory.mktemp("pair"))
    yield servers
    servers.end()
