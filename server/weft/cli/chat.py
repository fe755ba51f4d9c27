"""`weft chat`: a conversation in the terminal."""

from typing import TYPE_CHECKING, Any

import typer

from weft.cli import generate
from weft.cli.connection import ServerOption, connected, hint_for
from weft.cli.output import fail, note, print_error, write
from weft.v1.endpoint import DEFAULT_SERVER

if TYPE_CHECKING:
    from weft.client import Client

_HELP = "/adapter ID[=WEIGHT] … switches, /adapter alone returns to the base; /clear starts again; /exit ends"


def command(
    context: typer.Context,
    adapter: generate.AdapterOption = None,
    system: str = typer.Option("", help="System message that opens the conversation."),
    max_new_tokens: generate.MaxNewTokens = None,
    temperature: generate.Temperature = None,
    top_p: generate.TopP = None,
    top_k: generate.TopK = None,
    seed: generate.Seed = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Chat with the model, with any adapter for each message."""
    asked = generate.parameters_of(context)
    target = generate.target_of(adapter)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with connected(server) as client:
        if not client.model_info().has_chat_template:
            raise fail("the base model has no chat template", hint="`weft generate` takes plain prompts")
        note(_HELP)
        while (line := _asked()) is not None:
            match line.split():
                case []:
                    pass
                case ["/exit"]:
                    return
                case ["/clear"]:
                    messages = list(opening)
                case ["/adapter", *adapters]:
                    try:
                        target = generate.target_of(adapters)
                    except typer.BadParameter as error:
                        print_error(str(error))
                case [command, *_] if command.startswith("/"):
                    note(_HELP)
                case _:
                    said = [*messages, {"role": "user", "content": line}]
                    answer = _answered(client, server, said, target, asked)
                    if answer is not None:
                        messages = [*said, {"role": "assistant", "content": answer}]


def _asked() -> str | None:
    """Return the next line, or None at the end of the input or after an interrupt."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return None


def _answered(
    client: "Client", server: str, messages: list[dict[str, str]], target: Any, asked: dict[str, Any]
) -> str | None:
    """Write the answer as it arrives, and return it; None if it failed or was interrupted.

    Neither ends the conversation.
    """
    from weft.client import RpcFailure

    parts: list[str] = []
    try:
        with client.stream(messages, target, **asked) as answer:
            for delta in answer:
                write(delta.text)
                parts.append(delta.text)
    except RpcFailure as failure:
        write("\n")
        print_error(str(failure), hint=hint_for(failure.failure, server))
        return None
    except KeyboardInterrupt:
        write("\n")
        note("interrupted")
        return None
    write("\n")
    note(generate.ending(answer.finish))
    return "".join(parts)
