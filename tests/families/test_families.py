"""Every family of the table is served as transformers and PEFT compute it, or refused in one sentence.

The table itself is server/weft/model/families.json, which `weft families` prints; `make families` writes it again.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.families.configurations import CONFIGURATIONS, Configuration
from tests.families.measured import EQUAL, measure
from weft.model import families


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_a_family_is_equal_or_refused(configuration: Configuration, tmp_path: Path) -> None:
    row = measure(configuration, tmp_path)
    name = (configuration.family, configuration.variant)
    [listed] = [listed for listed in families.table() if (listed.family, listed.variant) == name]
    # A refusal may hold numbers of this machine; `measure` has checked that it is one sentence.
    assert replace(row, note="") == replace(listed, note="")
    assert bool(row.note) == bool(listed.note)


def test_the_table_is_as_large_as_promised() -> None:
    table = families.table()
    assert len(table) >= 60
    assert len({row.family for row in table}) >= 45
    assert sum(row.base == EQUAL for row in table) >= 45
