"""The cache of compiled kernels: whole or absent, the user's own, and unchanged since it was written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from weft.kernels.cpu import build, library

# A slow compiler, with a half-written file for most of its time.
_SLOW_COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] && echo "#define processor" && exit
printf half > "$out" && sleep 0.2 && printf whole > "$out"
"""
_BUILD = "import sys, pathlib; from weft.kernels.cpu import build; print(build.native(pathlib.Path(sys.argv[1])))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, with a compiler whose libraries contain `whole`."""
    compiler = tmp_path / "compiler"
    compiler.write_text(_SLOW_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path / "new"


def test_processes_may_build_at_once(cache: Path) -> None:
    builders = [
        subprocess.Popen((sys.executable, "-c", _BUILD, str(cache)), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    seen: set[str] = set()
    while any(builder.poll() is None for builder in builders):
        seen |= {path.read_text() for path in cache.glob("*.so")}
    [path] = {builder.communicate()[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert [str(kept) for kept in cache.iterdir()] == [path]
    assert seen | {Path(path).read_text()} == {"whole"}
    assert cache.stat().st_mode & 0o077 == 0
    assert Path(path).stat().st_mode & 0o777 == 0o600


def test_what_is_there_and_whole_is_not_compiled_again(cache: Path) -> None:
    path = build.native(cache)
    before = path.stat()
    assert build.native(cache) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_change_in_any_source_or_header_is_compiled(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(os.environ["CXX"]).write_text(_SLOW_COMPILER.replace("sleep 0.2 && ", ""))
    sources = tmp_path / "sources"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", sources)
    changed = [path for path in sources.iterdir() if path.suffix in (".cpp", ".h")]
    seen = {build.native(cache)}
    for path in changed:
        path.write_text(f"{path.read_text()}// changed\n")
        seen.add(build.native(cache))
    assert len(seen) == 1 + len(changed) > 10


@pytest.mark.parametrize("content", ["", "who", "Whole"], ids=["empty", "truncated", "tampered"])
def test_a_damaged_file_is_compiled_again(cache: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = build.native(cache)
    path.write_text(content)
    assert build.native(cache) == path
    assert path.read_text() == "whole"
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_directory_that_others_may_write_is_refused(cache: Path, mode: int) -> None:
    build.native(cache)
    cache.chmod(mode)
    with pytest.raises(build.KernelsUnavailable, match=rf"{cache}: others may write it \(mode {mode:o}\)"):
        build.native(cache)


def test_a_file_that_others_may_write_is_refused(cache: Path) -> None:
    path = build.native(cache)
    path.chmod(0o620)
    with pytest.raises(build.KernelsUnavailable, match=f"{path}: others may write it"):
        build.native(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("planted", ["directory", "file"])
def test_what_belongs_to_somebody_else_is_refused(cache: Path, planted: str) -> None:
    path = build.native(cache)
    target = cache if planted == "directory" else path
    os.chown(target, 12345, -1)
    with pytest.raises(build.KernelsUnavailable, match=f"{target}: belongs to user 12345.*remove it"):
        build.native(cache)


def test_without_a_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_KERNELS", "native")
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(build.KernelsUnavailable, match="install g"):
        build.native(tmp_path)
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(build.KernelsUnavailable, match="no such option"):
        build.native(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.cache_directory() == tmp_path / "cache" / "weft" / "kernels"
    loaded = library.load.__wrapped__()
    assert loaded.functions is None
    assert "no such option" in loaded.reason


def test_a_kind_of_kernels_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_KERNELS", "fast")
    loaded = library.load.__wrapped__()
    assert loaded.functions is None
    assert loaded.reason == "WEFT_KERNELS: may be 'native' (compile here) or unset, given 'fast'"
