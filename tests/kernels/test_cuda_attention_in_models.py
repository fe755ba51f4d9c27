"""Attention for CUDA in whole steps of a tiny model: logits equal those with the reference."""

import pytest
from tests.bases import Bases
from tests.kernels.interpreted import DEVICE
from tests.mixing.compositions import FLOAT32_TOLERANCE
from tests.mixing.mixtures import mixtures
from tests.serving import Row, Step, error

from weft.kernels.cuda import attention
from weft.kernels.selection import REFERENCE, Kernels
from weft.model import loader

CUDA = Kernels(name="cuda", attend=attention.Attend)


@pytest.fixture(scope="module")
def base(bases: Bases) -> loader.Base:
    return bases(device=DEVICE.type)


def test_spans_whose_gates_change_from_layer_to_layer(base: loader.Base) -> None:
    """With mixtures; the last request is one token, on which many programs work."""
    listed = [mixed.row._replace(tokens=mixed.tokens[:9]) for mixed in mixtures(base.shape, seed=2)[:4]]
    listed.append(Row([7]))
    got, wanted = (Step(base, kernels).logits(listed) for kernels in (CUDA, REFERENCE))
    plain = Step(base, REFERENCE).logits([Row(row.tokens) for row in listed])
    assert max(error(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)) < FLOAT32_TOLERANCE
    assert max(error(mine, theirs) for mine, theirs in zip(got, plain, strict=True)) > 100 * FLOAT32_TOLERANCE
