"""`weft adapters merge`: several LoRA directories as one. No server is asked."""

import math
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import adapter_directory
from weft.cli.output import fail, note, print_line, size
from weft.config import AdapterLimits, ModelConfig, Quantization, typed_path

if TYPE_CHECKING:
    from weft.methods.merging import Rule
    from weft.methods.protocol import Adapter, BaseShape


class Strategy(StrEnum):
    """What is kept of the updates that are added; each is the function of that name in `weft.methods.merging`."""

    EXACT = "exact"
    SVD = "svd"
    TIES = "ties"
    DARE_TIES = "dare_ties"
    DARE_LINEAR = "dare_linear"
    MAGNITUDE_PRUNE = "magnitude_prune"

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it needs; the others mean nothing to it."""
        match self:
            case Strategy.EXACT:
                return ()
            case Strategy.SVD:
                return ("rank",)
            case Strategy.TIES | Strategy.MAGNITUDE_PRUNE:
                return ("rank", "density")
            case Strategy.DARE_TIES | Strategy.DARE_LINEAR:
                return ("rank", "density", "seed")


def command(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="DIR[=WEIGHT]...", help="LoRA directories and their weights, 1 if left out."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    base: Annotated[
        Path, typer.Option(help="The model directory that they are for.", parser=typed_path, metavar="MODEL")
    ],
    strategy: Annotated[Strategy, typer.Option(help="What is kept of their sum.")] = Strategy.EXACT,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="[all but exact] Rank of the result.")] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="X", help="[ties, dare_*, magnitude_prune] Share of entries kept, up to 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="[dare_*] Draws what is dropped.")] = None,
) -> None:
    """Merge LoRAs into one, a PEFT directory that any server takes.

    exact adds their weighted updates as a composition does, and its rank is the sum of theirs. svd is the nearest to
    that of rank R. The others first thin out what is added: magnitude_prune keeps the largest entries of each update,
    dare_linear random ones, and ties and dare_ties also average those that agree in sign. PEFT calls them cat, svd and
    ties_svd … None of them is PEFT's "linear", which adds A and B apart and is not the weighted sum.

    Example: weft adapters merge runs/polite=0.7 runs/brief=0.5 runs/both --base model --strategy svd --rank 8
    """
    from weft.errors import WeftError
    from weft.methods import merging
    from weft.methods.checkpoint import directory
    from weft.model import loader

    if output.exists():
        raise fail(f"OUT: {output} exists; give another directory", code=2)
    rule = _rule(strategy, {"rank": rank, "density": density, "seed": seed})
    weighted = [_part(text) for text in parts]
    try:
        # Nothing is read of the weights but their shapes, so any way of holding them will do.
        held = loader.load(ModelConfig(path=base, quantization=Quantization.NONE, device="cpu"), attention="sdpa")
        adapters, bound = _read([path for path, _ in weighted], held.shape)
        weights = [weight for _, weight in weighted]
        merged, kept = merging.merge(list(zip(adapters, weights, strict=True)), rule)
        directory.write(merged, output, bound)
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    print_line(f"{output}: lora, rank {merged.rank}, {merged.num_parameters:,} parameters, {size(num_bytes)}")
    if kept < 1:
        note(f"rank {merged.rank} keeps at least {kept:.1%} of the norm of every module's update")
    if merged.rank > AdapterLimits().rank_max:
        note(f"a server takes rank {merged.rank} only with --adapter-rank-max {merged.rank} or more")


def _part(text: str) -> tuple[Path, float]:
    path, separator, weight = text.rpartition("=")
    try:
        value = float(weight) if separator else 1.0
    except ValueError:
        raise typer.BadParameter(f"must be DIR or DIR=WEIGHT, given {text!r}") from None
    if not math.isfinite(value) or value == 0:
        raise typer.BadParameter(f"weights must be finite and other than 0, given {text!r}")
    return Path(path if separator else text), value


def _rule(strategy: Strategy, given: dict[str, Any]) -> "Rule":
    """How modules are merged. BadParameter for an option that the strategy lacks, or that means nothing to it."""
    for name, value in given.items():
        if name in strategy.options and value is None:
            raise typer.BadParameter(f"--strategy {strategy} needs --{name}")
        if name not in strategy.options and value is not None:
            raise typer.BadParameter(f"--{name} means nothing with --strategy {strategy}")
    if given["density"] is not None and not 0 < given["density"] <= 1:
        raise typer.BadParameter(f"--density must be above 0 and at most 1, given {given['density']}")

    import torch

    from weft.methods import merging

    takes = {name: given[name] for name in strategy.options if name != "seed"}
    if "seed" in strategy.options:
        takes["generator"] = torch.Generator().manual_seed(given["seed"])
    rules = {
        Strategy.EXACT: merging.exact,
        Strategy.SVD: merging.svd,
        Strategy.TIES: merging.ties,
        Strategy.DARE_TIES: merging.dare_ties,
        Strategy.DARE_LINEAR: merging.dare_linear,
        Strategy.MAGNITUDE_PRUNE: merging.magnitude_prune,
    }
    return partial(rules[strategy], **takes)


def _read(paths: list[Path], shape: "BaseShape") -> "tuple[list[Adapter], BaseShape]":
    """The adapters, and the base that their sum is for: the first that they name, none where none does.

    The digests of one base's weights, held in several ways, are one base. Raises ValueError for two bases, and for two
    sets of rotary factors, for whose sum there is no base.
    """
    found = [adapter_directory.read(path, shape) for path in paths]
    named = {read.base_digest: path for path, read in zip(paths, found, strict=True) if read.base_digest is not None}
    holdings = {shape.digest: shape.held_as, **shape.same_weights}
    if len(named) > 1:
        if not named.keys() <= holdings.keys():
            bases = ", ".join(f"{path} for {digest[:12]}…" for digest, path in named.items())
            raise ValueError(f"the parts were trained for different bases: {bases}")
        *most, last = [holdings[digest] for digest in named]
        note(f"the base was held as {', '.join(most)} and {last} in their training; the sum is bound to {most[0]}")
    factors = {read.rope_factors: path for path, read in zip(paths, found, strict=True) if read.rope_factors}
    if len(factors) > 1:
        given = ", ".join(f"{path} with {name}" for name, path in factors.items())
        raise ValueError(f"the parts were trained with different rotary factors of the base: {given}")
    bound = replace(shape, digest=next(iter(named), ""), rope_factors=next(iter(factors), ""))
    return [read.adapter for read in found], bound
