"""Runs that are killed, that diverge, that run out of disk, and that two processes share."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weft.config import ModelConfig
from weft.methods.bottleneck.math import BottleneckConfig
from weft.methods.checkpoint import directory
from weft.methods.lora.math import LoraConfig
from weft_training import checkpoint
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.history import Diverged
from weft_training.progress import Step
from weft_training.run import TrainResult
from weft_training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("abc", "dragon", "loom", "weave", "threads", "hi", "warp", "weft")
EXAMPLES = [Example(f"{word} = ", word[::-1]) for word in WORDS]
ROWS = "".join(f'{{"prompt": "{word} = ", "completion": "{word[::-1]}"}}\n' for word in WORDS)
NUM_STEPS = 12


def config_of(tiny_base: Path, output: Path, **changes: object) -> TrainConfig:
    knobs: dict[str, object] = {
        "model": ModelConfig(path=tiny_base, device="cpu", num_threads=1),
        "adapter": LoraConfig(rank=4),
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "learning_rate": 1e-2,
        **changes,
    }
    return TrainConfig(output=output, **knobs)  # pyright: ignore


def command(tiny_base: Path, rows: Path, output: Path, *more: str) -> list[str]:
    line = (
        f"-m weft_training --base {tiny_base} --method lora --rank 4 --data {rows} --output {output} --num-threads 1 "
        f"--device cpu --steps {NUM_STEPS} --batch-size 4 --lr 1e-2"
    )
    return [sys.executable, *line.split(), *more]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    return path


def weights(path: Path) -> bytes:
    """The file, so that equal adapters are one digest."""
    return (path / directory.WEIGHTS_FILE).read_bytes()


# --- a kill ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """SIGKILL of the real process once two checkpoints are whole; with evaluation, so that the best one is kept too."""
    more = ["--checkpoint-every", "2", "--evaluation-share", "0.25", "--evaluate-every", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(tiny_base, rows, whole, *more), check=True, timeout=120, capture_output=True)

    checkpoints = checkpoint.directory_of(killed)
    # Steps of a tiny base are too quick for a test, so the process is stopped before it is inspected.
    child = subprocess.Popen(
        command(tiny_base, rows, killed, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while len(list(checkpoints.glob("checkpoint-*/run.json"))) < 2:
        assert time.monotonic() < deadline
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    assert not killed.exists()
    steps = sorted(int(path.parent.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*/run.json"))
    assert steps
    assert steps[-1] < NUM_STEPS

    refused = subprocess.run(command(tiny_base, rows, killed, *more), capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert "holds a run that did not end" in refused.stderr
    other = subprocess.run(
        command(tiny_base, rows, killed, *more, "--resume", "--seed", "1"), capture_output=True, text=True, timeout=120
    )
    assert "is of a run with another recipe, data or base" in other.stderr

    subprocess.run(command(tiny_base, rows, killed, *more, "--resume"), check=True, timeout=120, capture_output=True)
    assert weights(killed) == weights(whole)
    assert not checkpoints.exists()
    told = [(path / "README.md").read_text().split("training loss")[1].split(" steps")[0] for path in (whole, killed)]
    assert told[0] == told[1]  # the history too


class Stop(Exception):
    pass


def stopped(tiny_base: Path, output: Path, at: int, **changes: object) -> None:
    def stop(step: Step) -> None:
        if step.number == at:
            raise Stop

    with pytest.raises(Stop):
        train(config_of(tiny_base, output, checkpoint_every=2, **changes), examples=EXAMPLES, progress=stop)


def test_a_half_written_checkpoint_is_not_resumed_from(tiny_base: Path, tmp_path: Path) -> None:
    whole = train(config_of(tiny_base, tmp_path / "whole"), examples=EXAMPLES)
    output = tmp_path / "out"
    stopped(tiny_base, output, at=7)
    newest = checkpoint.directory_of(output) / "checkpoint-6"
    (newest / "run.json").unlink()  # as a kill leaves it
    (newest / "optimizer.pt").write_bytes(b"half")

    heard: list[int] = []
    config = config_of(tiny_base, output, checkpoint_every=2, resume=True)
    result = train(config, examples=EXAMPLES, progress=lambda step: heard.append(step.number))
    assert heard[0] == 5
    assert weights(output) == weights(whole.output)
    assert result.losses == whole.losses


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw_8bit", "adapter": LoraConfig(rank=64, target_modules=("q_proj",))},
        {"adapter": LoraConfig(rank=4, dropout=0.2), "accumulation_steps": 2},
        {"adapter": BottleneckConfig(dropout=0.2)},
    ],
    ids=["moments in 8 bits", "dropout", "dropout of a bottleneck"],
)
def test_what_else_a_run_keeps_is_resumed_bit_for_bit(
    tiny_base: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    whole = train(config_of(tiny_base, tmp_path / "whole", **changes), examples=EXAMPLES)
    stopped(tiny_base, tmp_path / "out", at=7, **changes)
    resumed = train(
        config_of(tiny_base, tmp_path / "out", checkpoint_every=2, resume=True, **changes), examples=EXAMPLES
    )
    assert resumed.losses == whole.losses
    assert weights(resumed.output) == weights(whole.output)


def test_resume_without_a_checkpoint_starts(tiny_base: Path, tmp_path: Path) -> None:
    result = train(config_of(tiny_base, tmp_path / "out", checkpoint_every=2, resume=True), examples=EXAMPLES)
    assert len(result.losses) == NUM_STEPS


# --- what fails publishes nothing -----------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Diverged, match=r"step \d+: (loss|grad_norm) must be finite, given nan"):
        train(config_of(tiny_base, output, learning_rate=1e30, gradient_norm_max=1e30), examples=EXAMPLES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_leaves_the_old_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """A limit on the size of files, set after the rehearsal, takes the place of a full disk."""
    output = tmp_path / "out"
    train(config_of(tiny_base, output, num_steps=1), examples=EXAMPLES)
    before = weights(output)
    program = f"""
        import resource, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        from tests.training.test_resume import EXAMPLES, config_of
        from weft_training.trainer import train

        def fill(step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

        try:
            train(config_of(Path({str(tiny_base)!r}), Path({str(output)!r}), overwrite=True), examples=EXAMPLES,
                  progress=fill)
        except OSError as error:
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert "refused: output: " in done.stdout, done.stderr
    assert "could not be written" in done.stdout
    assert weights(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])  # the result's two files
