"""From a recipe to an answer: the trainer's model and a server give the same answers with a mixture."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.bases import load
from tests.server.conftest import Sources
from tests.server.live import LiveServer
from weft.methods.mixture import Level
from weft.v1 import generation_pb2
from weft_training import expert as experts
from weft_training import output
from weft_training.config import TrainConfig
from weft_training.data import IGNORED, Example
from weft_training.mixture import MixtureModel, MixtureTrainConfig, TrainedMixture
from weft_training.trainer import train

TEXT = "backwards: loom = "
EXAMPLES = [Example(f"{cue}: {word} = ", word) for cue in ("backwards", "again") for word in ("loom", "weft", "thread")]
NUM_TOKENS = 8


@pytest.mark.parametrize("level", list(Level))
def test_a_trained_mixture_answers_in_a_server_as_in_training(
    server: LiveServer, sources: Sources, tmp_path: Path, level: Level
) -> None:
    trains_experts = level is Level.SEQUENCE
    model = replace(server.config.model, num_threads=1)
    made = sources.root / f"{tmp_path.name}-made"
    paths = tuple(sources(name) for name in ("lora-31", "lora-32", "ia3-33"))
    adapter = MixtureTrainConfig(experts=paths, level=level, top_k=3, train_experts=trains_experts)
    config = TrainConfig(model=model, adapter=adapter, output=made, num_steps=8, batch_size=6, learning_rate=5e-3)
    train(config, examples=EXAMPLES)
    if trains_experts:
        paths = tuple(sorted((made / output.EXPERTS).iterdir()))

    base = load(model.path, model.quantization, model.dtype, attention="eager")
    held = experts.read(paths, base.shape)
    mixture = output.read_mixture(made, base.shape)
    assert [one.digest for one in mixture.experts] == [one.digest for one in held]
    trained = MixtureModel(base, TrainedMixture(mixture.config, mixture.params, held, writes_experts=False))

    registered = [f"expert-{index}" for index in range(len(paths))]
    try:
        for name, path in zip(registered, paths, strict=True):
            server.client.register(name, path)
        server.client.register("mixture", made)
        options = generation_pb2.ResponseOptions(token_ids=True, gates=True)
        answer = server.client.generate("mixture", NUM_TOKENS, text=TEXT, options=options)
        alone = [server.client.tokens(name, NUM_TOKENS, text=TEXT) for name in (None, *registered)]
    finally:
        for name in ("mixture", *reversed(registered)):
            server.client.unregister(name, allow_missing=True)
    prompt = base.tokenizer(TEXT)["input_ids"]

    def behind(tokens: Sequence[int]) -> float:
        """Return how far the logits of these tokens, one after the other, are below the largest in training."""
        whole = torch.tensor([[*prompt, *tokens]])
        labels = whole.clone()
        labels[:, : len(prompt)] = IGNORED
        with torch.no_grad():
            logits = trained(whole, torch.ones_like(whole), labels).logits[0, len(prompt) - 1 : -1].float()
        return (logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max().item()

    # Slots hold bfloat16 and training float32: greedy answers may part where two tokens are nearly as likely. All three
    # experts keep a gate, since a rounding that changes who does would change the answer.
    assert behind(answer.tokens) < 0.5
    assert all(behind(tokens) > 1 for tokens in alone), "negative control"
    if level is Level.SEQUENCE:  # the gates of all tokens are one
        served = torch.tensor([gate.layer_means for gate in answer.finish.gates])  # [N, L]
        gates = torch.stack([layer[-1] for layer in trained.router.gates], dim=1)
        torch.testing.assert_close(served, gates, atol=5e-3, rtol=0)
        assert gates.std() > 0.01, "negative control"
