"""Named points at which a test may stop the store: WEFT_FAILPOINT="name=action" or "name=action:n".

The action (kill, raise, enospc or eio) happens at the n-th time the point is reached, n from 1, once per process. The
variable is read at import; without it `hit` is an empty function. Every name below is reached by the crash tests.
"""

import errno
import os
import signal

NAMES = frozenset(
    {
        "after_stage_mkdir",  # an empty staging directory exists and is owned
        "after_tmp_open",  # an empty file exists in staging/
        "mid_write",  # some bytes of it were written
        "before_fsync",
        "after_fsync",
        "before_version",  # everything is staged and checked, nothing is visible
        "before_rename",
        "after_rename",
        "before_dirsync",
        "before_manifest",  # the version is in place, no manifest names it
        "after_manifest_before_ack",
        "before_remove",
        "after_remove",  # the manifest is gone, not yet surely
        "before_gc_unlink",  # an unreferenced version was moved to staging/
        "after_gc_unlink",
        "before_sweep",  # recovery is about to take one orphan away
        "after_sweep",
    }
)


class FailpointError(RuntimeError):
    """What the action `raise` raises: a bug of ours, in the middle of the store."""


def _armed(spec: str) -> tuple[str, str, int]:
    name, _, action_and_count = spec.partition("=")
    action, _, count = action_and_count.partition(":")
    if name not in NAMES or action not in {"kill", "raise", "enospc", "eio"}:
        raise ValueError(f"WEFT_FAILPOINT must be name=kill|raise|enospc|eio[:n], given {spec!r}")
    return name, action, int(count or 1)


def _act(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise FailpointError(name)
    number = errno.ENOSPC if action == "enospc" else errno.EIO
    raise OSError(number, os.strerror(number))


if spec := os.environ.get("WEFT_FAILPOINT"):
    _name, _action, _left = _armed(spec)

    def hit(name: str) -> None:
        """Act if `name` is the armed point and this is its hour."""
        global _left
        if name == _name:
            _left -= 1
            if _left == 0:
                _act(name, _action)

else:

    def hit(name: str) -> None:
        """Nothing: no failpoint is armed."""
