"""`weft adapters …`: the adapters registered on a server, and their place in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weft.cli import handover
from weft.cli.connection import JsonOption, ServerOption, connected
from weft.cli.output import console, label, moment, print_facts, print_json, print_line, print_table, size
from weft.v1.endpoint import DEFAULT_SERVER

if TYPE_CHECKING:
    from weft.v1.adapter_pb2 import Adapter, Expert

app = typer.Typer(
    help="Register, list, load and remove the adapters of a server.", no_args_is_help=True, rich_markup_mode=None
)

for _name, _help in {
    "convert": "Convert an adapter, such as AdapterHub's bottlenecks, to a form that servers accept.",
    "merge": "Merge LoRAs into one PEFT directory that any server accepts.",
    "arrow": "Make an Arrow router over LoRA adapters, without training.",
}.items():
    _command = handover.to("weft_training.tools.commands", "app", "weft adapters", _name)
    app.command(_name, help=_help, **handover.SETTINGS)(_command)

AdapterId = Annotated[str, typer.Argument(metavar="ID", help="Id of the adapter.")]
ExpectedDigest = Annotated[str | None, typer.Option(metavar="G", help="Proceed only if the id is at this digest.")]

_COLUMNS = ("id", "method", "state", "residency", "rank/tokens", "size", "in flight", "digest")
_DIGEST_CHARACTERS = 12


@app.command()
def add(
    adapter_id: AdapterId,
    path: Annotated[Path | None, typer.Argument(metavar="PATH", help="Local PEFT directory to upload.")] = None,
    source: Annotated[
        str | None, typer.Option(metavar="REL", help="Directory on the server, relative to its store, instead of PATH.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the content of an id that is taken.")] = False,
    expected_digest: Annotated[
        str | None, typer.Option(metavar="G", help='Proceed only if the id is at this digest; "" if it is free.')
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Pin the adapter to the device.")] = False,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything; register nothing.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Register an adapter: upload a local directory, or name one that the server can read."""
    if (path is None) == (source is None):
        raise typer.BadParameter("give PATH or --source, one of the two")
    how: dict[str, Any] = {
        "replace": replace,
        "expected_digest": expected_digest,
        "pin": pin,
        "validate_only": validate_only,
    }
    with connected(server) as client:
        if path is None:
            registered = client.register(adapter_id, source or "", **how)
        else:
            with _progress(adapter_id) as progress:
                registered = client.upload(adapter_id, path, progress=progress, **how)
    outcome = label(registered, "outcome")
    print_line(f"{'would be ' if validate_only else ''}{outcome}: {_line(registered.adapter)}")


@app.command("ls")
def list_adapters(
    method: Annotated[str, typer.Option(help="Only adapters of this method, such as lora.")] = "",
    state: Annotated[str, typer.Option(help="Only adapters in this state, such as active.")] = "",
    server: ServerOption = DEFAULT_SERVER,
    json: JsonOption = False,
) -> None:
    """List the registered adapters."""
    with connected(server) as client:
        found = client.adapters(method=method, state=state)
    if json:
        print_json(found)
    else:
        print_table(_COLUMNS, map(_row, found))


@app.command()
def show(adapter_id: AdapterId, server: ServerOption = DEFAULT_SERVER, json: JsonOption = False) -> None:
    """Show one adapter in full."""
    with connected(server) as client:
        adapter = client.adapter(adapter_id)
    if json:
        print_json(adapter)
    else:
        print_facts(_facts(adapter))


@app.command("rm")
def remove(
    adapter_id: AdapterId,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel its requests at once.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Seconds in which its requests may finish.")
    ] = None,
    expected_digest: ExpectedDigest = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Succeed if it is not registered.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Remove an adapter; return when nothing of it is left in memory."""
    if not yes:
        typer.confirm(f"Remove {adapter_id} from {server}?", abort=True)
    with connected(server) as client:
        freed = client.unregister(
            adapter_id,
            cancel=cancel,
            drain_timeout_s=timeout,
            allow_missing=allow_missing,
            expected_digest=expected_digest,
        )
    print_line(
        f"removed: {adapter_id}; freed {size(freed.freed_device_bytes)} on the device, "
        f"{size(freed.freed_host_bytes)} in host memory, {freed.freed_kv_blocks} KV blocks; "
        f"{freed.cancelled_requests} requests cancelled"
    )


@app.command()
def load(
    adapter_id: AdapterId,
    to: Annotated[Literal["device", "host"], typer.Option(help="Memory to load it into.")] = "device",
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Pin it to the device, or unpin it.")] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Load an adapter into memory, so that its first request need not wait."""
    with connected(server) as client:
        print_line(f"loaded: {_line(client.load(adapter_id, to, pin=pin))}")


