"""Model card and loss curve, written beside an adapter for human readers. Servers read neither.

The curve is drawn if matplotlib is installed, as it is with the train extra.
"""

from importlib.util import find_spec
from pathlib import Path

import weft.methods.bnb

import torch
import transformers
import yaml

import weft
from weft_training import data
from weft_training.config import TrainConfig, recipe_of
from weft_training.run import Prepared, TrainResult

CARD_FILE = "README.md"
CURVE_FILE = "loss.png"


def write(config: TrainConfig, prepared: Prepared, result: TrainResult, path: Path) -> None:
    """Write the card and the curve into the adapter's directory."""
    has_curve = find_spec("matplotlib") is not None
    if has_curve:
        _draw(result, path / CURVE_FILE)
    (path / CARD_FILE).write_text(_text(config, prepared, result, has_curve=has_curve), encoding="utf-8")


def _draw(result: TrainResult, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss per learned token", title=result.output.name)
    axes.plot(range(1, len(result.losses) + 1), result.losses, linewidth=1, label="training")
    if result.evaluations:
        axes.plot(list(result.evaluations), list(result.evaluations.values()), marker="o", label="evaluation")
        axes.axvline(result.best_step, color="grey", linewidth=1, linestyle=":", label=f"kept: step {result.best_step}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _text(config: TrainConfig, prepared: Prepared, result: TrainResult, *, has_curve: bool) -> str:
    name, base, method = result.output.name, prepared.model.base, prepared.model.method
    shape, losses = base.shape, result.losses
    evaluated = ""
    if result.evaluations:
        best = result.evaluations[result.best_step]
        evaluated = f"| evaluation loss | {best:.4f} at step {result.best_step}, which is the step kept here |\n"
    curve = f"![loss]({CURVE_FILE})\n\n" if has_curve else ""
    context = f"{base.max_model_len:,} tokens" + (f" ({shape.rope_factors})" if shape.rope_factors else "")
    versions = f"weft {weft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"""\
---
library_name: peft
base_model: {shape.name}
pipeline_tag: text-generation
tags: [weft, {method}]
---

# {name}

A {method} adapter of {result.num_parameters:,} parameters for {shape.name}, trained with Weft.

| | |
|---|---|
| base digest | `{shape.digest}` ({config.model.quantization}; served on these weights alone, in any quantization) |
| context | {context} |
| data digest | `{data.digest(prepared.rows)}` ({len(prepared.rows):,} examples) |
| training loss | {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps, {result.seconds:.1f} s |
{evaluated}| versions | {versions} |

{curve}## Serve it

    weft adapters add {name} {name}
    weft generate "…" --adapter {name}

## Recipe

{_fenced_recipe(config, shape.name)}
"""


def _fenced_recipe(config: TrainConfig, base_name: str) -> str:
    keys = recipe_of(config)
    keys["model"]["path"] = base_name  # only this machine has the path
    recipe = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True).strip()
    # Use a fence longer than any in the recipe, whose strings may hold backticks.
    fence = "`" * max(3, 1 + max((len(run) for run in recipe.split() if set(run) == {"`"}), default=0))
    return f"{fence}yaml\n{recipe}\n{fence}"
