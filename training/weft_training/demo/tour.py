"""`weft demo`: what Weft does, shown on the demo base in about a minute. Exit code 0 only if every step was right.

A real server process on loopback holds the NF4 base; all requests go over gRPC, as from any client.
"""

import argparse
import asyncio
import re
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weft.client import AsyncClient, Client, RpcFailure
from weft_training import shipped
from weft_training.demo import answering
from weft_training.demo.answering import Ask, Target
from weft_training.demo.document import insert
from weft_training.demo.server import DemoFailure, Server, require, serving, step
from weft_training.demo.styles import COMPOSITIONS
from weft_training.demo.tasks import TASKS, Example, Split, examples, prompt

_MARKER = "demo"
_DOCUMENT_WIDTH = 110
_REQUESTS_PER_ADAPTER = 4
_REQUESTS_TO_BASE = 8
_REQUESTS_PER_COMPOSITION = 20
_COMPOSED_RIGHT_SHARE_MIN = 0.6  # benchmarks/results/compositions.json has the share of a hundred
_RIGHT_SHARE_MIN = 0.8  # of a few prompts; the README has the share of two hundred
_METRICS_SHOWN = (
    "weft_requests_total",
    "weft_generation_tokens_total",
    "weft_adapters_registered",
    "weft_batch_distinct_adapters_sum",
    "weft_kv_cache_usage_ratio",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One request of the mixed batch and its answer."""

    adapter: str
    method: str
    example: Example
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.example.output


def main(arguments: Sequence[str] = ()) -> int:
    """Run the demo. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="weft demo", description=__doc__)
    parser.add_argument("--real", action="store_true", help="show it on SmolLM2-135M-Instruct instead (minutes)")
    parser.add_argument("--base", type=Path, default=shipped.BASE, help="base model directory (default: the demo base)")
    parser.add_argument(
        "--adapters", type=Path, default=shipped.ADAPTERS, help="PEFT directories (default: the demo's)"
    )
    parser.add_argument(
        "--markdown", type=Path, help=f"also write what is shown into this file, after <!-- {_MARKER} -->"
    )
    given = parser.parse_args(list(arguments))
    markdown: Path | None = given.markdown
    console = Console() if markdown is None else Console(record=True, width=_DOCUMENT_WIDTH)
    if given.real:
        return _run(console, lambda: _real_tour(console))
    if not (given.base / "config.json").is_file() or not given.adapters.is_dir():
        console.print(f"[red]weft demo: needs a base in {given.base} and adapters in {given.adapters}[/red]")
        return 2

    def tour() -> None:
        with tempfile.TemporaryDirectory(prefix="weft-demo-") as scratch:
            _tour(console, given.base, given.adapters.resolve(), Path(scratch))

    if code := _run(console, tour):
        return code
    if markdown is not None:
        shown = "\n".join(line.rstrip() for line in console.export_text().strip().splitlines())
        markdown.write_text(insert(f"```\n{shown}\n```", markdown.read_text(), _MARKER))
    return 0


def _run(console: Console, tour: Callable[[], None]) -> int:
    """Run a tour. Returns the exit code."""
    started = time.monotonic()
    try:
        tour()
    except (DemoFailure, RpcFailure, OSError) as error:
        console.print(f"\n[bold red]✗ {error}[/bold red]")
        return 1
    console.print(f"[bold green]✓ every step was right[/bold green] ({time.monotonic() - started:.0f} s)")
    return 0


def _real_tour(console: Console) -> None:
    try:
        from weft_training.demo.real import tour  # its texts need faker
    except ModuleNotFoundError as error:
        raise DemoFailure(f"{error.name} is not installed; pip install faker tzdata") from None
    tour.show(console, shipped.REAL)


def _tour(console: Console, base: Path, adapters: Path, scratch: Path) -> None:
    with serving(console, base, [adapters, shipped.STYLES], scratch) as server:
        with Client(server.address) as client:
            info = client.model_info()
            console.print(
                f"one base: [bold]{info.model_name}[/bold], {info.quantization} on {info.device}, "
                f"kernels {_kernels(server)}, {info.num_layers} layers, base digest {info.base_digest[:12]}…"
            )
            names = _register(console, client, adapters)
            styles = [path.name for path in sorted(shipped.STYLES.iterdir())]
            for name in styles:
                client.register(name, str(shipped.STYLES / name))
        _mixed_batch(console, server, names)
        _compose(console, server)
        asyncio.run(_hot_swap(console, server, adapters, names))
        _train_live(console, server, base, scratch)
        _unregister(console, server, (*names, *styles))
        _scrape(console, server)


# -- the steps ---------------------------------------------------------------------------------------------------


def _register(console: Console, client: Client, adapters: Path) -> dict[str, str]:
    """Register every demo adapter. Returns their methods by id."""
    step(console, "Register adapters by RPC")
    methods = {}
    for directory in sorted(path for path in adapters.iterdir() if path.is_dir()):
        registered = client.register(directory.name, str(directory))
        methods[directory.name] = registered.adapter.method
    counts = {method: list(methods.values()).count(method) for method in sorted(set(methods.values()))}
    console.print("  " + ", ".join(f"{count} × {method}" for method, count in counts.items()))
    require({"lora", "ia3", "prefix"} <= set(counts), "adapters of three methods are registered")
    return methods


