"""`python -m tests.families`: measure the whole table and write server/weft/model/families.json."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track
from transformers import logging

from tests.families.configurations import CONFIGURATIONS
from tests.families.measured import measure

_TABLE = Path(__file__).parents[2] / "server/weft/model/families.json"


def main() -> None:
    """Measure; a configuration that is neither equal nor refused ends it with an error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for configuration in track(CONFIGURATIONS, "measuring families"):
        with TemporaryDirectory() as directory:
            rows.append(asdict(measure(configuration, Path(directory))))
    _TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{_TABLE}: {sum(row['base'] == 'equal' for row in rows)} of {len(rows)} equal")


if __name__ == "__main__":
    main()
