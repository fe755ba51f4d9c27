"""On a GPU: captured steps give the logits of plain ones, and the host waits for nothing but the results."""

import pytest
import torch

from tests import tiny
from tests.engine.decoding import Decoding
from tests.mixing.textbook_composition import Composition
from weft.engine import sampler
from weft.engine.request import Request, RequestId, SamplingParams
from weft.kernels.device import IN_PLACE, transfer_to
from weft.kernels.selection import Kernels
from weft.model import loader

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def _parts(base: loader.Base) -> list[Composition]:
    shape = base.shape
    return [
        [],
        [(tiny.random_lora(shape, rank=3, seed=1), 1.0)],
        [(tiny.random_lora(shape, rank=4, seed=2, targets=("lm_head", "q_proj")), 0.5)],
        [(tiny.random_ia3(shape, seed=3), 1.0)],
        [(tiny.random_prefix(shape, length=21, seed=4), 0.5)],
        [(tiny.random_dora(shape, rank=4, seed=5), 1.0), (tiny.random_lora(shape, rank=2, seed=6), 1.0)],
    ]


def test_replayed_graphs_give_the_logits_of_plain_steps(base: loader.Base, kernels: Kernels) -> None:
    plain, captured = Decoding(base, kernels), Decoding(base, kernels, num_captured_rows=32)
    for decoding in (plain, captured):
        decoding.start(_parts(base))
    for step in range(20):
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-3, atol=1e-4, msg=f"step {step}")
    graphs = captured.runner._captured
    assert graphs is not None
    assert len(graphs.shapes) == 1


def test_the_host_does_not_wait_in_a_captured_step(
    base: loader.Base, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    decoding = Decoding(base, kernels, num_captured_rows=32)
    decoding.start(_parts(base))
    decoding.step()
    request.getfixturevalue("no_waiting")
    decoding.step()


def test_the_host_does_not_wait_in_a_plain_step(
    base: loader.Base, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    decoding = Decoding(base, kernels)
    decoding.start(_parts(base))
    decoding.step()
    request.getfixturevalue("no_waiting")
    decoding.step()


def test_waiting_would_be_noticed(no_waiting: None) -> None:
    """Negative control."""
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


def test_tensors_go_up_and_come_back(request: pytest.FixtureRequest) -> None:
    transfer = transfer_to(DEVICE)
    request.getfixturevalue("no_waiting")
    given = [torch.randn(7), torch.arange(9), torch.empty(0, 3, dtype=torch.int32)]
    for number in range(20):  # each buffer is written again while the device may read the other
        moved = transfer.to_device([tensor + number for tensor in given])
        assert all(one.device == DEVICE for one in moved)
        for one, tensor in zip(moved, given, strict=True):
            assert transfer.to_host(one).equal(tensor + number)


def test_the_sampler_chooses_what_it_chooses_on_a_cpu(request: pytest.FixtureRequest) -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
    there = logits.to(DEVICE)
    there[4, 7] = logits[4, 7] = float("nan")

    def requests() -> list[Request]:
        wishes = [
            SamplingParams(temperature=0.0, logprobs=3),
            SamplingParams(temperature=0.8, top_k=9, seed=1),
            SamplingParams(temperature=1.2, top_p=0.7, seed=2, repetition_penalty=1.4),
            SamplingParams(temperature=0.0, min_new_tokens=2, stop_token_ids=frozenset({int(logits[3].argmax())})),
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0, min_p=0.1, seed=3, logprobs=0),
        ]
        return [
            Request(request_id=RequestId(str(row)), prompt_token_ids=(1, 2, 3), params=params)
            for row, params in enumerate(wishes)
        ]

    wanted = sampler.sample(logits, requests(), IN_PLACE)
    transfer = transfer_to(DEVICE)
    request.getfixturevalue("no_waiting")
    got = sampler.sample(there, requests(), transfer)
    assert [one and one.token_id for one in got] == [one and one.token_id for one in wanted]
    assert got[4] is None
    assert got[0] is not None
    assert wanted[0] is not None
    assert got[0].logprob == pytest.approx(wanted[0].logprob, abs=1e-4)
    assert [top.token_id for top in got[0].top] == [top.token_id for top in wanted[0].top]
