"""`weft adapters arrow`: a mixture of LoRA adapters whose router nobody trains. No server is asked."""

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.output import fail, print_line
from weft.config import AdapterLimits, ModelConfig, Quantization, typed_path


def command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    experts: Annotated[
        list[str],
        typer.Argument(metavar="ID=PATH…", help="LoRA directories, and the ids that they are registered under."),
    ],
    base: Annotated[
        Path, typer.Option(help="The model directory that they are for.", parser=typed_path, metavar="MODEL")
    ],
    quantization: Annotated[Quantization, typer.Option(help="How the server holds it.")] = Quantization.NF4,
    top_k: Annotated[int, typer.Option(metavar="K", help="Experts that keep a gate.")] = 2,
    temperature: Annotated[float, typer.Option(help="What logits are divided by.")] = 1.0,
) -> None:
    """Make an Arrow router (arXiv:2405.11157) of LoRA adapters: their own directions, and no training.

    Register the experts first and then OUT, like any adapter.
    """
    from weft.adapters.identifiers import check_adapter_id
    from weft.adapters.versions import generation_at
    from weft.errors import WeftError
    from weft.methods import arrow, lora
    from weft.methods.checkpoint import directory, mixture
    from weft.methods.mixture import Expert, Mixture
    from weft.model import loader

    if output.exists():
        raise fail(f"OUT: {output} exists; give another directory", code=2)
    try:
        named = [_parsed(text) for text in experts]
        held = loader.load(ModelConfig(path=base, quantization=quantization, device="cpu"), attention="sdpa")
        found, params = [], []
        for name, path in named:
            adapter = directory.load(path, held.shape, AdapterLimits())
            if adapter.method is not lora.METHOD:
                raise ValueError(
                    f"{name}: must be a LoRA, whose directions Arrow is made of, given {adapter.method.name}"
                )
            if adapter.invocation_tokens:
                raise ValueError(f"{name}: must act on all tokens, given an activated LoRA")
            found.append(Expert(generation_at(path), check_adapter_id(name)))
            params.append(adapter.sites)
        config = arrow.config(len(found), top_k=top_k, temperature=temperature)
        router = arrow.router(arrow.norm_readers(held.model, held.shape), params, held.shape)
        mixture.write(Mixture(config, router, tuple(found)), output, held.shape)
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None
    print_line(f"{output}: an Arrow mixture of {', '.join(name for name, _ in named)}, top {config.top_k}")


def _parsed(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ValueError(f"expert: must be ID=PATH, given {text!r}")
    return name, Path(path)
