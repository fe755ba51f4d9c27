"""Adapters on the output head, whose rows are a step's sample rows and not all rows."""

import pytest
import torch

from tests import tiny
from tests.serving import BLOCK_SIZE, Row, Step
from weft.adapters import packed_adapter
from weft.engine.batch import Stepper
from weft.engine.request import AdapterDigest, AdapterUse, Request, RequestId, SamplingParams
from weft.engine.scheduler import Scheduled
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.model import loader


@pytest.fixture(scope="module", params=["llama", "gpt2"])  # a head of its own, and one tied to the embedding
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def _kernels(name: str, base: loader.Base) -> Kernels:
    return REFERENCE if name == "reference" else select(base.device, base.dtype)


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_rows_that_sample_get_their_own_adapter(kernels: str, base: loader.Base) -> None:
    """Requests of unequal length, some without an adapter, some with an adapter that leaves the head alone."""
    step = Step(base, _kernels(kernels, base))
    adapters = [
        tiny.random_lora(base.shape, rank=3, seed=1, targets=("lm_head",)),
        None,
        tiny.random_dora(base.shape, rank=2, seed=2, targets=("lm_head",)),
        tiny.random_lora(base.shape, rank=2, seed=3),
        tiny.random_prefix(base.shape, length=3, seed=4),
        tiny.random_lora(base.shape, rank=1, seed=5, targets=("lm_head",), lora_bias=True),
    ]
    rows = [Row(list(range(30, 30 + length)), one) for length, one in zip((5, 1, 9, 3, 2, 7), adapters, strict=True)]
    last = step.logits(rows, last_only=True)
    for row, got in zip(rows, last, strict=True):
        (alone,) = step.logits([row])
        torch.testing.assert_close(got[0], alone[-1], atol=1e-4, rtol=0)
    # Negative control: entries counted as if every row were a sample row would give another row's adapter.
    (other,) = step.logits([rows[0]._replace(adapter=adapters[2])])
    assert (last[0][0] - other[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("kernels", ["reference", "selected"])
@pytest.mark.parametrize("num_new", [0, 1])
def test_a_step_in_which_no_adapter_row_samples(kernels: str, num_new: int, base: loader.Base) -> None:
    """A chunk of a prompt with a head adapter, alone or beside a request of the base that samples."""
    step = Step(base, _kernels(kernels, base))
    slot = step.runner.slots.put(
        packed_adapter.build(
            tiny.random_lora(base.shape, rank=3, seed=1, targets=("lm_head",)), base.shape, dtype=base.dtype
        )
    )
    assert slot is not None
    chunked = Request(
        request_id=RequestId("chunk"),
        prompt_token_ids=tuple(range(30, 40)),
        params=SamplingParams(),
        adapters=(AdapterUse(AdapterDigest("g"), 1.0, 0),),
    )
    plain = Request(request_id=RequestId("plain"), prompt_token_ids=(5, 6, 7), params=SamplingParams())
    scheduled = [Scheduled(chunked, 4), *([Scheduled(plain, 3)] if num_new else [])]
    for one, num_tokens in scheduled:
        assert step.blocks.grow(one, num_tokens)
    got = Stepper(step.runner, BLOCK_SIZE).compute(scheduled, {chunked: (slot,), plain: ()})
    assert got.shape == (num_new, tiny.VOCAB_SIZE)
    if num_new:
        (wanted,) = step.logits([Row([5, 6, 7])])
        torch.testing.assert_close(got[0], wanted[-1], atol=1e-4, rtol=0)
