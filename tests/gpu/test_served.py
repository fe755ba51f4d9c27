"""On a GPU: bases in the forms in which they are served, 16-bit and quantized, with groups, adapters and mixtures.

The bodies are those of tests/kernels/test_cpu_capture.py (tests/engine/captured.py).
"""

import pytest

from tests.bases import Bases
from tests.engine.captured import (
    ALL,
    NAMES,
    Held,
    check_captured_many,
    check_captured_mix,
    check_groups,
    check_kernels,
)
from weft.kernels.selection import Kernels, select
from weft.model import loader

pytestmark = pytest.mark.gpu

Served = tuple[loader.Base, Kernels, Held]


@pytest.fixture(scope="module", params=ALL, ids=NAMES)
def given(request: pytest.FixtureRequest, bases: Bases) -> Served:
    held: Held = request.param
    base = bases.served("llama", held.quantization, held.dtype, device="cuda")
    kernels = select(base.device, base.dtype)
    assert kernels.capture is not None
    return base, kernels, held


def test_what_reads_one_input_is_one_product(given: Served) -> None:
    check_groups(given[0])


def test_prompts_of_compositions_and_mixtures_give_the_references_logits(given: Served) -> None:
    check_kernels(*given)


def test_replayed_graphs_give_the_logits_and_gates_of_plain_steps(given: Served) -> None:
    check_captured_mix(*given)


def test_graphs_of_many_rows_do(given: Served) -> None:
    check_captured_many(*given)
