"""`make release`: check, test, build and tag the version that server/weft/__init__.py states. Nothing is published.

Cheap checks come first. Wheels are built in another directory, and replace those in dist/ together. The tag is set
last, so a release that fails on the way leaves none.
"""

import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deploy.distributions import CLIENT, ROOT, SERVER, Wheel, built
from weft.kernels.cpu.build import INSTRUCTION_SETS

CHANGELOG = "CHANGELOG.md"
VERSION = "server/weft/__init__.py"
_HEADING = re.compile(r"^## \[([^\]\n]+)\](?: - (\S+))?[^\n]*$", re.MULTILINE)


class Refused(Exception):
    """The release cannot be made; the text is one sentence with the remedy."""


def version_of(root: Path) -> str:
    """Return the version that the tree at `root` states."""
    found = re.search(r'^__version__ = "([^"]+)"$', (root / VERSION).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise Refused(f'{VERSION}: must have a line __version__ = "X.Y.Z"')
    return found[1]


def require_clean(root: Path) -> None:
    """Refuse a tree with changes or new files: the build must be of the tagged tree."""
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        first, more = changed[0].strip(), len(changed) - 1
        raise Refused(f'git: the tree must be clean, given "{first}" and {more} more; commit or remove what changed')


def require_untagged(root: Path, tag: str) -> None:
    """Refuse a version that was released."""
    if _git(root, "tag", "--list", tag):
        raise Refused(f"git: tag {tag} exists; raise __version__ in {VERSION}")


def require_section(changelog: str, version: str, today: datetime.date) -> None:
    """Refuse a changelog without a dated section of `version`, or with lines under Unreleased."""
    headings = list(_HEADING.finditer(changelog))
    ends = [heading.start() for heading in headings[1:]] + [len(changelog)]
    dates = {heading[1]: heading[2] for heading in headings}
    has_lines = {
        heading[1]: "\n- " in changelog[heading.end() : end] for heading, end in zip(headings, ends, strict=True)
    }
    if not has_lines.get(version):
        raise Refused(f"{CHANGELOG}: must have a section ## [{version}] with lines; move those of [Unreleased] there")
    if has_lines.get("Unreleased"):
        raise Refused(f"{CHANGELOG}: [Unreleased] must be empty; move its lines to [{version}]")
    try:
        day = datetime.date.fromisoformat(dates[version] or "")
    except ValueError:
        raise Refused(
            f"{CHANGELOG}: [{version}] must have its date, as in ## [{version}] - {today}, given {dates[version]}"
        ) from None
    if day > today:
        raise Refused(f"{CHANGELOG}: the date of [{version}] must not be after {today}, given {day}; write today's")


def require_kernels(wheel: Wheel) -> None:
    """Refuse a server wheel that lacks prebuilt CPU kernels of an instruction set."""
    carried = wheel.names()
    missing = [name for name in INSTRUCTION_SETS if f"weft/kernels/cpu/prebuilt/{name}.so" not in carried]
    if missing:
        raise Refused(f"{wheel.path.name}: has no CPU kernels for {', '.join(missing)}; build on Linux x86-64 with g++")


def release(root: Path) -> list[Path]:
    """Release the tree at `root`; the wheels. Raises Refused."""
    version, today = version_of(root), datetime.date.today()
    tag = f"v{version}"
    require_clean(root)
    require_untagged(root, tag)
    require_section((root / CHANGELOG).read_text(encoding="utf-8"), version, today)
    for target in ("check", "test"):
        if subprocess.run(["make", target], cwd=root).returncode:
            raise Refused(f"make {target}: must pass; mend what it says above")
    require_clean(root)
    with tempfile.TemporaryDirectory(prefix="weft-release-") as aside:
        wheels = [_wheel(name, root, Path(aside, name)) for name in (CLIENT, SERVER)]
        require_kernels(wheels[-1])
        dist = root / "dist"
        dist.mkdir(exist_ok=True)
        for old in dist.glob("weft_serve*.whl"):
            old.unlink()
        released = [Path(shutil.copy2(wheel.path, dist)) for wheel in wheels]
    _git(root, "tag", "--annotate", tag, "--message", f"Weft {version}")
    return released


def _wheel(name: str, root: Path, directory: Path) -> Wheel:
    try:
        return built(name, directory, root=root)
    except subprocess.CalledProcessError as error:
        [*_, last] = (error.stdout + error.stderr).strip().splitlines() or [f"exit code {error.returncode}"]
        raise Refused(f"hatchling: cannot build {name}: {last}") from None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    """Release this tree; the exit code."""
    try:
        wheels = release(ROOT)
    except Refused as error:
        print(f"not released: {error}", file=sys.stderr)
        return 1
    print(*wheels, sep="\n")
    print(f"tagged v{version_of(ROOT)}; push the tag and publish these wheels to release")
    return 0


if __name__ == "__main__":
    sys.exit(main())
