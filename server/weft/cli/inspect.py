"""`weft inspect`: the cost of each method on a base, or the contents of an adapter. It needs no server."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import adapter_directory
from weft.cli.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from weft.cli.handover import imported
from weft.cli.output import fail, print_facts, print_json, print_line, print_table, size
from weft.config import ModelConfig, Quantization, typed_path
from weft.settings import build

if TYPE_CHECKING:
    from weft.methods.protocol import Adapter


def command(
    path: Annotated[
        Path, typer.Argument(help="A base model, or an adapter's PEFT directory.", parser=typed_path, metavar="PATH")
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            help="[adapter] Model directory of its base.", show_default=False, parser=typed_path, metavar="MODEL"
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="[base] Compare this method; may be repeated. All by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="[base] Forward passes to time; 0 for none.")] = 15,
    quantization: Annotated[Quantization, typer.Option(help="Quantization of the base.")] = Quantization.NF4,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare the methods on a base model, or inspect an adapter."""
    from weft.errors import WeftError

    try:
        values = {"path": base or path, "quantization": quantization, "device": device}
        config = build(ModelConfig, values, "--{}".format)
        if (path / CONFIG_FILE).is_file():
            if base is None:
                raise fail(f"--base: must name the model directory that {path} is for", code=2)
            _report_adapter(path, config, as_json)
        else:
            if base is not None:
                raise fail(f"--base: is for adapters, and {path} holds no {CONFIG_FILE}", code=2)
            _report_base(config, method or [], repeats, as_json)
    except (ValueError, OSError, WeftError) as error:
        raise fail(str(error)) from None


# -- a base ------------------------------------------------------------------------------------------------------------


def _report_base(config: ModelConfig, methods: list[str], repeats: int, as_json: bool) -> None:
    comparison = imported("weft_training.comparison")
    from weft.model import loader

    base = loader.load(config, attention="sdpa")
    found = comparison.compare(base, methods, repeats=repeats)
    facts = {
        "base": base.shape.name,
        "digest": base.shape.digest,
        "quantization": base.quantization.value,
        "dtype": str(base.dtype).removeprefix("torch."),
    }
    if as_json:
        measured = {
            "num_parameters": found.num_parameters,
            "forward_s_measured": found.forward_s,
            "num_tokens_of_forward": found.num_tokens,
            "methods": [_as_json(one) for one in found.methods],
        }
        print_json(facts | measured)
        return
    forward = (
        "" if found.forward_s is None else f"{found.forward_s * 1e3:.1f} ms for {found.num_tokens} tokens, measured"
    )
    print_facts(
        {
            "base": facts["base"],
            "digest": facts["digest"],
            "held as": f"{facts['quantization']}, {facts['dtype']}, on {base.device}",
            "parameters": f"{found.num_parameters:,} (full fine-tuning, ratio 1)",
            "forward": forward,
        }
    )
    print_line("")
    columns = ["method", "parameters", "ratio", "slot", "formula", "with this base's numbers"]
    if repeats:
        columns.insert(4, "overhead, measured")
    print_table(columns, map(_cells, found.methods))
    print_line("")
    print_facts({one.method: one.config for one in found.methods})


def _as_json(one: Any) -> dict[str, Any]:
    """Return one method's numbers (weft_training.comparison) under the keys of the JSON form."""
    return {
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


def _cells(one: Any) -> list[str]:
    """Return one method's row of the table."""
    overhead = [] if one.overhead is None else [f"{one.overhead:+.0%}"]
    formula = [one.count.symbols, one.count.numbers] if one.count else ["", ""]
    return [one.method, f"{one.num_parameters:,}", f"{one.ratio:,.0f}x", size(one.slot_bytes), *overhead, *formula]


# -- an adapter --------------------------------------------------------------------------------------------------------


def _report_adapter(path: Path, config: ModelConfig, as_json: bool) -> None:
    from weft.adapters import packed_adapter
    from weft.methods import targets
    from weft.model import loader

    base = loader.load(config, attention="sdpa")
    adapter, digest, _ = adapter_directory.read(path, base.shape)
    held_as = base.shape.same_weights.get(digest or "", "")
    norms = _norms(adapter)
    slot_bytes = packed_adapter.build(adapter, base.shape, dtype=base.dtype).size_bytes
    modules = targets.describe(adapter.sites, base.shape)
    file_bytes = (path / WEIGHTS_FILE).stat().st_size
    if as_json:
        facts: dict[str, Any] = {
            "method": adapter.method.name,
            "rank": adapter.rank,
            "num_virtual_tokens": adapter.num_virtual_tokens,
            "modules": modules,
            "num_parameters": adapter.num_parameters,
            "file_bytes": file_bytes,
            "slot_bytes": slot_bytes,
            "base_digest": base.shape.digest,
            "trained_for_digest": digest,
            "base_matches": None if digest is None else bool(held_as) or digest == base.shape.digest,
            "trained_quantization": held_as or None,
            "norms": [{"site": name or None, "measure": measure, "norm": norm} for name, measure, norm in norms],
        }
        print_json(facts)
        return
    print_facts(
        {
            "method": adapter.method.name,
            "rank": str(adapter.rank or ""),
            "virtual tokens": str(adapter.num_virtual_tokens or ""),
            "modules": ", ".join(modules),
            "parameters": f"{adapter.num_parameters:,}",
            "file": size(file_bytes),
            "slot": size(slot_bytes),
            "base": f"{base.shape.name}: {_match(digest, held_as, base.shape.digest)}",
            "norm of all": f"{math.hypot(*(norm for _, _, norm in norms)):.4g}",
        }
    )
    print_line("")
    print_table(("site", "measure", "norm"), ((name, measure, f"{norm:.4g}") for name, measure, norm in norms))


def _norms(adapter: "Adapter") -> list[tuple[str, str, float]]:
    """Return (site, measure, norm) of every parameter; the site of virtual positions is ""."""
    places = {**adapter.sites, **({} if adapter.prefix is None else {"": adapter.prefix})}
    return [
        (name, measure, norm)
        for name, params in places.items()
        for measure, norm in adapter.method.norms(params).items()
    ]


def _match(trained_for: str | None, held_as: str, digest: str) -> str:
    """Compare an adapter's base with this one; held_as: how the same weights were held in training, or empty."""
    if trained_for is None:
        return "the shapes fit; the file names no base"
    if held_as or trained_for == digest:
        return "the one that it was trained for" + (f", whose weights were held as {held_as} then" if held_as else "")
    return (
        "NOT the one that it was trained for; a server refuses it "
        f"(trained for {trained_for[:12]}…, this is {digest[:12]}…)"
    )
