"""The command line: `weft train-many A.yaml B.yaml …`, one recipe for each adapter."""

from pathlib import Path
from typing import Annotated

import typer

# Plain help, as in `weft`.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)


@app.command()
def train_many(
    recipes: Annotated[list[Path], typer.Argument(help="YAML files, one for each adapter, all of one model.")],
    pass_tokens_max: Annotated[
        int, typer.Option(min=1, help="Tokens that go through the base together; fewer need less memory.")
    ] = 16_384,
) -> None:
    """Train many adapters in one pass over one frozen, quantized base; each as `weft train` would train it alone."""
    from rich.console import Console

    from weft.cli.output import fail, print_line
    from weft.client import RpcFailure
    from weft.errors import WeftError
    from weft_training import publish, recipe
    from weft_training.joint import train_many as run
    from weft_training.joint_progress import ProgressBars

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
        print_line(
            f"{result.output}: {result.num_parameters:,} parameters, loss {result.losses[0]:.3f} to "
            f"{result.losses[-1]:.3f} in {len(result.losses)} steps, {result.seconds:.1f} s"
            + ("" if call is None else f", published as {call.adapter_id}: {call.call}")
        )
