"""The wheel's kernels beside those compiled here: a decode step of sixteen LoRAs, in turns, in one process.

Run it with the Python of an environment that has the wheels (`make wheel-test` does) and a compiler on PATH.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import metrics, models, report
from benchmarks.fixed_steps import NUM_CONTEXT, NUM_ROWS, RANK, FixedSteps, loras
from weft.config import ModelConfig, Quantization
from weft.kernels.cpu import library
from weft.kernels.selection import select
from weft.model import loader, paged_attention, serving_form

_NUM_CALLS = 3  # per side in a turn; the median counts
_RATIO_MAX = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--demo", default="", help="what `weft demo` said in the end, to be told as well")
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--table", type=Path, help="write what was measured here, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(2)
    paged_attention.register()
    sides = {kind or "prebuilt": _opened(kind) for kind in ("", "native")}
    assert sides["prebuilt"].kind != "native", "this environment has no prebuilt kernels"
    path = models.base("bench-80m")
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu")
    base = loader.load(config, attention=paged_attention.ATTENTION)
    dtype = str(base.dtype).removeprefix("torch.")
    serving_form.take(base, select(base.device, base.dtype), shadow_bytes=0)
    rows = loras(base)
    steps = {}
    for name, loaded in sides.items():
        _use(loaded)
        steps[name] = FixedSteps(base, select(base.device, base.dtype), rows)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.turns):
        for name in sorted(sides, reverse=bool(turn % 2)):
            _use(sides[name])
            times[name].append(statistics.median(_ms(steps[name]) for _ in range(_NUM_CALLS)))
    ratio = metrics.spread([mine / theirs for mine, theirs in zip(times["prebuilt"], times["native"], strict=True)])
    logits = [one.decode().float().clone() for one in steps.values()]
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    verdict = "met" if ratio.median <= _RATIO_MAX else "missed"
    text = f"""# Kernels of the wheel, beside compiled here

A decode step of {NUM_ROWS} rows, each with its own LoRA of rank {RANK} and {NUM_CONTEXT} tokens before it, on bench-80m
in {dtype}.

| kernels | step, ms (quartiles) |
|---|---:|
"""
    for name, loaded in sides.items():
        spread = metrics.spread(times[name])
        text += f"| {name}: cpu {loaded.kind} | {spread.median:.1f} ({spread.q1:.1f}–{spread.q3:.1f}) |\n"
    text += f"""
prebuilt ÷ native, turn by turn: {ratio.median:.3f} ({ratio.q1:.3f}–{ratio.q3:.3f}), must be ≤ {_RATIO_MAX}: {verdict}.
Their logits differ by {error:.1e}, relative.

{report.line(report.conditions())}, median of {options.turns} turns, `python -m benchmarks.prebuilt`
"""
    if options.demo:
        text += f"\n`weft demo` from the wheels, in an empty directory, without a compiler: {options.demo}\n"
    print(text)
    if options.json is not None:
        found = {"kernels": {name: loaded.kind for name, loaded in sides.items()}, "dtype": dtype, "step_ms": times}
        found |= {"ratio": asdict(ratio), "must": _RATIO_MAX, "verdict": verdict, "error": error, "demo": options.demo}
        found |= {"conditions": report.conditions()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.table is not None:
        options.table.write_text(text)
    raise SystemExit(verdict == "missed")


def _opened(wanted: str) -> library.Library:
    os.environ["WEFT_KERNELS"] = wanted
    library.load.cache_clear()
    found = library.load()
    assert found.functions is not None, found.reason
    return found


def _use(loaded: library.Library) -> None:
    """Use these kernels from here on, also in new captures; earlier captures keep theirs."""
    vars(library)["load"] = lambda: loaded


def _ms(steps: FixedSteps) -> float:
    began = time.perf_counter()
    steps.decode()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
