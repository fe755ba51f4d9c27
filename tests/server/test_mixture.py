"""Mixtures through the API: what a request holds, what answers, what makes it fail as a whole, and what is told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.conftest import Sources
from tests.server.live import LiveServer
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams
from weft.v1 import adapter_pb2, generation_pb2

TEXT = "A prompt that is long enough to fill several blocks of keys and values with what its experts made of it."
LONG = 12
GATES = generation_pb2.ResponseOptions(token_ids=True, gates=True)

Register = Callable[[str, Path], str]


def write_mixture(
    path: Path, sources: Sources, experts: dict[str, str], *, seed: int = 1, scale: float = 0.5, **config: Any
) -> Path:
    """A random router over experts: ids by generation."""
    made = MixtureConfig(num_experts=len(experts), **{"top_k": 2, **config})
    shape = (1 if made.shared else sources.base.num_layers, made.num_choices, sources.base.embedding_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    named = tuple(Expert(generation, adapter_id) for generation, adapter_id in experts.items())
    mixture_files.write(Mixture(made, MixtureParams(weight), named), path, sources.base)
    return path


@pytest.fixture
def registered(server: LiveServer) -> Iterator[Register]:
    """Registers a source until the test ends; gives its generation."""
    ids: list[str] = []

    def register(adapter_id: str, source: Path) -> str:
        generation = server.client.register(adapter_id, source).adapter.generation
        ids.append(adapter_id)
        return generation

    yield register
    for adapter_id in reversed(ids):
        server.client.unregister(adapter_id, allow_missing=True)


@pytest.fixture
def experts(registered: Register, sources: Sources) -> dict[str, str]:
    """Ids by generation, in the order of the generations: two LoRAs and an IA³ that are nobody else's."""
    names = {"first": "lora-21", "second": "lora-22", "third": "ia3-23"}
    return dict(sorted((registered(name, sources(source)), name) for name, source in names.items()))


@pytest.fixture
def mixed(registered: Register, sources: Sources, experts: dict[str, str], tmp_path: Path) -> str:
    """A mixture of them is registered; its id."""
    registered("mixed", write_mixture(sources.root / tmp_path.name, sources, experts))
    return "mixed"


def test_a_mixture_is_registered_answers_and_is_described(
    server: LiveServer, mixed: str, experts: dict[str, str]
) -> None:
    told = server.client.get(mixed)
    assert (told.method, told.state) == ("mixture", adapter_pb2.ADAPTER_STATE_ACTIVE)
    assert [(e.generation, e.adapter_id, e.available) for e in told.experts] == [(*e, True) for e in experts.items()]
    answer = server.client.generate(mixed, LONG, text=TEXT, options=GATES)
    (effective,) = answer.finish.effective_adapters
    assert (effective.adapter_id, effective.generation, effective.method) == (mixed, told.generation, "mixture")
    assert [(gate.generation, gate.adapter_id) for gate in answer.finish.gates] == list(experts.items())
    means = torch.tensor([gate.layer_means for gate in answer.finish.gates])
    assert means.shape == (3, server.model.shape.num_layers)
    torch.testing.assert_close(means.sum(0), torch.ones(server.model.shape.num_layers))
    assert answer.tokens == server.client.tokens(mixed, LONG, text=TEXT)
    others = [server.client.tokens(other, LONG, text=TEXT) for other in (None, *experts.values())]
    assert answer.tokens not in others, "negative control"


def test_one_expert_alone_is_that_adapter(server: LiveServer, mixed: str, experts: dict[str, str]) -> None:
    """Steered to one expert all gates are exactly 1, and the answer is the adapter's; by id and by generation."""
    for generation, name in experts.items():
        wanted = server.client.tokens(name, LONG, text=TEXT)
        for spelled in (name, generation, f"{name}@{generation}"):
            steering = generation_pb2.Steering(restrict=[spelled])
            assert server.client.tokens(mixed, LONG, text=TEXT, steering=steering) == wanted
        others = [other for other in experts.values() if other != name]
        assert server.client.tokens(mixed, LONG, text=TEXT, steering=generation_pb2.Steering(mask=others)) == wanted
