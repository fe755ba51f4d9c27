"""Two processes that swap the content of one id in one store: exactly one succeeds."""

import contextlib
import subprocess
import sys
from pathlib import Path

from weft.adapters.identifiers import AdapterId
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits

COMPETITOR = """
import sys
from pathlib import Path
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits
from weft.errors import AdapterConflict

store = AdapterStore(Path(sys.argv[1]), AdapterLimits())
for number, expected in enumerate(sys.stdin):
    with store.stage() as staging:
        with staging.open_file("adapter_config.json") as file:
            file.write(f"{sys.argv[2]} {number}".encode())
        version = staging.seal()
        print("staged", flush=True)
        sys.stdin.readline()
        try:
            store.commit(version, adapter_id="alpha", method="lora", expected_digest=expected.strip())
            print(version.digest, flush=True)
        except AdapterConflict as error:
            print(error.reason, flush=True)
"""


def test_of_two_processes_exactly_one_swaps(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, AdapterLimits())
    store.recover()

    def tell(line: str) -> list[str]:
        """Send the same line to both at once; return both answers."""
        for competitor in competitors:
            assert competitor.stdin is not None
            competitor.stdin.write(line + "\n")
            competitor.stdin.flush()
        return [competitor.stdout.readline().strip() for competitor in competitors if competitor.stdout is not None]

    with store.stage() as staging:
        with staging.open_file("adapter_config.json") as file:
            file.write(b"the first")
        current = store.commit(staging.seal(), adapter_id=AdapterId("alpha"), method="lora").digest
    with contextlib.ExitStack() as stack:
        competitors = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", COMPETITOR, str(tmp_path), who],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for who in ("one", "two")
        ]
        for _ in range(40):
            assert tell(current) == ["staged", "staged"]
            outcomes = tell("go")
            assert outcomes.count("VERSION_CONFLICT") == 1
            current = store.read_manifest(AdapterId("alpha")).digest
            assert current in outcomes
    store.recover()
    assert [path.name for path in (tmp_path / "versions").iterdir()] == [current]
    assert not [*(tmp_path / "staging").iterdir()]
