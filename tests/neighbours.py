"""Checks that a row's logits do not depend on its neighbours, with negative controls."""

from collections.abc import Mapping, Sequence

from tests.serving import Row, Step, error


def assert_answers_as_alone(step: Step, tolerance: float, batch: Sequence[Row], others: Mapping[int, Row]) -> None:
    """Check that each row of a batch has the logits that it has alone, to rounding.

    others: rows by index in the batch whose logits must differ from those in the batch.
    """
    for index, (row, mine) in enumerate(zip(batch, step.logits(batch), strict=True)):
        (alone,) = step.logits([row])
        assert error(mine, alone) < tolerance, index
        if index in others:
            (other,) = step.logits([others[index]])
            assert error(mine, other) > 3 * tolerance, f"negative control of row {index}"


def assert_same_bits(step: Step, mine: Row, neighbourhoods: Sequence[Sequence[Row]], moved: Row) -> None:
    """Check that a row has the same bits beside any neighbours, and `moved` in its place, beside the base, others."""
    first, *others = (step.logits([mine, *neighbours])[0] for neighbours in neighbourhoods)
    assert others
    for trial, other in enumerate(others, 1):
        assert other.equal(first), f"trial {trial}: max {(other - first).abs().max()}"
    plain = [Row(row.tokens) for row in neighbourhoods[0]]
    assert not step.logits([moved, *plain])[0].equal(first), "negative control"
