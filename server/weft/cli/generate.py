"""`weft generate`: one prompt, one answer."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from weft.cli.connection import JsonOption, ServerOption, connected
from weft.cli.output import label, note, print_json, print_table, write
from weft.v1.endpoint import DEFAULT_SERVER

if TYPE_CHECKING:
    from weft.v1.generation_pb2 import AdapterGate, Finish, TokenLogprobs

_SHADES = " ░▒▓█"  # of a gate from 0 to 1
_BAR_CELLS = 20

AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ID[=WEIGHT]",
        help="Adapter that answers, or ID@DIGEST. May be repeated: they are added, each times its weight (default 1).",
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(metavar="N", min=1, help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(metavar="X", min=0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float | None, typer.Option(metavar="X", min=0, max=1, help="Keep the likeliest tokens that add up to this.")
]
TopK = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Keep this many of the likeliest tokens; 0 keeps all.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, help="The same seed draws the same tokens.")]


def command(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")] = "-",
    adapter: AdapterOption = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=0, help="Fewest tokens to generate.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="X", min=0, max=1, help="Drop tokens below this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1 discourages repetition.")
    ] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends the answer. May be repeated.")
    ] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Keep the stop text in the answer.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the end-of-text token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Print log-probabilities, with the N likeliest alternatives.")
    ] = None,
    gates: Annotated[
        bool, typer.Option("--show-gates", help="Draw the gates of adapters or a mixture's experts.")
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--deadline", metavar="S", help="Seconds that the call may take.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print text as it comes. Default without --json.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    json: JsonOption = False,
) -> None:
    """Generate text from a prompt.

    One adapter answers, or several with weights, or the base alone. The answer is printed to standard output, and
    how it ended to standard error.

    Example: weft generate "…" --adapter polite=0.7 --adapter brief=0.3
    """
    if stream and json:
        raise typer.BadParameter("--json prints one whole answer; leave --stream out")
    asked = parameters_of(context)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    likely: list[TokenLogprobs] = []
    with connected(server) as client:
        if json or stream is False:
            completion = client.generate(text, target_of(adapter), **asked)
            if json:
                print_json(completion)
                return
            write(completion.text)
            likely += completion.logprobs
            finish = completion.finish
        else:
            with client.stream(text, target_of(adapter), **asked) as answer:
                for delta in answer:
                    write(delta.text)
                    likely += delta.logprobs
            finish = answer.finish
    write("\n")
    if likely:
        print_table(("token", "logprob", "likeliest"), map(_logprob_row, likely))
    if finish.gates:
        print_table(("expert", "layers", "mean", ""), map(_gate_row, finish.gates))
    note(ending(finish))


def parameters_of(context: typer.Context) -> dict[str, Any]:
    """Return the arguments of a command that are parameters of an answer: they have the client's names."""
    from weft.client import Parameters

    return {name: value for name, value in context.params.items() if name in Parameters.__annotations__}


def target_of(adapters: list[str] | None) -> str | Mapping[str, float] | None:
    """Return what `--adapter` selects: None is the base, an id one adapter, a mapping a composition with weights."""
    if not adapters:
        return None
    if len(adapters) == 1 and "=" not in adapters[0]:
        return adapters[0]
    weights: dict[str, float] = {}
    for text in adapters:
        adapter_id, separator, weight = text.partition("=")
        if adapter_id in weights:
            raise typer.BadParameter(f"--adapter {adapter_id} is given twice")
        try:
            weights[adapter_id] = float(weight) if separator else 1.0
        except ValueError:
            raise typer.BadParameter(f"--adapter must be ID or ID=WEIGHT, given {text!r}") from None
    return weights


def ending(finish: "Finish") -> str:
    """Describe in one line how an answer ended."""
    parts = [
        label(finish, "finish_reason"),
        f"{finish.usage.prompt_tokens} + {finish.usage.completion_tokens} tokens",
        f"seed {finish.seed}",
    ]
    for adapter in finish.effective_adapters:
        weight = "" if adapter.weight == 1 else f" × {adapter.weight:g}"
        parts.append(f"{adapter.adapter_id}@{adapter.digest[:12]}{weight}")
    return " · ".join(parts)


def _logprob_row(token: "TokenLogprobs") -> tuple[str, str, str]:
    top = "  ".join(f"{other.piece!r} {other.logprob:.3f}" for other in token.top)
    return repr(token.token.piece), f"{token.token.logprob:.3f}", top


def _gate_row(gate: "AdapterGate") -> tuple[str | Text, ...]:
    """Return name, a shaded cell for each layer (the first on the left), the mean, and a bar for it.

    An adapter without layers has only its bar. A gate above 0 is never blank.
    """
    last = len(_SHADES) - 1
    steps = (min(max(round(mean * last), 1 if mean > 0 else 0), last) for mean in gate.layer_means)
    cells = Text("".join(_SHADES[step] for step in steps), style="cyan")
    bar = Text("━" * round(_BAR_CELLS * min(max(gate.mean, 0.0), 1.0)), style="green")
    return gate.adapter_id or gate.digest[:12], cells, f"{gate.mean:.3f}", bar
