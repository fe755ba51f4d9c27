"""Named points at which a test may stop the store: WEFT_FAILPOINT="name=action" or "name=action:n".

The action (kill, raise, enospc or eio) happens the n-th time that the point is reached, counting from 1, once per
process. The variable is read at import; without it, `hit` is an empty function. The crash tests reach every name below.
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
        "after_change_begun",  # the log of changes says that an id changes, and nothing has
        "before_change_ended",  # the change is done, and the log does not say so
        "before_rename",
        "after_rename",
        "before_dirsync",
        "before_manifest",  # the version is in place, no manifest names it
        "after_manifest_before_ack",
        "before_remove",
        "after_remove",  # the manifest is gone, but not yet durably
        "before_gc_unlink",  # an unreferenced version was moved to staging/
        "after_gc_unlink",
        "before_sweep",  # recovery is about to remove one orphan
        "after_sweep",
    }
)


class FailpointError(RuntimeError):
    """Raised by the action `raise`, to simulate a bug of ours in the middle of the store."""


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
        """Act if `name` is the armed point and has now been reached n times."""
        global _left
        if name == _name:
            _left -= 1
            if _left == 0:
                _act(name, _action)

else:

    def hit(name: str) -> None:
        """Do nothing, since no failpoint is armed."""
