"""Bodies of tests that run on CPUs and GPUs alike: steps in the serving form equal the reference.

tests/kernels/test_cpu_capture.py runs them with the kernels for CPUs, tests/gpu with those for CUDA and graphs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tests.engine.decoding import Decoding
from tests.engine.test_captured import mixed
from tests.mixing.compositions import mixes, rows
from tests.mixing.mixtures import mixtures
from tests.mixing.textbook_composition import Composition
from tests.serving import Row, Step, error
from weft.config import Quantization
from weft.kernels.selection import REFERENCE, Kernels
from weft.methods.inject import LinearGroup
from weft.methods.protocol import BaseShape
from weft.model import loader


class Held(NamedTuple):
    """The form of a base, and the error of logits that its rounding allows: ‖got - wanted‖ over ‖wanted‖.

    apart: the same between kernels and the reference, which round in other places.
    """

    quantization: Quantization
    dtype: str
    off: float
    apart: float


FLOAT32 = Held(Quantization.NONE, "float32", 1e-4, 1e-4)
BFLOAT16 = Held(Quantization.NONE, "bfloat16", 3e-2, 6e-2)
NF4 = Held(Quantization.NF4, "bfloat16", 3e-2, 6e-2)
INT8 = Held(Quantization.INT8, "bfloat16", 3e-2, 6e-2)
ALL = (FLOAT32, BFLOAT16, NF4, INT8)
NAMES = ("float32", "bfloat16", "nf4", "int8")


def blends(base: BaseShape, *, all_kept: bool) -> list[Row]:
    """Return mixtures of both levels, with bounds and without.

    all_kept: no mixture leaves an expert out, since rounding might decide which.
    """
    listed = mixtures(base, seed=2, all_kept=all_kept)[1:5]
    return [one.row for one in listed]


def check_groups(base: loader.Base) -> None:
    """Check that queries, keys and values are one product, gate and up projections another; int8 stays apart."""
    found = [module for module in base.model.modules() if isinstance(module, LinearGroup)]
    assert len(found) == (0 if base.quantization is Quantization.INT8 else 2 * base.shape.num_layers)


def check_captured(
    base: loader.Base, kernels: Kernels, held: Held, requests: Sequence[Row | Composition], *, steps: int
) -> None:
    """Check that one capture is made, and that its steps give the logits and mixtures' gates of plain ones."""
    plain, captured = Decoding(base, kernels), Decoding(base, kernels, num_captured_rows=128)
    for decoding in (plain, captured):
        decoding.start(requests)
    for step in range(steps):
        assert error(captured.step(), plain.step()) < held.off, f"step {step}"
    graphs = captured.runner._captured
    assert graphs is not None, "steps are captured"
    assert len(graphs.shapes) == 1
    for mine, theirs in zip(captured.end(), plain.end(), strict=True):
        assert (mine is None) is (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(torch.tensor(mine.tokens), torch.tensor(theirs.tokens), rtol=0, atol=held.off)


def check_captured_mix(base: loader.Base, kernels: Kernels, held: Held, *, steps: int = 20) -> None:
    """Check adapters of every method and mixtures, across the edge of a block."""
    taken = [*mixed(base.shape, 13, seed=1), *blends(base.shape, all_kept=held is not FLOAT32)]
    check_captured(base, kernels, held, taken, steps=steps)


def check_captured_many(base: loader.Base, kernels: Kernels, held: Held) -> None:
    """Check more rows than the products for few rows take."""
    check_captured(base, kernels, held, [*mixed(base.shape, 9, seed=3), *([] for _ in range(62))], steps=3)


def check_kernels(base: loader.Base, kernels: Kernels, held: Held) -> None:
    """Check that whole prompts of compositions and mixtures give the reference's logits, not those without adapters."""
    listed = rows(mixes(base.shape, seed=3, count=6))
    listed += [one.row for one in mixtures(base.shape, seed=2, all_kept=held is not FLOAT32)[1:4]]
    got, wanted = (Step(base, chosen).logits(listed) for chosen in (kernels, REFERENCE))
    without = Step(base, REFERENCE).logits([Row(row.tokens) for row in listed])
    assert max(map(error, got, wanted)) < held.apart
    assert max(map(error, got, without)) > 5 * held.apart
