"""Model card and loss curve, written beside an adapter for human readers. Servers read neither.

The curve is drawn if matplotlib is installed, as it is with the train extra.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

CARD_FILE = "README.md"
CURVE_FILE = "loss.png"


class Facts(NamedTuple):
    """A run's settings and results.

    max_model_len: tokens of a request that the base was set up for. rope_factors: the rotary factors used, if they
        depend on it.
    evaluations: losses by step. best_step: 0 if nothing was evaluated. seconds: of the training loop.
    """

    name: str
    method: str
    num_parameters: int
    base_name: str
    base_digest: str
    quantization: str
    max_model_len: int
    rope_factors: str
    recipe: Mapping[str, object]
    data_digest: str
    num_rows: int
    losses: Sequence[float]
    evaluations: Mapping[int, float]
    best_step: int
    seconds: float
    versions: Mapping[str, str]


def write(facts: Facts, path: Path) -> None:
    """Write the card and the curve into the adapter's directory."""
    has_curve = find_spec("matplotlib") is not None
    if has_curve:
        _draw(facts, path / CURVE_FILE)
    (path / CARD_FILE).write_text(_text(facts, has_curve=has_curve), encoding="utf-8")


def _draw(facts: Facts, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss per learned token", title=facts.name)
    axes.plot(range(1, len(facts.losses) + 1), facts.losses, linewidth=1, label="training")
    if facts.evaluations:
        axes.plot(list(facts.evaluations), list(facts.evaluations.values()), marker="o", label="evaluation")
        axes.axvline(facts.best_step, color="grey", linewidth=1, linestyle=":", label=f"kept: step {facts.best_step}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _portable(facts: Facts) -> dict[str, object]:
    """Return the recipe with the base's name in place of its path, which one machine only has."""
    model = facts.recipe.get("model")
    named = {"model": {**model, "path": facts.base_name}} if isinstance(model, Mapping) else {}
    return {**facts.recipe, **named}


def _text(facts: Facts, *, has_curve: bool) -> str:
    evaluated = ""
    if facts.evaluations:
        best = facts.evaluations[facts.best_step]
        evaluated = f"| evaluation loss | {best:.4f} at step {facts.best_step}, which is the step kept here |\n"
    curve = f"![loss]({CURVE_FILE})\n\n" if has_curve else ""
    context = f"{facts.max_model_len:,} tokens" + (f" ({facts.rope_factors})" if facts.rope_factors else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    recipe = yaml.safe_dump(_portable(facts), sort_keys=False, allow_unicode=True).strip()
    # Use a fence longer than any in the recipe, whose strings may hold backticks.
    fence = "`" * max(3, 1 + max((len(run) for run in recipe.split() if set(run) == {"`"}), default=0))
    return f"""\
---
library_name: peft
base_model: {facts.base_name}
pipeline_tag: text-generation
tags: [weft, {facts.method}]
---

# {facts.name}

A {facts.method} adapter of {facts.num_parameters:,} parameters for {facts.base_name}, trained with Weft.

| | |
|---|---|
| base digest | `{facts.base_digest}` ({facts.quantization}; served on these weights alone, in any quantization) |
| context | {context} |
| data digest | `{facts.data_digest}` ({facts.num_rows:,} examples) |
| training loss | {facts.losses[0]:.4f} to {facts.losses[-1]:.4f} in {len(facts.losses)} steps, {facts.seconds:.1f} s |
{evaluated}| versions | {versions} |

{curve}## Serve it

    weft adapters add {facts.name} {facts.name}
    weft generate "…" --adapter {facts.name}

## Recipe

{fence}yaml
{recipe}
{fence}
"""