@app.command()
def unload(
    adapter_id: AdapterId,
    to: Annotated[Literal["host", "disk"], typer.Option(help="Where a copy stays.")] = "disk",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Free the memory of an adapter; it stays registered."""
    with connected(server) as client:
        print_line(f"unloaded: {_line(client.unload(adapter_id, to))}")


@app.command("lift")
def lift_quarantine(
    adapter_id: AdapterId, expected_digest: ExpectedDigest = None, server: ServerOption = DEFAULT_SERVER
) -> None:
    """Put an adapter in service again that is quarantined."""
    with connected(server) as client:
        print_line(f"lifted: {_line(client.lift_quarantine(adapter_id, expected_digest=expected_digest))}")


@app.command()
def watch(server: ServerOption = DEFAULT_SERVER, json: JsonOption = False) -> None:
    """Print every change of the adapters, until interrupted."""
    with connected(server) as client, client.watch() as changes:
        for event in changes:
            if json:
                print_json(event, indent=None)
                continue
            time = datetime.now().astimezone().strftime("%H:%M:%S")
            adapter = f" {_line(event.adapter)}" if event.HasField("adapter") else ""
            print_line(f"{time} {label(event, 'change'):8}{adapter}")


@contextmanager
def _progress(adapter_id: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error if that is a terminal; yield its update function."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    errors = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task_id = bar.add_task(f"uploading {adapter_id}", total=None)
        yield lambda sent_bytes, size_bytes: bar.update(task_id, completed=sent_bytes, total=size_bytes)


def _row(adapter: "Adapter") -> tuple[str, ...]:
    """Return the cells of `_COLUMNS`."""
    return (
        adapter.adapter_id,
        adapter.method,
        _state(adapter),
        _residency(adapter),
        str(adapter.rank or adapter.num_virtual_tokens or "-"),
        size(adapter.size_bytes),
        str(adapter.in_flight_requests),
        adapter.digest[:_DIGEST_CHARACTERS],
    )


def _line(adapter: "Adapter") -> str:
    return f"{adapter.adapter_id} {adapter.method} {_state(adapter)}, {_residency(adapter)}, {adapter.digest}"


def _facts(adapter: "Adapter") -> dict[str, str]:
    draining = (f"{old.digest}: {old.in_flight_requests} in flight" for old in adapter.draining_versions)
    return {
        "id": adapter.adapter_id,
        "digest": adapter.digest,
        "method": adapter.method,
        "state": _state(adapter),
        "residency": _residency(adapter),
        "rank": str(adapter.rank or ""),
        "virtual tokens": str(adapter.num_virtual_tokens or ""),
        "invoked by tokens": " ".join(map(str, adapter.invocation_tokens)),
        "parameters": f"{adapter.num_parameters:,}",
        "modules": ", ".join(adapter.modules),
        "size": size(adapter.size_bytes),
        "in memory": size(adapter.resident_bytes),
        "in flight": str(adapter.in_flight_requests),
        "registered": moment(adapter.create_time) if adapter.HasField("create_time") else "",
        "last used": moment(adapter.last_used_time) if adapter.HasField("last_used_time") else "",
        "trained on": _trained_on(adapter),
        "draining": "\n".join(draining),
        "experts": "\n".join(map(_expert, adapter.experts)),
    }


def _trained_on(adapter: "Adapter") -> str:
    if not adapter.trained_quantization:
        return adapter.base_model_name
    held_as = "unquantized" if adapter.trained_quantization == "none" else adapter.trained_quantization
    return f"{adapter.base_model_name} {held_as}; this server holds the same weights otherwise".lstrip()


def _expert(expert: "Expert") -> str:
    unavailable = "" if expert.available else " (not available)"
    return f"{expert.adapter_id or '?'}@{expert.digest}{unavailable}"


def _state(adapter: "Adapter") -> str:
    state = label(adapter, "state")
    return f"{state} ({adapter.state_reason})" if adapter.state_reason else state


def _residency(adapter: "Adapter") -> str:
    residency = label(adapter, "residency")
    return f"{residency} (pinned)" if adapter.pinned else residency
