"""`make bench`, `make bench-peers`: Weft beside a user's alternatives, on the same weights and requests.

python -m benchmarks.suite --short                      Weft and PEFT, three minutes
python -m benchmarks.suite                              every row, every backend, each in its own environment
python -m benchmarks.suite --only churn --only grpc     some of them
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots, report, results, scenarios, sweeps
from benchmarks.interleaved import Bench
from benchmarks.results import Entry
from weft_training.demo.document import insert, markdown, table

_MARKER = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Weft and PEFT alone, three turns")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="a row by its name; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--turns", type=int, help="turns of each row (default: 3 with --short, else 5)")
    parser.add_argument("--json", type=Path, help="put the rows into this file, which keeps its others")
    parser.add_argument("--table", type=Path, help="write the table of that file's rows here, as Markdown")
    parser.add_argument("--markdown", type=Path, help=f"put the table into this file, after <!-- {_MARKER} -->")
    parser.add_argument("--plots", type=Path, help="draw the plots of that file's rows into this folder")
    options = parser.parse_args()
    listed = scenarios.short() if options.short else [*scenarios.whole(), *sweeps.points()]
    try:
        chosen = scenarios.named(listed, options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(scenario.name for scenario in chosen))
        return
    turns = options.turns or (scenarios.SHORT if options.short else scenarios.WHOLE).turns
    found = []
    for one in measured(chosen, turns, Console(stderr=True)):
        found.append(one)
        if options.json is not None:
            results.store([one], options.json)  # an early end keeps the rows that are done
    entries = found if options.json is None else results.read(options.json)
    console = Console()
    if len(results.cells(found)) > 1:
        console.print(table("Weft beside the others", results.cells(found), num_names=results.NUM_NAMES))
    for line in [*results.failures(found), *results.misses(found, scenarios.LIMITS)]:
        console.print(line, highlight=False, markup=False)
    console.print(_under(found), highlight=False)
    if options.table is not None:
        options.table.write_text(f"# Weft beside the others\n\n{_block(entries)}\n")
    if options.markdown is not None:
        options.markdown.write_text(insert(_block(found), options.markdown.read_text(), _MARKER))
    if options.plots is not None:
        plots.draw(entries, options.plots)


def measured(chosen: list[scenarios.Scenario], turns: int, console: Console) -> Iterator[Entry]:
    """Measure the scenarios; yield the row of each as it is done, with a progress bar for the runs."""
    command = " ".join(["python -m benchmarks.suite", *sys.argv[1:]])
    conditions = report.conditions()
    total = sum((turns + 1) * len(scenario.sides) for scenario in chosen)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def tick(text: str, runs: int) -> None:
            progress.update(task, description=text, advance=runs)

        with Bench(tick) as bench:
            for scenario in chosen:
                yield results.entry(bench.measure(scenario, turns), conditions, command)


def _block(entries: list[Entry]) -> str:
    table_of_all = markdown(results.cells(entries), num_names=results.NUM_NAMES)
    remarks = [
        f"- {line.splitlines()[0]}" for line in [*results.misses(entries, scenarios.LIMITS), *results.failures(entries)]
    ]
    return "\n\n".join(filter(None, [table_of_all, "\n".join(remarks), _under(entries)]))


def _under(entries: list[Entry]) -> str:
    """Return the conditions of the rows, equal ones once."""
    lines = {f"{report.line(one['conditions'])}, median of {one['turns']} turns, `{one['command']}`" for one in entries}
    return "\n".join(sorted(lines))


if __name__ == "__main__":
    main()
