"""The values that the benchmark of the wheel reads from banners."""

import pytest
from benchmarks.wheel import named


@pytest.mark.parametrize(
    ("banner", "kernels"),
    [
        (
            "one base: weft-demo, nf4 on cpu, kernels cpu x86-64-v4-bf16, 4 layers, base digest b953…",
            "cpu x86-64-v4-bf16",
        ),
        ("weft serves bench-80m (none, float32, cpu, kernels cpu native) with 16 adapters", "cpu native"),
        ("weft serves bench-80m (none, float32, cpu, kernels reference) with 16 adapters", "none"),
    ],
)
def test_the_kernels_that_a_banner_names(banner: str, kernels: str) -> None:
    assert named(banner) == kernels
