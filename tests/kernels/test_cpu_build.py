"""The cache of compiled kernels: whole or absent. tests/reliability/test_kernel_cache.py attacks it."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from weft import durable
from weft.kernels.cpu import build, cache, library

# A slow compiler, with a half-written file for most of its time.
_SLOW_COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] && echo "#define processor" && exit
printf half > "$out" && sleep 0.2 && printf whole > "$out"
"""
_BUILD = "import sys, pathlib; from weft.kernels.cpu import cache; print(cache.native(pathlib.Path(sys.argv[1])).kept)"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of an empty cache, with a compiler whose libraries contain `whole`."""
    compiler = tmp_path / "compiler"
    compiler.write_text(_SLOW_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path / "new"


def test_processes_may_build_at_once(kept: Path) -> None:
    builders = [
        subprocess.Popen((sys.executable, "-c", _BUILD, str(kept)), stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    seen: set[str] = set()
    while any(builder.poll() is None for builder in builders):
        seen |= {path.read_text() for path in kept.glob("*.so")}
    [path] = {builder.communicate()[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert [str(path) for path in kept.iterdir()] == [path]
    assert seen | {Path(path).read_text()} == {"whole"}
    assert kept.stat().st_mode & 0o077 == 0
    assert Path(path).stat().st_mode & 0o777 == 0o600


def test_what_is_there_and_whole_is_not_compiled_again(kept: Path) -> None:
    path = cache.native(kept).kept
    assert path
    before = path.stat()
    assert cache.native(kept).kept == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_change_in_any_source_or_header_is_compiled(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(os.environ["CXX"]).write_text(_SLOW_COMPILER.replace("sleep 0.2 && ", ""))
    sources = tmp_path / "sources"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", sources)
    changed = [path for path in sources.iterdir() if path.suffix in (".cpp", ".h")]
    seen = {cache.native(kept).kept}
    for path in changed:
        path.write_text(f"{path.read_text()}// changed\n")
        seen.add(cache.native(kept).kept)
    assert len(seen) == 1 + len(changed) > 10


def test_a_directory_that_cannot_be_made_costs_the_cache_alone(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.write_text("a file")
    compiled = cache.native(kept)
    assert compiled.kept is None
    assert compiled.path.read_text() == "whole"
    assert "for this process alone" in caplog.text


def test_a_write_that_fails_costs_the_cache_alone(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "sync", full)
    compiled = cache.native(kept)
    assert compiled.path.read_text() == "whole"
    assert (compiled.kept, list(kept.iterdir())) == (None, [])
    assert f"{kept}: No space left on device; the CPU kernels are compiled for this process alone" in caplog.text


def test_without_a_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_KERNELS", "native")
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(build.KernelsUnavailable, match="install g"):
        cache.native(tmp_path)
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(build.KernelsUnavailable, match="no such option"):
        cache.native(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache.directory() == tmp_path / "cache" / "weft" / "kernels"
    loaded = library.load.__wrapped__()
    assert loaded.functions is None
    assert "no such option" in loaded.reason


def test_a_kind_of_kernels_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_KERNELS", "fast")
    loaded = library.load.__wrapped__()
    assert loaded.functions is None
    assert loaded.reason == "WEFT_KERNELS: may be 'native' (compile here) or unset, given 'fast'"