def test_a_kill_while_the_result_is_written_leaves_the_old_adapter(tiny_base: Path, tmp_path: Path, at: int) -> None:
    output = tmp_path / "out"
    train(config_of(tiny_base, output, num_steps=1), examples=EXAMPLES)
    before = weights(output)
    program = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        from tests.training.test_resume import EXAMPLES, config_of
        from weft_training import checkpoint
        from weft_training.trainer import train

        fsync, left = os.fsync, []

        def die(descriptor):
            fsync(descriptor)
            left.pop()
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        def arm(step):
            if step.number == step.num_steps:
                left[:] = [None] * {at}
                os.fsync = die

        train(config_of(Path({str(tiny_base)!r}), Path({str(output)!r}), overwrite=True), examples=EXAMPLES,
              progress=arm)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert weights(output) == before


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_best_step_is_kept_and_training_stops_early(tiny_base: Path, tmp_path: Path) -> None:
    """Rows learned by heart, evaluated on rows that contradict them: the evaluation loss rises from the start."""
    contrary = tmp_path / "contrary.jsonl"
    contrary.write_text("".join(f'{{"prompt": "{word} = ", "completion": "no!"}}\n' for word in WORDS))
    agreeing = [Example(f"{word} = ", "yes") for word in WORDS]
    changes = {"evaluation_data": (contrary,), "evaluate_every": 5, "num_steps": 200, "learning_rate": 3e-2}
    result = train(config_of(tiny_base, tmp_path / "early", patience=2, **changes), examples=agreeing)
    losses = result.evaluations
    assert losses[result.best_step] == min(losses.values())
    assert max(losses) == result.best_step + 10  # two evaluations later
    assert len(result.losses) == max(losses) < 200

    again = train(
        config_of(tiny_base, tmp_path / "best", **{**changes, "num_steps": 200, "patience": 1}), examples=agreeing
    )
    assert again.best_step == result.best_step
    assert weights(again.output) == weights(result.output)  # one more evaluation did not change the kept step


def close(one: TrainResult | Path, other: TrainResult | Path) -> float:
    paths = [path.output if isinstance(path, TrainResult) else path for path in (one, other)]
    found, wanted = (load_file(path / directory.WEIGHTS_FILE) for path in paths)
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def test_accumulation_and_recomputation_change_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """In float32; SGD-like sameness is not to be had from Adam near zero gradients, so a few steps and a tolerance."""
    model = ModelConfig(path=tiny_base, device="cpu", dtype="float32")
    made = {
        name: train(config_of(tiny_base, tmp_path / name, model=model, num_steps=4, **changes), examples=EXAMPLES)
        for name, changes in {
            "plain": {},
            "parts": {"accumulation_steps": 4},
            "again": {"gradient_checkpointing": True},
            "other": {"seed": 1},
        }.items()
    }
    assert close(made["parts"], made["plain"]) < 1e-4
    assert close(made["again"], made["plain"]) < 1e-6
    assert close(made["other"], made["plain"]) > 1e-2  # the control


def test_autocast_trains_close_to_float32(tiny_base: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=tiny_base, device="cpu", dtype="float32")
    plain, cast = (
        train(config_of(tiny_base, tmp_path / str(cast), model=model, autocast=cast), examples=EXAMPLES)
        for cast in (False, True)
    )
    assert plain.losses != cast.losses  # it does something
    torch.testing.assert_close(torch.tensor(cast.losses), torch.tensor(plain.losses), atol=0.1, rtol=0)


def test_schedules_and_tensorboard(tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from weft_training.config import Schedule

    rates = {}
    for schedule in Schedule:
        config = config_of(
            tiny_base, tmp_path / schedule, num_steps=4, schedule=schedule, tensorboard=tmp_path / f"tb-{schedule}"
        )
        result = train(config, examples=EXAMPLES)
        events = EventAccumulator(str(tmp_path / f"tb-{schedule}"))
        events.Reload()
        rates[schedule] = [round(event.value, 5) for event in events.Scalars("learning_rate")]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.losses)
    assert rates[Schedule.CONSTANT] == [0.01] * 4
    assert rates[Schedule.LINEAR] == [0.01, 0.0075, 0.005, 0.0025]
    assert rates[Schedule.COSINE] == [0.01, 0.00854, 0.005, 0.00146]


# --- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    more = ["--dtype", "float32", "--steps", "4"]
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    subprocess.run(command(tiny_base, rows, one, *more), check=True, timeout=120, capture_output=True)
    subprocess.run(command(tiny_base, rows, other, *more, "--seed", "1"), check=True, timeout=120, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    plain = [*f"{launch} --mixed_precision no --dynamo_backend no".split(), *command(tiny_base, rows, two, *more)[1:]]
    done = subprocess.run(
        [sys.executable, *plain],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" parameters, loss ") == 1  # only the first process reports
    assert close(two, one) < 1e-4
    assert close(other, one) > 1e-2  # the control
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "rows.jsonl", "two"]
