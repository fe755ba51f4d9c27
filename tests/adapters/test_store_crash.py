"""Crashes and failing disks: acknowledged changes survive, every entry is whole, and nothing else stays.

This file is also the program that gets killed: run as a script, it forks one worker per command line, lets it work on a
store, and kills it (or lets it kill itself at a failpoint). A worker logs the operations that it begins and those that
were acknowledged; from that log `Ledger` derives the allowed contents of the store. WEFT_CRASH_KILLS sets the number of
kills at random times.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from weft import failpoints
from weft.adapters.catalog import Manifest, manifest_path
from weft.adapters.catalog_index import CatalogIndex
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.store import AdapterStore
from weft.adapters.versions import FileDigest, StoredVersion, digest_of
from weft.config import AdapterLimits
from weft.errors import AdapterNotFound, Code, DataLoss, Overloaded, WeftError
from weft.v1.adapter_files import PEFT_FILES

CONFIG, WEIGHTS = PEFT_FILES
LIMITS = AdapterLimits(file_bytes_max=100_000, config_bytes_max=1000)
NUM_SEEDS = 5
NUM_RANDOM_KILLS = int(os.environ.get("WEFT_CRASH_KILLS", "60"))
OPERATIONS_MIN_PER_KILL = 0.5  # on average; below it the kills hit nothing and the run is void


def content(seed: int) -> dict[str, bytes]:
    return {CONFIG: json.dumps({"seed": seed}).encode(), WEIGHTS: f"weights of {seed} ".encode() * 300}


def digest(seed: int) -> AdapterDigest:
    return digest_of(
        FileDigest(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content(seed).items()
    )


DIGESTS = {digest(seed): seed for seed in range(NUM_SEEDS)}


def commit(store: AdapterStore, adapter_id: str, seed: int) -> Manifest:
    with store.stage() as staging:
        for name, data in content(seed).items():
            with staging.open_file(name) as file:
                for at in range(0, len(data), 2000):
                    file.write(data[at : at + 2000])
        return store.commit(staging.seal(), adapter_id=AdapterId(adapter_id), method="lora", replace=True)


def commit_copy(store: AdapterStore, adapter_id: str, seed: int) -> Manifest:
    with store.stage_copy(f"demo/{seed}") as staging:
        return store.commit(staging.seal(), adapter_id=AdapterId(adapter_id), method="lora", replace=True)


def read(version: StoredVersion) -> dict[str, bytes]:
    with version:
        return {name: file.read() for name, file in version.files.items()}


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name not in (".lock", ".changes"))


# The program that gets killed


class InPlaceStore(AdapterStore):
    """A control: the manifest is written in place."""

    def _replace_manifest(self, manifest: Manifest) -> None:
        data = manifest.encode()
        with manifest_path(self._catalog, manifest.adapter_id).open("wb", buffering=0) as file:
            file.write(data[:100])
            failpoints.hit("mid_write")
            file.write(data[100:])


class ForgetfulStore(AdapterStore):
    """A control: a commit is acknowledged before anything of it is visible."""

    def _replace_manifest(self, manifest: Manifest) -> None:
        os.write(LOG_FD, b"ack\n")
        super()._replace_manifest(manifest)


class SilentStore(AdapterStore):
    """A control: changes are logged after the fact, without a beginning."""

    @contextlib.contextmanager
    def _changed(self, adapter_id: AdapterId) -> Iterator[None]:
        stat = os.stat(self._catalog)
        yield
        os.utime(self._catalog, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as on a file system with coarse times
        failpoints.hit("before_change_ended")
        with super()._changed(adapter_id):
            pass


VARIANTS = {"real": AdapterStore, "in place": InPlaceStore, "forgetful": ForgetfulStore, "silent": SilentStore}
LOG_FD, READY_FD = 1000, 1001


def work(root: Path, worker: int, seed: int, num_operations: int, variant: str) -> None:
    """Begin with a recovery, then do random operations on the worker's own ids, logging each before and after."""
    store, dice = VARIANTS[variant](root, LIMITS), random.Random(seed)
    store.recover()
    os.write(READY_FD, b"x")
    for _ in range(num_operations):
        operation = dice.choice(["commit", "commit", "commit", "copy", "remove", "pin", "collect", "collect"])
        adapter_id, content_seed = f"w{worker}{dice.choice('ab')}", dice.randrange(NUM_SEEDS)
        wanted = {"commit": content_seed, "copy": content_seed, "remove": None}.get(operation, "same")
        os.write(LOG_FD, json.dumps(["begin", operation, adapter_id, wanted]).encode() + b"\n")
        try:
            match operation:
                case "commit":
                    commit(store, adapter_id, content_seed)
                case "copy":
                    commit_copy(store, adapter_id, content_seed)
                case "remove":
                    store.remove(AdapterId(adapter_id))
                case "pin":
                    store.set_pinned(AdapterId(adapter_id), dice.random() < 0.5)
                case "collect":
                    store.collect(*DIGESTS)
        except AdapterNotFound:
            pass
        except (WeftError, failpoints.FailpointError):
            continue
        os.write(LOG_FD, b"ack\n")


