"""Files stay small enough to read in one sitting, and the code map names every package."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("server", "training", "protos", "benchmarks", "deploy", "tests")
SUFFIXES = {".py", ".cpp", ".h", ".proto"}
LINES_MAX, TEST_LINES_MAX = 400, 700
LONGER = {
    "benchmarks/gpu.py": 496,
    "tests/engine/test_engine.py": 878,
    "tests/server/test_bad_adapters.py": 759,
}
"""Files above the limit, and how many lines each may have. Nothing is added here, and no number grows."""
PACKAGES = ("server/weft", "training/weft_training", "benchmarks")


def sources(root: Path) -> Iterator[str]:
    """Yield the paths of hand-written files below `root`; generated code and hidden directories are left out."""
    for tree in TREES:
        for path in sorted((root / tree).rglob("*")):
            relative = path.relative_to(root)
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if path.suffix in SUFFIXES and path.is_file() and not is_hidden and "_pb2" not in path.name:
                yield relative.as_posix()


def faults_of_size(root: Path, longer: Mapping[str, int]) -> list[str]:
    """Return the faults in the lengths of files, and in the list of those that may be `longer`."""
    faults = []
    found = {path: len((root / path).read_bytes().splitlines()) for path in sources(root)}
    for path, lines in found.items():
        limit = TEST_LINES_MAX if path.startswith("tests/") else LINES_MAX
        if lines <= limit and path in longer:
            faults.append(f"{path}: has {lines} lines, which is within {limit}; take it off the list in {__name__}")
        elif lines > longer.get(path, limit):
            faults.append(
                f"{path}: must have at most {longer.get(path, limit)} lines, given {lines}; split it by nouns"
            )
    return faults + [f"{path}: is gone; take it off the list in {__name__}" for path in longer if path not in found]


def packages(root: Path) -> set[str]:
    """Return the package directories as the code map names them: relative to server/weft, or else to the root."""
    found = {
        path.parent.relative_to(root).as_posix() for top in PACKAGES for path in root.glob(f"{top}/**/__init__.py")
    }
    return {f"{path.removeprefix('server/weft/')}/" for path in found if path != "server/weft"}


def named(architecture: str) -> set[str]:
    """Return the names in code of the code map's second column."""
    _, _, text = architecture.partition("\n## Code map\n")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", text.partition("\n## ")[0], re.MULTILINE)
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def test_files_are_short() -> None:
    assert len(list(sources(ROOT))) > 300
    assert faults_of_size(ROOT, LONGER) == []


def test_long_files_and_idle_exceptions_are_seen(tmp_path: Path) -> None:
    """Negative control."""
    sizes = {
        "server/weft/long.py": 401,
        "server/weft/listed.cpp": 420,
        "server/weft/grown.py": 431,
        "server/weft/mended.py": 400,
        "server/weft/v1/long_pb2.py": 999,
        "benchmarks/long.py": 401,
        "benchmarks/.environment/long.py": 999,
        "tests/long.py": 701,
        "tests/short.py": 700,
    }
    for path, lines in sizes.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("pass\n" * lines)
    listed = {f"server/weft/{name}": 430 for name in ("listed.cpp", "grown.py", "mended.py", "gone.py")}
    wrong = ["server/weft/grown.py", "server/weft/long.py", "server/weft/mended.py", "server/weft/gone.py"]
    found = [fault.partition(":")[0] for fault in faults_of_size(tmp_path, listed)]
    assert sorted(found) == sorted([*wrong, "benchmarks/long.py", "tests/long.py"])


def test_the_code_map_names_every_package_and_no_other() -> None:
    found = named((ROOT / "ARCHITECTURE.md").read_text())
    assert {name for name in found if name.endswith("/")} == packages(ROOT)
    assert not [name for name in found if not any((ROOT / top / name).exists() for top in ("", "server/weft"))]


def test_a_package_that_the_map_lacks_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    for path in ("server/weft", "server/weft/engine", "server/weft/engine/planted", "benchmarks"):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "__init__.py").touch()
    (tmp_path / "server/weft/engine/__pycache__").mkdir()
    table = (
        "| floor | where | what |\n|---|---|---|\n| 3 | `engine/`, `gone/` | `loop` |\n| – | `benchmarks/` | rows |\n"
    )
    document = f"# A\n\n## Code map\n\n{table}\n## Other\n\n| 1 | `other/` | |\n"
    assert named(document) ^ packages(tmp_path) == {"engine/planted/", "gone/"}
