"""The command line: `weft train …`, which is also `python -m weft_training …`."""

import dataclasses
from enum import StrEnum
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
    method: Annotated[str, typer.Option(help="lora, ia3, prefix, prompt or ptuning.")],
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
    num_virtual_tokens: Annotated[
        int | None, typer.Option(help="[prefix, prompt, ptuning] Number of virtual positions.")
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(help="[prefix, prompt] Spread of what is there before training, where it is random.")
    ] = None,
    prompt_init: Annotated[
        str | None, typer.Option(help="[prompt] What the rows begin as: random, vocabulary, or text (--init-text).")
    ] = None,
    init_text: Annotated[str | None, typer.Option(help="[prompt] Its tokens are the first rows.")] = None,
    prefix_projection: Annotated[
        bool | None, typer.Option("--prefix-projection", help="[prefix] Train an MLP that makes the prefix.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="[ptuning] What makes the rows in training: mlp or lstm.")] = None,
    encoder_hidden_size: Annotated[
        int | None, typer.Option(help="[ptuning, prefix] Inner width of the encoder or the MLP.")
    ] = None,
    encoder_num_layers: Annotated[int | None, typer.Option(help="[ptuning] Layers of the LSTM.")] = None,
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
        "prompt_init": prompt_init,
        "init_text": init_text,
        "prefix_projection": prefix_projection,
        "encoder": encoder,
        "encoder_hidden_size": encoder_hidden_size,
        "encoder_num_layers": encoder_num_layers,
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
    return dataclasses.replace(usual, **{name: _choice(usual, name, value) for name, value in given.items()})


def _choice(usual: object, name: str, value: Any) -> Any:
    """The value as the config has it: a choice is given by its text."""
    kind = type(getattr(usual, name))
    if not issubclass(kind, StrEnum):
        return value
    if value not in list(kind):
        raise ValueError(f"--{name.replace('_', '-')}: must be one of {', '.join(kind)}, given {value!r}")
    return kind(value)
