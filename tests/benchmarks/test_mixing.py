"""The time of a step if tokens are delivered several at a time."""

from typing import Any

import pytest
from benchmarks import mixing


class _Loop:
    """Delivers tokens in threes: the first alone, then after every three steps of 10 ms."""

    def request(self, prompt: Any, num_new_tokens: int, *adapters: Any, salt: str) -> int:
        return num_new_tokens

    def run(self, asked: Any) -> list[list[float]]:
        return [[0.01 * (3 * ((token + 2) // 3)) for token in range(count)] for _, count in asked]


def test_a_step_is_what_lies_between_first_and_last_token() -> None:
    loop: Any = _Loop()
    assert mixing._step_ms(loop, [mixing.Adapters()] * 4, 31, "salt") == pytest.approx(10.0)
