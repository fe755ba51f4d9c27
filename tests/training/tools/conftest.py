"""The way to run a command that the commands' own tests have."""

from tests.cli.conftest import weft

__all__ = ["weft"]
