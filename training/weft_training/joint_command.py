"""The command line: `weft train-many A.yaml B.yaml …`, one recipe for each adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft_training.trainer import TrainConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # as `weft` has it: plain help
    pretty_exceptions_show_locals=False,
)


@app.command()
def train_many(
    recipes: Annotated[list[Path], typer.Argument(help="YAML files, one for each adapter, all of one model.")],
    pass_tokens_max: Annotated[
        int, typer.Option(min=1, help="Tokens that go through the base together; fewer need less memory.")
    ] = 16_384,
) -> None:
    """Train many adapters in one pass over one frozen, quantized base; each as `weft train` would train it alone."""
    from rich.console import Console

    from weft.errors import WeftError
    from weft_training.joint import train_many as run
    from weft_training.joint_progress import ProgressBars

    console = Console()
    try:
        configs = [read(path) for path in recipes]
        with ProgressBars(console, [config.output.name for config in configs]) as bars:
            results = run(configs, progress=bars, pass_tokens_max=pass_tokens_max)
    except (ValueError, OSError, WeftError) as error:
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        Console(stderr=True).print(f"weft train-many: {text}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    for result in results:
        console.print(
            f"{result.output}: {result.num_parameters:,} parameters, loss {result.losses[0]:.3f} to "
            f"{result.losses[-1]:.3f} in {len(result.losses)} steps, {result.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def read(path: Path) -> "TrainConfig":
    """The run that a recipe describes, in sections: model, adapter, data, optimization, output.

    Raises ValueError naming the file and what is wrong in it.
    """
    import yaml

    from weft.config import ModelConfig, Quantization
    from weft_training.adapter import USUAL
    from weft_training.trainer import TrainConfig

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError("must hold sections, such as `model:`")
        sections = {name: dict(recipe.pop(name, None) or {}) for name in _SECTIONS}
        for unknown in recipe:
            raise ValueError(f"{unknown}: no such section; known are {', '.join(_SECTIONS)}")
        model, adapter, data, optimization, output = sections.values()
        method = adapter.pop("method", None)
        if method not in USUAL:
            raise ValueError(f"adapter.method: must be one of {', '.join(USUAL)}, given {method!r}")
        usual = USUAL[method]
        known = {field: getattr(usual, field) for field in usual.__dataclass_fields__}
        return TrainConfig(
            model=ModelConfig(
                **model | {"path": Path(model["path"]), "quantization": Quantization(model.get("quantization", "nf4"))}
            ),
            adapter=type(usual)(**known | {name: _frozen(value) for name, value in adapter.items()}),
            data=Path(data.pop("train")),
            output=Path(output.pop("path")),
            **data,
            **optimization,
            **output,
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: must be given") from None
    except TypeError as error:  # Python's own words name the field
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


_SECTIONS = ("model", "adapter", "data", "optimization", "output")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
