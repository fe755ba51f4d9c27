"""`weft info`: the base model of a server and its limits."""

from typing import TYPE_CHECKING

from weft.cli.connection import JsonOption, ServerOption, connected
from weft.cli.output import print_facts, print_json, print_line, print_table, size
from weft.v1.endpoint import DEFAULT_SERVER

if TYPE_CHECKING:
    from weft.v1.model_pb2 import ModelInfo


def command(server: ServerOption = DEFAULT_SERVER, json: JsonOption = False) -> None:
    """Describe a server: its base model, and its limits on adapters and requests."""
    with connected(server) as client:
        model = client.model_info()
    if json:
        print_json(model)
        return
    print_facts(_facts(model))
    print_line("")
    print_table(
        ("site", "modules", "in", "out"),
        ((site.suffix, str(site.num_modules), str(site.in_features), str(site.out_features)) for site in model.sites),
    )


def _facts(model: "ModelInfo") -> dict[str, str]:
    adapters, requests = model.adapter_limits, model.request_limits
    return {
        "model": model.model_name,
        "digest": model.base_digest,
        "held as": f"{model.quantization}, {model.dtype}, on {model.device}",
        "weights": f"{size(model.quantized_weight_bytes)} quantized, {size(model.unquantized_weight_bytes)} not",
        "context": f"{model.max_model_len} tokens, vocabulary {model.vocab_size}, {model.num_layers} layers",
        "chat template": "yes" if model.has_chat_template else "no",
        "methods": ", ".join(model.methods),
        "adapter": f"at most {size(adapters.file_bytes_max)}, rank {adapters.rank_max}, "
        f"{adapters.num_virtual_tokens_max} virtual tokens",
        "request": f"at most {size(requests.prompt_bytes_max)} of prompt, {requests.max_new_tokens_max} new tokens "
        f"({requests.max_new_tokens_default} by default)"
        + (f", {requests.deadline_max.ToTimedelta().total_seconds():g} s" if requests.HasField("deadline_max") else ""),
        "server": f"weft {model.version}",
    }
