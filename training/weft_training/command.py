"""The command line: `weft train …`, which is also `python -m weft_training …`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.config import ModelConfig, Quantization

if TYPE_CHECKING:
    from weft_training.adapter import MethodConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # as `weft` has it: plain help
    pretty_exceptions_show_locals=False,
)


@app.command()
def train(
    base: Annotated[Path, typer.Option(help="Hugging Face model directory.")],
    method: Annotated[str, typer.Option(help="lora, ia3, prefix or bottleneck.")],
    data: Annotated[Path, typer.Option(help="JSON Lines: prompt and completion, or text.")],
    output: Annotated[Path, typer.Option(help="PEFT directory to make.")],
    rank: Annotated[int | None, typer.Option(help="[lora] Rank of the update.")] = None,
    alpha: Annotated[float | None, typer.Option(help="[lora] Numerator of its scale, alpha / rank.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="[lora, ia3] Names of linear modules, with commas. lora takes all by default.")
    ] = None,
    feedforward_modules: Annotated[
        str | None, typer.Option(help="[ia3] Which of them are scaled at their input.")
    ] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(help="[prefix] Number of virtual positions.")] = None,
    init_std: Annotated[float | None, typer.Option(help="[prefix] Spread of their first keys and values.")] = None,
    form: Annotated[
        str | None, typer.Option(help="[bottleneck] serial, parallel, sum or residual: what it reads, and its norm.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="[bottleneck] relu, gelu or silu.")] = None,
    sublayers: Annotated[str | None, typer.Option(help="[bottleneck] attention, mlp or both, with a comma.")] = None,
    reduction_factor: Annotated[
        float | None, typer.Option(help="[bottleneck] Hidden size over the bottleneck's size.")
    ] = None,
    bottleneck_size: Annotated[int | None, typer.Option("--size", help="[bottleneck] Its size itself.")] = None,
    leave_out: Annotated[str | None, typer.Option(help="[bottleneck] Layers without one, from 0, with commas.")] = None,
    scaling: Annotated[float | None, typer.Option(help="[bottleneck] Constant factor of what it adds.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Examples of one step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate; ia3 and prefix want about ten times lora's.")] = 2e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate grows.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same adapter.")] = 0,
    quantization: Annotated[Quantization, typer.Option(help="How the frozen base is held.")] = Quantization.NF4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is at --output.")] = False,
) -> None:
    """Train an adapter on a frozen, quantized base and write it as a PEFT directory."""
    from rich.console import Console

    from weft.errors import WeftError
    from weft_training.progress import ProgressBar
    from weft_training.trainer import TrainConfig
    from weft_training.trainer import train as run

    console = Console()
    given = {
        "rank": rank,
        "alpha": alpha,
        "target_modules": _names(target_modules),
        "feedforward_modules": _names(feedforward_modules),
        "num_virtual_tokens": num_virtual_tokens,
        "init_std": init_std,
        "form": form,
        "activation": activation,
        "sublayers": _names(sublayers),
        "reduction_factor": reduction_factor,
        "size": bottleneck_size,
        "leave_out": leave_out,
        "scaling": scaling,
    }
    try:
        config = TrainConfig(
            model=ModelConfig(path=base, quantization=quantization, device=device),
            adapter=_method_config(method, {name: value for name, value in given.items() if value is not None}),
            data=data,
            output=output,
            num_steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            num_warmup_steps=warmup_steps,
            seed=seed,
            overwrite=overwrite,
        )
        with ProgressBar(console, f"training {method}") as bar:
            result = run(config, progress=bar)
    except (ValueError, OSError, WeftError) as error:
        Console(stderr=True).print(f"weft train: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    console.print(
        f"{result.output}: {method}, {result.num_parameters:,} parameters, loss {result.losses[0]:.3f} to "
        f"{result.losses[-1]:.3f} in {len(result.losses)} steps, {result.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _names(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def _method_config(method: str, given: dict[str, Any]) -> "MethodConfig":
    """The method's usual config with what was given; refuses what the method does not have."""
    from weft_training.adapter import USUAL

    if method not in USUAL:
        raise ValueError(f"method: must be one of {', '.join(USUAL)}, given {method!r}")
    usual = USUAL[method]
    for name in given:
        if name not in {field.name for field in dataclasses.fields(usual)}:
            raise ValueError(f"--{name.replace('_', '-')}: the method {method} has none")
    return dataclasses.replace(usual, **{name: _value(name, value) for name, value in given.items()})


def _value(name: str, value: Any) -> Any:
    """An option's text as the config has it; ValueError naming what it must be."""
    from weft.methods.bottleneck import Activation, Form

    members = {"form": Form, "activation": Activation}.get(name)
    if members is not None:
        if value not in list(members):
            raise ValueError(f"--{name}: must be one of {', '.join(members)}, given {value!r}")
        return members(value)
    if name == "leave_out":
        layers = value.replace(" ", "").split(",")
        if not all(layer.isascii() and layer.isdecimal() for layer in layers):
            raise ValueError(f"--leave-out: must be layer numbers, given {value!r}")
        return tuple(map(int, layers))
    return value
