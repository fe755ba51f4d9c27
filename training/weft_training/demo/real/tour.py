"""`weft demo --real`: realistic adapters on a small language model. Exit code 0 only if every step was right.

A real server process on loopback holds SmolLM2-135M-Instruct. Three adapters come from the repository, and one is
trained live. All requests go over gRPC, with texts that no adapter has seen.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.client import Client
from weft_training.demo.answering import Ask, Target, answers
from weft_training.demo.real import model
from weft_training.demo.real.adapters import LIVE, MIXTURE, train_recipe
from weft_training.demo.real.task import RealTask, asked, score
from weft_training.demo.real.tasks import TASKS
from weft_training.demo.server import Server, require, serving, step
from weft_training.demo.tasks import Example, Split
from weft_training.progress import ProgressBar

_NUM_ASKED = 8
_EVALUATION_SEED = 7
_F1_MIN = 0.5  # over so few texts
_WIDTH = 96


def show(console: Console, adapters: Path) -> None:
    """Run every step. Raises DemoFailure, RpcFailure or OSError at the first that fails."""
    with (
        tempfile.TemporaryDirectory(prefix="weft-demo-") as scratch,
        serving(console, model.path(), [adapters], Path(scratch)) as server,
    ):
        with Client(server.address) as client:
            info = client.model_info()
            console.print(
                f"one base: [bold]{info.model_name}[/bold], {info.quantization} on {info.device}, "
                f"{info.num_layers} layers"
            )
            step(console, "Register adapters by RPC")
            for name in (*TASKS, MIXTURE):
                registered = client.register(name, str((adapters / name).resolve())).adapter
                console.print(f"  {name}: {registered.method}")
        _one_batch(console, server)
        _compose(console, server)
        _mix(console, server)
        _train_live(console, server, Path(scratch, "live"))


def _unseen(task: RealTask, count: int) -> list[Example]:
    return task.examples(count, _EVALUATION_SEED, Split.TEST)


def _ask(server: Server, asks: Sequence[tuple[RealTask, Example, Target]]) -> list[str]:
    """Return the answers of the adapters: a name, weights by name, or None for the base."""
    return answers(server.address, [Ask(asked(one.input), to, task.max_new_tokens) for task, one, to in asks])


def _one_batch(console: Console, server: Server) -> None:
    """Run all adapters and the base in one batch."""
    step(console, "One batch: each adapter asked for its own task, and the base for all of them")
    asks = [(task, one, to) for task in TASKS.values() for one in _unseen(task, _NUM_ASKED) for to in (task.name, None)]
    began = time.monotonic()
    given = _ask(server, asks)
    seconds = time.monotonic() - began
    for task in TASKS.values():
        own = [(one, answer, to) for (of, one, to), answer in zip(asks, given, strict=True) if of is task]
        adapted = [(one, answer) for one, answer, to in own if to]
        plain = [(one, answer) for one, answer, to in own if not to]
        by_adapter, by_base = (score(task, *zip(*pairs, strict=True)) for pairs in (adapted, plain))
        one, answer = adapted[0]
        console.print(f"  [bold]{task.description}[/bold]")
        console.print(_exchange(one.input, answer, plain[0][1]))
        console.print(
            f"    with its adapter {by_adapter.exact:.0%} exact, fields' F1 {by_adapter.f1:.2f}; "
            f"without {by_base.exact:.0%}, {by_base.f1:.2f}"
        )
        require(by_adapter.f1 >= _F1_MIN, f"the adapter {task.name} answers its task")
        require(by_base.f1 < by_adapter.f1, "the base alone does less")
    console.print(f"  {len(asks)} requests in {seconds:.1f} s")


def _compose(console: Console, server: Server) -> None:
    """Compose two adapters in one request, with weights: each text decides which of them answers."""
    step(console, "Compose two adapters in one request: 0.5 · ticket + 0.5 · figure, and both at 1")
    for weight in (0.5, 1.0):
        weights = {"ticket": weight, "figure": weight}
        parts = []
        for name in weights:
            task = TASKS[name]
            examples = _unseen(task, _NUM_ASKED)
            found = score(task, examples, _ask(server, [(task, one, weights) for one in examples]))
            parts.append(f"{name} {found.exact:.0%} exact, F1 {found.f1:.2f}")
        console.print(f"  {weight:g} each: " + "; ".join(parts))


def _mix(console: Console, server: Server) -> None:
    """Use one id for all three: a router reads each text once and weighs the adapters."""
    step(console, f"One mixture over the three: its router picks the right one (adapter id {MIXTURE!r})")
    for task in TASKS.values():
        examples = _unseen(task, _NUM_ASKED)
        found = score(task, examples, _ask(server, [(task, one, MIXTURE) for one in examples]))
        console.print(f"  {task.name}: {found.exact:.0%} exact, F1 {found.f1:.2f}")


def _train_live(console: Console, server: Server, output: Path) -> None:
    """Train on the same base, upload while the server runs, and see the answers change."""
    step(console, f"Train a new adapter and hot-register it: {LIVE.task.description}")
    examples = _unseen(LIVE.task, 3 * _NUM_ASKED)
    before = _ask(server, [(LIVE.task, one, None) for one in examples])
    with ProgressBar(console, f"training {LIVE.task.name}") as bar:
        trained = train_recipe(LIVE, output, progress=bar)
    with Client(server.address) as client:
        client.upload("live", output)
    after = _ask(server, [(LIVE.task, one, "live") for one in examples])
    found = [score(LIVE.task, examples, given) for given in (before, after)]
    console.print(_exchange(examples[0].input, after[0], before[0]))
    console.print(
        f"    {trained.num_parameters:,} parameters in {trained.seconds:.0f} s; before {found[0].exact:.0%} exact, "
        f"F1 {found[0].f1:.2f}; after {found[1].exact:.0%}, {found[1].f1:.2f}"
    )
    require(found[1].f1 >= _F1_MIN, "the new adapter answers its task")
    require(found[0].f1 < found[1].f1, "the base did less")


def _exchange(text: str, answer: str, without: str) -> Table:
    """Return a table of a text, an adapter's answer to it, and the base's."""
    shown = Table.grid(padding=(0, 1))
    for role, said in (("text", text), ("adapter", answer), ("base", without)):
        line = " ".join(said.split())
        cut = line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
        shown.add_row(f"    [dim]{role}[/dim]", Text(cut, no_wrap=True))  # no markup: a route stands in brackets
    return shown