def _mixed_batch(console: Console, server: Server, methods: dict[str, str]) -> None:
    """Send requests for all adapters and the base at once, each with a prompt of its own task."""
    step(console, "One batch: every adapter and the base, concurrently")
    tasks = {task for task in (_task_of(name) for name in methods) if task}
    asks = [
        (name, example)
        for name in methods
        for example in examples(TASKS[_task_of(name)], _REQUESTS_PER_ADAPTER, 11, Split.TEST)
    ]
    asks += [("", example) for example in _examples_of_all(sorted(tasks), _REQUESTS_TO_BASE)]
    began = time.monotonic()
    given = _answers(server, [(example, name or None) for name, example in asks])
    seconds = time.monotonic() - began
    asked = [
        _Asked(adapter=name, method=methods.get(name, "base"), example=example, answer=answer)
        for (name, example), answer in zip(asks, given, strict=True)
    ]
    by_adapter, by_base = ([one for one in asked if bool(one.adapter) is adapted] for adapted in (True, False))
    num_right, base_right = (sum(one.is_right for one in part) for part in (by_adapter, by_base))
    console.print(_answers_table(by_adapter))
    console.print(f"  without an adapter: {prompt(by_base[0].example)!r} → {by_base[0].answer!r}", markup=False)
    console.print(
        f"  {len(asked)} requests in {seconds:.2f} s: {num_right} of {len(by_adapter)} right with their adapters, "
        f"{base_right} of {len(by_base)} without"
    )
    require(len(asked) >= 24, "at least 24 concurrent requests")
    require(num_right >= _RIGHT_SHARE_MIN * len(by_adapter), "adapters answer their tasks")
    require(base_right <= 0.25 * len(by_base), "the base alone does not")


def _compose(console: Console, server: Server) -> None:
    """Compose a task's adapter with a style's in one request: an answer that neither of the two gives."""
    step(console, "Compose adapters: a task and a style, weighted, in one request")
    compositions = [composition for composition in COMPOSITIONS if len(composition.weights) == 2][:2]
    for composition in compositions:
        asked = examples(TASKS[composition.task], _REQUESTS_PER_COMPOSITION, 41, Split.TEST)
        answers = _answers(server, [(one, composition.weights) for one in asked])
        given = list(zip(asked, answers, strict=True))
        right = [(one, answer) for one, answer in given if answer == composition.wanted(one.input)]
        example, answer = (right or given)[0]
        named = " + ".join(f"{weight:g} · {name}" for name, weight in composition.weights.items())
        console.print(
            f"  {named}: {prompt(example)!r} → {answer!r}, {len(right)} of {len(asked)} right", highlight=False
        )
        require(len(right) >= _COMPOSED_RIGHT_SHARE_MIN * len(asked), f"{named} answers in its style")


def _answers(server: Server, asks: Sequence[tuple[Example, Target]]) -> list[str]:
    """Send all requests at once. Returns the greedy answers to untagged prompts."""
    sent = [Ask(prompt(example), adapter, max_new_tokens=24) for example, adapter in asks]
    return answering.answers(server.address, sent, concurrent=len(sent))


def _answers_table(asked: Sequence[_Asked]) -> Table:
    """Return a row for each task: a prompt, each method's answer to it, and how many of all its answers are right.

    The prompt is the first that some method gets wrong, or else the first.
    """
    methods = list(dict.fromkeys(one.method for one in asked))
    table = Table(box=None, pad_edge=False)
    for column in ("task", "prompt", *methods):
        table.add_column(column)
    for task in dict.fromkeys(one.example.task for one in asked):
        of_task = [one for one in asked if one.example.task == task]
        shown = next((one for one in of_task if not one.is_right), of_task[0]).example
        by_method = [[one for one in of_task if one.method == method] for method in methods]
        table.add_row(task, repr(prompt(shown)), *(_answer_shown(shown, of_method) for of_method in by_method))
    return table


def _answer_shown(example: Example, asked: Sequence[_Asked]) -> str:
    """Format one adapter's answer to an example and its number of right answers; "" if it was not asked."""
    found = next((one for one in asked if one.example == example), None)
    if found is None:
        return ""
    mark = "[green]✓[/green]" if found.is_right else "[red]✗[/red]"
    return f"{escape(repr(found.answer))} {mark} {sum(one.is_right for one in asked)} of {len(asked)}"


def _examples_of_all(tasks: Sequence[str], count: int) -> list[Example]:
    """Return `count` inputs, the tasks in turn; all of them take the same kind of input, and none repeats."""
    inputs = {task: examples(TASKS[task], count, 12, Split.TEST) for task in tasks}
    return [inputs[tasks[i % len(tasks)]][i] for i in range(count)]


