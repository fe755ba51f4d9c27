"""A clean, described and tested tree is released, any other is refused in one sentence: in a real git repository."""

import datetime
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy import release
from tests.deploy.files import ROOT
from weft.kernels.cpu.build import INSTRUCTION_SETS

TODAY = datetime.date.today()
NAMES = {"weft_serve-1.2.0-py3-none-any.whl", "weft_serve_client-1.2.0-py3-none-any.whl"}
CHANGELOG = f"# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - {TODAY}\n\n### Added\n- A thing.\n"
MAKEFILE = "check:\n\t@echo checked >> log\ntest: check\n\t@echo tested >> log\n"
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
dynamic = ["version"]
requires-python = ">=3.11"
[tool.hatch.version]
path = "{above}server/weft/__init__.py"
[tool.hatch.build.targets.wheel]
packages = ["{package}"]
"""

pytestmark = pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed tree with two small distributions, ready to be released as 1.2.0."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Tester")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "tester@example.org")
    root = tmp_path / "tree"
    files = {
        "CHANGELOG.md": CHANGELOG,
        "Makefile": MAKEFILE,
        ".gitignore": "dist/\nlog\n__pycache__/\n",
        "pyproject.toml": PROJECT.format(name="weft-serve", above="", package="server/weft"),
        "protos/pyproject.toml": PROJECT.format(name="weft-serve-client", above="../", package="weft"),
        "protos/weft/v1/contract.proto": "",
        "server/weft/__init__.py": '__version__ = "1.2.0"\n',
        **{f"server/weft/kernels/cpu/prebuilt/{name}.so": name for name in INSTRUCTION_SETS},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "Change")


def write(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text)
    commit(root)


def test_a_release_is_checked_tested_built_and_tagged(tree: Path) -> None:
    (tree / "dist").mkdir()
    (tree / "dist" / "weft_serve-1.1.0-py3-none-any.whl").touch()
    assert {wheel.name for wheel in release.release(tree)} == NAMES
    assert {path.name for path in (tree / "dist").iterdir()} == NAMES
    assert (tree / "log").read_text().splitlines() == ["checked", "checked", "tested"]
    assert git(tree, "cat-file", "-t", "v1.2.0") == "tag"
    assert git(tree, "rev-parse", "v1.2.0^{commit}") == git(tree, "rev-parse", "HEAD")
    with pytest.raises(release.Refused, match=r"tag v1\.2\.0 exists; raise __version__"):
        release.release(tree)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (
        lambda root: (root / "Makefile").write_text("check:\n"),
        'git: the tree must be clean, given "M Makefile" and 0 more',
    ),
    "new file": (lambda root: (root / "new.py").touch(), "git: the tree must be clean"),
    "no section": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace("1.2.0", "1.1.0")),
        r"must have a section ## \[1\.2\.0\] with lines",
    ),
    "empty section": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace("- A thing.\n", "")),
        r"must have a section ## \[1\.2\.0\] with lines",
    ),
    "no date": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace(f" - {TODAY}", "")),
        "must have its date.*given None",
    ),
    "a word for a date": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace(str(TODAY), "soon")),
        "must have its date.*given soon",
    ),
    "a date to come": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace(str(TODAY), "2999-01-01")),
        "must not be after .*given 2999-01-01",
    ),
    "lines left over": (
        lambda root: write(root, "CHANGELOG.md", CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n\n- Another.\n")),
        r"\[Unreleased\] must be empty",
    ),
    "no version": (lambda root: write(root, "server/weft/__init__.py", "\n"), "must have a line __version__"),
    "failing check": (lambda root: write(root, "Makefile", "check:\n\t@false\n"), "make check: must pass"),
    "failing test": (lambda root: write(root, "Makefile", "check:\ntest:\n\t@false\n"), "make test: must pass"),
    "test that writes": (
        lambda root: write(root, "Makefile", "check:\ntest:\n\t@touch left_over\n"),
        "git: the tree must be clean.*left_over",
    ),
    "no build": (lambda root: write(root, "protos/pyproject.toml", ""), "hatchling: cannot build weft-serve-client"),
    "no kernels": (
        lambda root: (shutil.rmtree(root / "server/weft/kernels"), commit(root)),
        "has no CPU kernels for x86-64-v4-bf16, x86-64-v4, x86-64-v3; build on Linux",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_ready_is_refused_and_leaves_no_tag(tree: Path, case: str) -> None:
    """Negative control."""
    break_it, told = REFUSED[case]
    break_it(tree)
    with pytest.raises(release.Refused, match=told) as refused:
        release.release(tree)
    assert len(str(refused.value).splitlines()) == 1
    assert git(tree, "tag", "--list") == ""
    assert not (tree / "dist").exists()


def test_outside_of_git_is_refused(tree: Path) -> None:
    shutil.rmtree(tree / ".git")
    with pytest.raises(release.Refused, match=r"git status: .*not a git repository"):
        release.release(tree)


def test_this_tree_states_a_version_and_describes_it() -> None:
    version = release.version_of(ROOT)
    changelog = (ROOT / release.CHANGELOG).read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    assert headings[1].startswith(f"## [{version}] - ")


def test_the_tree_that_is_released_is_what_is_built(tree: Path) -> None:
    (server,) = (path for path in release.release(tree) if "client" not in path.name)
    with zipfile.ZipFile(server) as archive:
        assert archive.read("weft/__init__.py") == b'__version__ = "1.2.0"\n'
