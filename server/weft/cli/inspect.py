"""`weft inspect`: the cost of each method on a base, or the contents of an adapter. It needs no server."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli import adapter_directory
from weft.cli.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from weft.cli.handover import imported
from weft.cli.output import fail, print_facts, print_line, print_table, size
from weft.config import ModelConfig, Quantization, typed_path
from weft.settings import build


def command(
    path: Annotated[
        Path, typer.Argument(help="A base model, or an adapter's PEFT directory.", parser=typed_path, metavar="PATH")
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            help="[adapter] The model directory that it is for.", show_default=False, parser=typed_path, metavar="MODEL"
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="[base] Compare this method; may be repeated. All by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="[base] Timed forward passes; 0 measures nothing.")] = 15,
    quantization: Annotated[Quantization, typer.Option(help="How the base is held.")] = Quantization.NF4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Compare the methods on a base model, or inspect an adapter."""
    from weft.errors import WeftError

    try:
        values = {"path": base or path, "quantization": quantization, "device": device}
        config = build(ModelConfig, values, "--{}".format)
        if (path / CONFIG_FILE).is_file():
            if base is None:
                raise fail(f"--base: must name the model directory that {path} is for", code=2)
            _tell_adapter(path, config, as_json)
        else:
            if base is not None:
                raise fail(f"--base: is for adapters, and {path} holds no {CONFIG_FILE}", code=2)
            _tell_base(config, method or [], repeats, as_json)
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None


# -- a base ------------------------------------------------------------------------------------------------------------


def _tell_base(config: ModelConfig, methods: list[str], repeats: int, as_json: bool) -> None:
    comparison = imported("weft_training.comparison")
    from weft.model import loader

    base = loader.load(config, attention="sdpa")
    found = comparison.compare(base, methods, repeats=repeats)
    if as_json:
        told = {
            "base": base.shape.name,
            "digest": base.shape.digest,
            "quantization": base.quantization.value,
            "dtype": str(base.dtype).removeprefix("torch."),
            "num_parameters": found.num_parameters,
            "forward_s_measured": found.forward_s,
            "num_tokens_of_forward": found.num_tokens,
            "methods": [
                {
                    "method": one.method,
                    "config": one.config,
                    "formula": one.count and one.count.symbols,
                    "numbers": one.count and one.count.numbers,
                    "num_parameters_by_formula": one.count and one.count.total,
                    "num_parameters": one.num_parameters,
                    "ratio": one.ratio,
                    "slot_bytes": one.slot_bytes,
                    "overhead_measured": one.overhead,
                }
                for one in found.methods
            ],
        }
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    print_facts(
        {
            "base": base.shape.name,
            "digest": base.shape.digest,
            "held as": f"{base.quantization.value}, {str(base.dtype).removeprefix('torch.')}, on {base.device}",
            "parameters": f"{found.num_parameters:,} (full fine-tuning, ratio 1)",
            "forward": ""
            if found.forward_s is None
            else f"{found.forward_s * 1e3:.1f} ms for {found.num_tokens} tokens, measured",
        }
    )
    print_line("")
    columns = ["method", "parameters", "ratio", "slot", "formula", "with this base's numbers"]
    if repeats:
        columns.insert(4, "overhead, measured")
    table = []
    for one in found.methods:
        cells = [
            one.method,
            f"{one.num_parameters:,}",
            f"{one.ratio:,.0f}x",
            size(one.slot_bytes),
            one.count.symbols if one.count else "",
            one.count.numbers if one.count else "",
        ]
        if one.overhead is not None:
            cells.insert(4, f"{one.overhead:+.0%}")
        table.append(cells)
    print_table(columns, table)
    print_line("")
    print_facts({one.method: one.config for one in found.methods})


# -- an adapter --------------------------------------------------------------------------------------------------------


def _tell_adapter(path: Path, config: ModelConfig, as_json: bool) -> None:
    from weft.adapters import packed_adapter
    from weft.methods import targets
    from weft.model import loader

    base = loader.load(config, attention="sdpa")
    adapter, digest, _ = adapter_directory.read(path, base.shape)
    held_as = base.shape.same_weights.get(digest or "", "")
    matches = None if digest is None else bool(held_as) or digest == base.shape.digest
    places = {**adapter.sites, **({} if adapter.prefix is None else {"": adapter.prefix})}
    norms = [
        (name, measure, norm)
        for name, params in places.items()
        for measure, norm in adapter.method.norms(params).items()
    ]
    slot_bytes = packed_adapter.build(adapter, base.shape, dtype=base.dtype).size_bytes
    modules = targets.describe(adapter.sites, base.shape)
    if as_json:
        told: dict[str, Any] = {
            "method": adapter.method.name,
            "rank": adapter.rank,
            "num_virtual_tokens": adapter.num_virtual_tokens,
            "modules": modules,
            "num_parameters": adapter.num_parameters,
            "file_bytes": (path / WEIGHTS_FILE).stat().st_size,
            "slot_bytes": slot_bytes,
            "base_digest": base.shape.digest,
            "trained_for_digest": digest,
            "base_matches": matches,
            "trained_quantization": held_as or None,
            "norms": [{"site": name or None, "measure": measure, "norm": norm} for name, measure, norm in norms],
        }
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    print_facts(
        {
            "method": adapter.method.name,
            "rank": str(adapter.rank or ""),
            "virtual tokens": str(adapter.num_virtual_tokens or ""),
            "modules": ", ".join(modules),
            "parameters": f"{adapter.num_parameters:,}",
            "file": size((path / WEIGHTS_FILE).stat().st_size),
            "slot": size(slot_bytes),
            "base": {
                None: f"{base.shape.name}: the shapes fit; the file names no base",
                True: f"{base.shape.name}: the one that it was trained for"
                + (f", whose weights were held as {held_as} then" if held_as else ""),
                False: f"{base.shape.name}: NOT the one that it was trained for; a server refuses it "
                f"(trained for {(digest or '')[:12]}…, this is {base.shape.digest[:12]}…)",
            }[matches],
            "norm of all": f"{math.hypot(*(norm for _, _, norm in norms)):.4g}",
        }
    )
    print_line("")
    print_table(("site", "measure", "norm"), ((name, measure, f"{norm:.4g}") for name, measure, norm in norms))