async def _hot_swap(console: Console, server: Server, adapters: Path, methods: dict[str, str]) -> None:
    """Replace an adapter while a stream from it runs."""
    step(console, "Replace an adapter under a running stream")
    old, new = [name for name, method in methods.items() if method == "lora"][:2]
    example = examples(TASKS[_task_of(old)], 1, 21, Split.TEST)[0]
    async with AsyncClient(server.address) as client:
        before = await client.register("swap", str(adapters / old))
        answered = await client.generate(prompt(example), "swap", temperature=0, max_new_tokens=24)
        # Long enough for the adapter to be replaced in the middle of it.
        stream = client.stream(prompt(example), "swap", temperature=0, max_new_tokens=300, ignore_eos=True)
        pieces, after = 0, None
        async for _ in stream:
            pieces += 1
            if pieces == 5:
                after = await client.register("swap", str(adapters / new), replace=True)
        require(after is not None, "the adapter was replaced while the stream ran")
        assert after is not None
        kept = stream.finish.effective_adapters[0].digest
        following = await client.generate(prompt(example), "swap", temperature=0, max_new_tokens=24)
        took = following.finish.effective_adapters[0].digest
        await client.unregister("swap")
    console.print(
        f"  {prompt(example)!r} → {answered.text!r} by digest {before.adapter.digest[:12]} ({old})\n"
        f"  replaced after 5 of {stream.finish.usage.completion_tokens} tokens; the stream ended on {kept[:12]}\n"
        f"  {prompt(example)!r} → {following.text!r} by digest {took[:12]} ({new})"
    )
    require(kept == before.adapter.digest, "the running stream kept its digest")
    require(took == after.adapter.digest != kept, "the next request took the new digest")
    require(answered.text != following.text, "the answer changed")


def _train_live(console: Console, server: Server, base: Path, scratch: Path) -> None:
    """Train an adapter on the same base, upload it while the server runs, and see the answer change."""
    step(console, "Train a new adapter on the same base and hot-register it")
    from weft_training.demo.adapters import LIVE, train_recipe  # imports torch and transformers
    from weft_training.progress import ProgressBar

    with ProgressBar(console, f"training {LIVE.name}") as bar:
        trained = train_recipe(LIVE, scratch / "live", base=base, progress=bar)
    held_back = examples(TASKS[LIVE.task], 20, 31, Split.TEST)
    before = _answers(server, [(one, None) for one in held_back])
    with Client(server.address) as client:
        uploaded = client.upload("live", scratch / "live")
    after = _answers(server, [(one, "live") for one in held_back])
    right = [sum(a == one.output for a, one in zip(given, held_back, strict=True)) for given in (before, after)]
    console.print(
        f"  {LIVE.name}: {trained.num_parameters:,} parameters in {trained.seconds:.0f} s, "
        f"uploaded as digest {uploaded.adapter.digest[:12]}\n"
        f"  {prompt(held_back[0])!r} → {before[0]!r} before, {after[0]!r} after\n"
        f"  {right[0]} of {len(held_back)} right before, {right[1]} of {len(held_back)} after"
    )
    require(right[0] <= 0.25 * len(held_back), "the base could not do the task")
    require(right[1] >= _RIGHT_SHARE_MIN * len(held_back), "the new adapter can")


def _unregister(console: Console, server: Server, names: Sequence[str]) -> None:
    step(console, "Unregister")
    with Client(server.address) as client:
        freed = [client.unregister(name) for name in (*names, "live")]
        require(not client.adapters(), "nothing is registered any more")
        try:
            client.generate("abc = ", "live")
        except RpcFailure as failure:
            console.print(f"  generate with a removed adapter: [yellow]{failure}[/yellow]")
            require(failure.failure.reason == "ADAPTER_NOT_FOUND", "a removed adapter is not found")
        else:
            raise DemoFailure("a removed adapter still answered")
    console.print(
        f"  freed {sum(one.freed_device_bytes for one in freed):,} device bytes, "
        f"{sum(one.freed_kv_blocks for one in freed)} cached KV blocks"
    )


def _scrape(console: Console, server: Server) -> None:
    step(console, f"Scrape {server.metrics_url}")
    text = _metrics(server)
    lines = [line for line in text.splitlines() if line.startswith(_METRICS_SHOWN) and not line.endswith(" 0.0")]
    console.print("\n".join(f"  {line}" for line in lines), highlight=False, markup=False)
    tokens = re.search(r"^weft_generation_tokens_total (\S+)", text, re.MULTILINE)
    require(tokens is not None and float(tokens[1]) > 0, "the metrics counted tokens")
    errors = re.search(r'^weft_requests_total\{finish_reason="error"\} (\S+)', text, re.MULTILINE)
    require(errors is None or float(errors[1]) == 0, "no request ended in an error")


def _metrics(server: Server) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:  # noqa: S310  our own loopback server
        return response.read().decode()


def _kernels(server: Server) -> str:
    """Return the kernels' name: "cpu x86-64-v4" is a library from the wheel, "cpu native" one compiled here."""
    found = re.search(r'^weft_build_info\{.*kernels="([^"]*)"', _metrics(server), re.MULTILINE)
    return found[1] if found else "unknown"


def _task_of(adapter: str) -> str:
    """Return the task of a demo adapter, which is named task-method."""
    return adapter.rpartition("-")[0]
