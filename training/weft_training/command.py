"""The command lines `weft train …`, which is also `python -m weft_training …`, and `weft train-many …`."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from weft_training.plan import Plan
    from weft_training.recipe import Given, Recipe

# Plain help, as in `weft`.
_PLAIN: Any = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_show_locals": False}
app, many = typer.Typer(**_PLAIN), typer.Typer(**_PLAIN)
_HELP = """Train an adapter on a frozen, quantized base and write it as a PEFT directory.

\b
  weft train RECIPE [--key value …]
  weft train --base DIR --method lora --data rows.jsonl --output DIR [--key value …]

RECIPE is a file, or the name of a recipe that comes with Weft, such as lora or prefix.

A recipe is YAML with the sections model, adapter, data, optimization, output and, with a teacher, distillation. Every
key of it is an option too: --optimization.learning-rate 1e-3, or --learning-rate 1e-3 if only one section has it.
Options override the recipe. --list-keys lists all keys with their types and defaults; --list-keys --method ia3 those
of another method.

\b
  --base DIR, --quantization nf4|int8|none, --device   the base (model.path …)
  --method NAME                                        lora, ia3, mixture …, and its own: --rank, --alpha …
  --data FILES                                         JSON Lines, separated by commas (data.train)
  --evaluation FILES, --evaluation-share 0.1           data for the evaluation; the best step's adapter is kept
  --steps, --batch-size, --lr, --warmup-steps, --seed  the optimization
  --checkpoint-every N, --resume                       checkpoints, from which a killed run continues
  --teacher DIR                                        distillation from an adapter or a model
  --output DIR, --overwrite                            the result
  --publish HOST:PORT or STORE, --adapter-id           upload it, or register it in a store
"""


@app.command(
    help=_HELP,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[RECIPE] …",
)
def train(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes and memory; train nothing.")] = False,
    list_keys: Annotated[bool, typer.Option("--list-keys", help="List every key of a recipe.")] = False,
) -> None:
    """Train an adapter; users read `_HELP` instead."""
    from rich.console import Console

    from weft.cli.output import fail
    from weft.client import RpcFailure
    from weft.errors import WeftError
    from weft_training import recipe

    try:
        path, options = recipe.options(context.args)
        if list_keys:
            _print_keys(options)
            return
        loaded = recipe.load(path, options)
        if dry_run:
            _dry_run(loaded)
        else:
            _train(Console(), loaded)
    except (ValueError, OSError, WeftError, RpcFailure) as error:
        raise fail(f"weft train: {error}") from None


def _train(console: "Console", loaded: "Recipe") -> None:
    from weft.cli.output import print_line
    from weft_training import publish
    from weft_training.progress import ProgressBar
    from weft_training.trained import name_of
    from weft_training.trainer import train as run

    config = loaded.train
    method = name_of(config.adapter)
    if loaded.publish is not None:
        publish.check(loaded.publish, config.output)
    is_first = os.environ.get("RANK", "0") == "0"
    with ProgressBar(console, f"training {method}") if is_first else nullcontext() as bar:
        result = run(config, progress=bar)
    if not is_first:
        return
    print_line(f"{result.output}: {method}, {result.summary}")
    if loaded.publish is not None:
        published = publish.publish(loaded.publish, config.output, config.model)
        print_line(
            f"published {published.adapter_id} {published.digest[:12]} at {loaded.publish.publish}: {published.call}"
        )


def _dry_run(loaded: "Recipe") -> None:
    from weft.cli.output import print_facts, print_line
    from weft_training import plan, trainer
    from weft_training.output import require_free

    require_free(loaded.train.output, overwrite=loaded.train.overwrite)
    made = plan.make(loaded.train, trainer.prepare(loaded.train))
    print_line(f"{loaded.train.output}: not trained")
    print_facts(_facts(made))


def _facts(plan: "Plan") -> dict[str, str]:
    from weft.cli.output import size

    return {
        "examples": f"{plan.num_rows:,}",
        "tokens": f"{plan.num_tokens:,}",
        "parameters of the base": f"{plan.num_base:,}",
        "parameters of the adapter": f"{plan.num_adapter:,}",
        "parameters in training": f"{plan.num_trained:,}" if plan.num_trained != plan.num_adapter else "",
        "efficiency ratio, base / adapter": f"{plan.efficiency_ratio:,.1f}",
        "memory: base": size(plan.base_bytes),
        "memory: adapter": size(plan.adapter_bytes),
        "memory: gradients": size(plan.gradient_bytes),
        "memory: optimizer state": size(plan.optimizer_bytes),
        "memory: activations of the longest batch": size(plan.activation_bytes),
        "memory: together": size(plan.total_bytes),
        "memory: full fine-tuning, AdamW in mixed precision": size(plan.full_fine_tuning_bytes),
        "full fine-tuning / this run, without activations": f"{plan.memory_ratio:,.1f}",
    }


def _print_keys(options: "Sequence[Given]") -> None:
    """Print one whole key a line, to be read, and searched with grep."""
    from pydantic_core import to_jsonable_python

    from weft.settings import type_name
    from weft_training import recipe

    method = recipe.method_of({}, [recipe.Given("--method", "lora"), *options])
    for section, keys in recipe.keys(method).items():
        for name, info in keys.items():
            default = "must be given"
            if not info.is_required():
                default = f"default {to_jsonable_python(info.get_default(call_default_factory=True))}"
            typer.echo(f"{section}.{name}: {type_name(info.annotation)}; {default}. {info.description or ''}".rstrip())


@many.command()
def train_many(
    recipes: Annotated[list[Path], typer.Argument(help="YAML files, one for each adapter, all on one base.")],
    pass_tokens_max: Annotated[
        int, typer.Option(min=1, help="Tokens in one pass through the base; fewer need less memory.")
    ] = 16_384,
) -> None:
    """Train many adapters in one pass over one frozen, quantized base; each as `weft train` would train it alone."""
    from rich.console import Console

    from weft.cli.output import fail, print_line
    from weft.client import RpcFailure
    from weft.errors import WeftError
    from weft_training import publish, recipe
    from weft_training.joint import train_many as run
    from weft_training.progress import ProgressBars

    try:
        loaded = [recipe.load(path) for path in recipes]
        configs = [one.train for one in loaded]
        for one in loaded:
            if one.publish is not None:
                publish.check(one.publish, one.train.output)
        with ProgressBars(Console(), [config.output.name for config in configs]) as bars:
            results = run(configs, progress=bars, pass_tokens_max=pass_tokens_max)
        published = [one.publish and publish.publish(one.publish, one.train.output, one.train.model) for one in loaded]
    except (ValueError, OSError, WeftError, RpcFailure) as error:
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        raise fail(f"weft train-many: {text}") from None
    for result, call in zip(results, published, strict=True):
        place = "" if call is None else f", published as {call.adapter_id}: {call.call}"
        print_line(f"{result.output}: {result.summary}{place}")
