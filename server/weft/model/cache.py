"""Directories in the user's cache that take long to make: each is made once, and exists only when complete.

.lock                 held while .making-* are created, removed or renamed
.making-TOKEN/        being made; worthless when its maker is gone
.making-TOKEN.lock    locked as long as its maker lives
NAME/                 complete and durable
"""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from weft import durable

_IN_THE_MAKING = ".making-"
_LOCK_TIMEOUT_S = 30.0


def directory(
    root: Path, name: str, make: Callable[[Path], None], *, is_complete: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Return directory `name` of `root`; unless it is there and complete, `make` first fills an empty one.

    Leftovers of killed makers are removed first. Raises what `make` raises, and OSError of the cache's own files.
    """
    target = root / name
    if is_complete(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    made = root / f"{_IN_THE_MAKING}{secrets.token_hex(8)}"
    owner_path = _owner_path(made)
    with _alone(root):
        _sweep(root)
        owner_fd = durable.create_locked(owner_path)
    try:
        made.mkdir()
        make(made)
        _make_durable(made)
        with _alone(root):
            if is_complete(target):  # another process was first, with the same content
                return target
            shutil.rmtree(target, ignore_errors=True)
            durable.publish(made, target)
        return target
    finally:
        shutil.rmtree(made, ignore_errors=True)
        owner_path.unlink(missing_ok=True)
        durable.release(owner_fd)


def _alone(root: Path) -> AbstractContextManager[None]:
    return durable.locked(root / ".lock", timeout_s=_LOCK_TIMEOUT_S)


def _sweep(root: Path) -> None:
    """Remove the leftovers of processes that are gone."""
    for path in sorted(root.glob(f"{_IN_THE_MAKING}*")):
        owner_path = _owner_path(path)
        try:
            if durable.is_locked(owner_path):
                continue
        except FileNotFoundError:
            pass  # of a version that locked nothing, or its owner is just removing it
        if path == owner_path:
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _owner_path(making: Path) -> Path:
    return making if making.suffix == ".lock" else making.with_name(f"{making.name}.lock")


def _make_durable(made: Path) -> None:
    for parent, _, names in os.walk(made):
        for name in names:
            durable.sync_file(Path(parent, name))
        durable.sync_directory(Path(parent))