def forked(command: dict[str, object], worker: int, ready_fd: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.environ["WEFT_FAILPOINT"] = str(command["failpoint"])
        importlib.reload(failpoints)
        log = os.open(f"{command['log']}{worker}", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, LOG_FD)
        os.dup2(ready_fd, READY_FD)
        os.close(ready_fd)
        seed = int(str(command["seed"])) * 100 + worker
        work(Path(str(command["root"])), worker, seed, int(str(command["operations"])), str(command["variant"]))
        status = 0
    finally:
        os._exit(status)


def serve() -> None:
    """Read commands from stdin, one per line; print the exit statuses of the workers."""
    for line in sys.stdin:
        command = json.loads(line)
        waiting_fd, ready_fd = os.pipe()
        pids = [forked(command, worker, ready_fd) for worker in range(command["workers"])]
        os.close(ready_fd)
        if command["wait"]:
            for _ in pids:
                os.read(waiting_fd, 1)
        os.close(waiting_fd)
        started = time.monotonic()
        for pid, kill_after_s in zip(pids, command["kill_after_s"], strict=False):
            time.sleep(max(0.0, started + kill_after_s - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


# The judge


class Findings(NamedTuple):
    """The faults of one or more crashes; the first four must be 0. num_unseen: changes that a follower missed."""

    num_torn: int = 0
    num_lost: int = 0
    num_orphans: int = 0
    num_unseen: int = 0
    num_crashes: int = 0
    num_operations: int = 0
    num_swept: int = 0
    recovery_ms_max: float = 0.0

    def __add__(self, other: "Findings") -> "Findings":  # pyright: ignore[reportIncompatibleMethodOverride]
        sums = (mine + theirs for mine, theirs in zip(self[:-1], other[:-1], strict=True))
        return Findings(*sums, recovery_ms_max=max(self.recovery_ms_max, other.recovery_ms_max))

    @property
    def bad(self) -> tuple[int, int, int, int]:
        return self[:4]


class Ledger:
    """The possible contents of each id, from the workers' logs: None is unbound, a number the content's seed."""

    def __init__(self) -> None:
        self.possible: dict[str, set[int | None]] = {}
        self.num_operations = 0

    def read(self, log: Path) -> None:
        begun: tuple[str, int | str | None] | None = None
        for line in log.read_text().splitlines():
            if line == "ack":
                if begun is not None and begun[1] != "same":
                    self.possible[begun[0]] = {begun[1] if isinstance(begun[1], int) else None}
                self.num_operations += 1
                begun = None
            else:
                _, _, adapter_id, wanted = json.loads(line)
                begun = (adapter_id, wanted)
                if wanted != "same":
                    self.possible.setdefault(adapter_id, {None}).add(wanted)

    def judge(self, root: Path, follower: CatalogIndex, num_crashes: int) -> Findings:
        """Restart after the crash, and compare. Afterwards the ledger is certain again.

        follower: the catalog's index in a process that lives on.
        """
        follower.refresh()
        store = AdapterStore(root, LIMITS)
        started = time.perf_counter()
        recovery = store.recover()
        recovery_ms = 1000 * (time.perf_counter() - started)
        num_torn, num_lost = len(recovery.problems), 0
        for adapter_id, possible in self.possible.items():
            manifest = recovery.manifests.get(AdapterId(adapter_id))
            found = None if manifest is None else DIGESTS[manifest.digest]
            num_lost += found not in possible
            self.possible[adapter_id] = {found}
        for manifest in recovery.manifests.values():
            try:
                num_torn += read(store.open_version(manifest.digest)) != content(DIGESTS[manifest.digest])
            except DataLoss:
                num_torn += 1
        named = {manifest.digest for manifest in recovery.manifests.values()}
        followed = follower.catalog().manifests
        num_unseen = sum(
            followed.get(adapter_id) != recovery.manifests.get(adapter_id)
            for adapter_id in {*followed, *recovery.manifests}
        )
        orphans = [*names(root / "staging"), *(set(names(root / "versions")) - named)]
        num_operations, self.num_operations = self.num_operations, 0
        return Findings(
            num_torn,
            num_lost,
            len(orphans),
            num_unseen,
            num_crashes,
            num_operations,
            recovery.num_orphans_removed,
            recovery_ms,
        )


class Arena:
    """A store, the program that works on it, and its ledger."""

    def __init__(self, root: Path, program: "subprocess.Popen[str]") -> None:
        self.root = root / "store"
        self._log = root / "log"
        self._program = program
        self._seed = 0
        self.ledger = Ledger()
        for seed in range(NUM_SEEDS):
            directory = self.root / "demo" / str(seed)
            directory.mkdir(parents=True)
            for name, data in content(seed).items():
                (directory / name).write_bytes(data)
        store = AdapterStore(self.root, LIMITS)
        store.recover()
        started = time.monotonic()
        for seed in range(3):
            commit(store, "pace", seed)
        self.commit_s = (time.monotonic() - started) / 3
        store.remove(AdapterId("pace"))
        self.follower = store.index

    def leave_something_behind(self) -> None:
        """Leave something to sweep, even before the first crash."""
        (self.root / "staging" / "leftover").mkdir(exist_ok=True)
        (self.root / "staging" / "leftover" / WEIGHTS).write_bytes(b"x")

    def crash(
        self,
        failpoint: str = "",
        kill_after_s: tuple[float, ...] = (),
        *,
        operations: int = 12,
        workers: int = 1,
        variant: str = "real",
        wait: bool = False,
    ) -> tuple[list[int], Findings]:
        """One run of the workers; their exit statuses, and what was found afterwards.

        With `wait` the times count from when every worker has recovered, not from its birth.
        """
        self._seed += 1
        command = {
            "root": str(self.root),
            "log": str(self._log),
            "failpoint": failpoint,
            "kill_after_s": kill_after_s,
            "operations": operations,
            "workers": workers,
            "variant": variant,
            "wait": wait,
            "seed": self._seed,
        }
        for worker in range(workers):
            Path(f"{self._log}{worker}").write_bytes(b"")
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(command) + "\n")
        self._program.stdin.flush()
        statuses = json.loads(self._program.stdout.readline())
        for worker in range(workers):
            self.ledger.read(Path(f"{self._log}{worker}"))
        return statuses, self.ledger.judge(
            self.root, self.follower, sum(status == -signal.SIGKILL for status in statuses)
        )


@pytest.fixture(scope="module")
def program() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        yield running
        assert running.stdin is not None
        running.stdin.close()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a directory in memory if possible: kill -9 loses no data that the kernel has, so fsync is only slow."""
    directory = Path(tempfile.mkdtemp(prefix="weft-crash-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def arena(scratch: Path, program: "subprocess.Popen[str]") -> Arena:
    return Arena(scratch, program)


def reported(findings: Findings, what: str, record: Callable[[str, object], None]) -> None:
    for name, value in findings._asdict().items():
        record(f"{what}.{name}", value)
    print(f"{what}: {findings}")


def test_every_failpoint_in_the_code_is_listed() -> None:
    source = Path(failpoints.__file__).parent
    reached = set(re.findall(r'failpoints\.hit\("(\w+)"\)', "".join(p.read_text() for p in source.rglob("*.py"))))
    assert reached == failpoints.NAMES


@pytest.mark.parametrize("spec", ["nowhere=kill", "before_fsync", "before_fsync=sleep", "before_fsync=kill:x"])
def test_a_wrong_failpoint_stops_the_start(spec: str) -> None:
    command = [sys.executable, "-c", "import weft.failpoints"]
    finished = subprocess.run(command, env={**os.environ, "WEFT_FAILPOINT": spec}, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "ValueError" in finished.stderr


def test_kill_at_every_failpoint(arena: Arena, record_property: Callable[[str, object], None]) -> None:
    total = Findings()
    for name in sorted(failpoints.NAMES):
        for count in (1, 2, 3, 6):
            arena.leave_something_behind()
            statuses, findings = arena.crash(f"{name}=kill:{count}", operations=30)
            assert findings.bad == (0, 0, 0, 0), (name, count, findings)
            assert statuses in ([-signal.SIGKILL], [0])
            if count == 1:
                assert statuses == [-signal.SIGKILL], f"{name} was never reached"
            total += findings
    reported(total, "failpoint kills", record_property)
    assert total.num_crashes > 2 * len(failpoints.NAMES)
    assert total.num_swept > total.num_crashes, "the kills left nothing behind: nothing was tested"


@pytest.mark.parametrize("action", ["raise", "enospc", "eio"])
def test_a_fault_at_every_failpoint(arena: Arena, action: str) -> None:
    total = Findings()
    for name in sorted(failpoints.NAMES - {"before_sweep", "after_sweep"}):
        for count in (1, 4):
            statuses, findings = arena.crash(f"{name}={action}:{count}", operations=8)
            assert statuses == [0], name
            assert findings.bad == (0, 0, 0, 0), (name, count, findings)
            total += findings
    assert total.num_operations > 100


def test_kill_at_random_times(arena: Arena, record_property: Callable[[str, object], None]) -> None:
    dice, total = random.Random(8_128), Findings()
    for number in range(NUM_RANDOM_KILLS):
        kill_after_s = dice.uniform(0.0, 0.01 + 12 * arena.commit_s)
        statuses, findings = arena.crash(kill_after_s=(kill_after_s,), operations=1_000_000, wait=number % 3 > 0)
        assert statuses == [-signal.SIGKILL]
        assert findings.bad == (0, 0, 0, 0), findings
        total += findings
    reported(total, "random kills", record_property)
    assert total.num_operations > OPERATIONS_MIN_PER_KILL * NUM_RANDOM_KILLS


def test_kill_one_of_two_processes_then_the_other(arena: Arena, record_property: Callable[[str, object], None]) -> None:
    """They share content, so that one collects what the other is about to bind."""
    dice, total = random.Random(33_550_336), Findings()
    for _ in range(max(1, NUM_RANDOM_KILLS // 3)):
        first = dice.uniform(0.0, 0.01 + 12 * arena.commit_s)
        second = first + dice.uniform(0.0, 0.01 + 12 * arena.commit_s)
        statuses, findings = arena.crash(kill_after_s=(first, second), operations=1_000_000, workers=2, wait=True)
        assert statuses == [-signal.SIGKILL] * 2
        assert findings.bad == (0, 0, 0, 0), findings
        total += findings
    reported(total, "two processes", record_property)
    assert total.num_operations > OPERATIONS_MIN_PER_KILL * NUM_RANDOM_KILLS // 3


def test_the_judge_sees_a_torn_manifest(arena: Arena) -> None:
    total = Findings()
    for count in range(1, 30):
        total += arena.crash(f"mid_write=kill:{count}", variant="in place")[1]
        if total.num_torn:
            return
    pytest.fail(f"writing in place was never caught: {total}")


def test_the_judge_sees_a_lost_acknowledgement(arena: Arena) -> None:
    total = Findings()
    for count in range(1, 10):
        total += arena.crash(f"before_rename=kill:{2 * count}", variant="forgetful")[1]
        if total.num_lost:
            return
    pytest.fail(f"an early acknowledgement was never caught: {total}")


def test_the_judge_sees_an_unseen_change(arena: Arena) -> None:
    total = Findings()
    for count in range(1, 10):
        total += arena.crash(f"before_change_ended=kill:{2 * count - 1}", variant="silent")[1]
        if total.num_unseen:
            return
    pytest.fail(f"a change that nothing announced was never caught: {total}")


# Failing disks


@pytest.fixture
def root(scratch: Path) -> Path:
    for name, data in content(3).items():
        (scratch / "demo" / "3").mkdir(parents=True, exist_ok=True)
        (scratch / "demo" / "3" / name).write_bytes(data)
    return scratch


@pytest.fixture
def store(root: Path) -> AdapterStore:
    opened = AdapterStore(root, LIMITS)
    opened.recover()
    return opened


def test_a_file_size_limit_is_a_full_store(store: AdapterStore, root: Path) -> None:
    """A refusal by the kernel (EFBIG), not an injected one."""
    kept = commit(store, "alpha", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Overloaded) as caught, store.stage() as staging, staging.open_file(WEIGHTS) as file:
            file.write(b"x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert names(root / "staging") == []
    assert store.recover() == ({"alpha": kept}, (), 0)
    commit(store, "beta", 2)


class FailingCalls:
    """Counts all calls to the operating system, and makes the n-th fail with `number`."""

    NAMES = (
        "open",
        "write",
        "fsync",
        "rename",
        "unlink",
        "rmdir",
        "mkdir",
        "listdir",
        "scandir",
        "stat",
        "fstat",
        "close",
    )

    def __init__(self, patch: pytest.MonkeyPatch, number: int, at: int) -> None:
        self.count = 0
        self.failed = ""
        for name in self.NAMES:
            patch.setattr(os, name, self._counted(name, getattr(os, name), number, at))
        real = fcntl.flock
        patch.setattr(fcntl, "flock", self._counted("flock", real, number, at))

    def _counted(self, name: str, real: Callable[..., object], number: int, at: int) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            self.count += 1
            if self.count == at:
                self.failed = " < ".join([name, *(frame.name for frame in traceback.extract_stack()[-2:-7:-1])])
                if name == "close":  # Linux closes the descriptor whatever it answers
                    real(*arguments, **options)
                raise OSError(number, os.strerror(number), "/secret/path")
            return real(*arguments, **options)

        return call


def workload(store: AdapterStore, told: dict[str, int | None]) -> None:
    """Make every call that changes something; `told` is the acknowledged state of each id."""
    told["alpha"] = DIGESTS[commit(store, "alpha", 1).digest]
    told["alpha"] = DIGESTS[commit(store, "alpha", 2).digest]
    told["beta"] = DIGESTS[commit_copy(store, "beta", 3).digest]
    told["gamma"] = DIGESTS[commit(store, "gamma", 2).digest]
    store.set_pinned(AdapterId("alpha"), True)
    store.remove(AdapterId("beta"))
    told["beta"] = None
    store.collect(*DIGESTS)


@pytest.mark.parametrize(
    ("number", "step", "reason"),
    [
        (errno.ENOSPC, 1, "STORE_FULL"),
        (errno.EIO, 1, "STORE_UNAVAILABLE"),
        (errno.EMFILE, 3, "STORE_UNAVAILABLE"),
        (errno.EROFS, 3, "STORE_UNAVAILABLE"),
    ],
)
def test_every_single_call_may_fail(
    store: AdapterStore, root: Path, record_property: Callable[[str, object], None], number: int, step: int, reason: str
) -> None:
    at, num_refused = 0, 0
    while True:
        at += step
        for name in ("catalog", "versions", "staging"):
            shutil.rmtree(root / name)
        store.recover()
        commit(store, "alpha", 0)
        told: dict[str, int | None] = {"alpha": 0, "beta": None, "gamma": None}
        num_descriptors = len(os.listdir("/proc/self/fd"))
        error: WeftError | None = None
        with pytest.MonkeyPatch.context() as patch:
            calls = FailingCalls(patch, number, at)
            try:
                workload(store, told)
            except WeftError as caught:
                error = caught
        if calls.count < at:
            break
        assert len(os.listdir("/proc/self/fd")) == num_descriptors, calls.failed
        if error is not None:
            num_refused += 1
            assert error.reason == reason
            assert "/secret" not in error.message + str(error.metadata)
        if not calls.failed.startswith(("unlink", "rmdir", "scandir")):  # what fails to clean up is left to recovery
            assert names(root / "staging") == [], calls.failed
        check(store, root, told, error)
        workload(store, {})  # it heals without a restart
    assert error is None
    assert at > 200
    assert num_refused > 0.5 * at / step
    record_property(f"calls failed with {errno.errorcode[number]}", f"{at // step}, refused {num_refused}")
    print(f"{errno.errorcode[number]}: {at // step} calls failed, {num_refused} of them told the caller")


def check(store: AdapterStore, root: Path, told: dict[str, int | None], error: WeftError | None) -> None:
    """Check that all is as acknowledged, but for the failed call with either outcome, and that nothing is left over."""
    manifests, problems = store.read_catalog()
    assert not problems
    found = {
        adapter_id: DIGESTS[manifests[AdapterId(adapter_id)].digest] if adapter_id in manifests else None
        for adapter_id in told
    }
    differing = {adapter_id for adapter_id in told if found[adapter_id] != told[adapter_id]}
    assert len(differing) <= (error is not None)
    for manifest in manifests.values():
        assert read(store.open_version(manifest.digest)) == content(DIGESTS[manifest.digest])
    recovery = store.recover()
    assert recovery.manifests == manifests
    assert recovery.problems == ()
    assert names(root / "staging") == []
    assert set(names(root / "versions")) == {manifest.digest for manifest in manifests.values()}


def test_what_is_acknowledged_was_fsynced_in_order(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 cannot show a missing fsync, so the order itself is the test."""
    log: list[str] = []

    def place(path: str | int | Path) -> str:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        relative = str(Path(path).relative_to(root))
        return re.sub(r"staging/[0-9a-f]{32}", "staging/T", relative).replace(digest(1), "G")

    def logged(name: str, num_paths: int) -> None:
        real = getattr(os, name)

        def call(*arguments: str | int | Path) -> object:
            log.append(" ".join([name, *map(place, arguments[:num_paths])]))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    for name, num_paths in [("write", 1), ("fsync", 1), ("rename", 2)]:
        logged(name, num_paths)
    commit(store, "alpha", 1)
    assert list(dict.fromkeys(log)) == [
        f"write staging/T/{CONFIG}",
        f"fsync staging/T/{CONFIG}",
        f"write staging/T/{WEIGHTS}",
        f"fsync staging/T/{WEIGHTS}",
        "fsync staging/T",
        "write catalog/.changes",
        "rename staging/T versions/G",
        "fsync versions",
        "write staging/T.json",
        "fsync staging/T.json",
        "rename staging/T.json catalog/alpha.json",
        "fsync catalog",
    ]
    log.clear()
    store.remove(AdapterId("alpha"))
    assert log == ["write catalog/.changes", "fsync catalog", "write catalog/.changes"]


if __name__ == "__main__":
    serve()
