"""Weft's product of linear modules equals the formula in float64; a row's bits do not depend on its neighbours."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from weft.kernels.cpu import gemm

pytestmark = pytest.mark.skipif(not gemm.available(), reason="no compiler, or no product of bfloat16 pairs")
BFLOAT16 = torch.bfloat16
ROWS = [*range(1, 18), 31, 33, 70]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wanted(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result in float64 and each output's tolerance: bfloat16's rounding, and float32's of every sum."""
    products = x.double().abs() @ weight.double().abs().T
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return exact, 2**-8 * exact.abs() + 2**-22 * products


def _is_near(given: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    exact, allowed = _wanted(x, weight, bias)
    return bool(((given.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, 1), (2, 16), (31, 15), (32, 64), (33, 65), (768, 200), (769, 64), (2050, 128)]
)
def test_the_formula(size_in: int, size_out: int, has_bias: bool, threads: int) -> None:
    torch.manual_seed(size_in)
    weight = torch.randn(size_out, size_in).to(BFLOAT16)
    bias = torch.randn(size_out).to(BFLOAT16) if has_bias else None
    packed = gemm.pack(weight)
    with _threads(threads):
        for rows in ROWS:
            x = torch.randn(rows, size_in).to(BFLOAT16)
            given = gemm.linear(x, packed, bias)
            assert given.shape == (rows, size_out)
            assert _is_near(given, x, weight, bias), rows


def test_an_error_of_one_input_is_seen() -> None:
    """Negative control of the tolerance: the last input of the last output is left out."""
    torch.manual_seed(0)
    weight, x = torch.randn(65, 769).to(BFLOAT16), torch.randn(5, 769).to(BFLOAT16)
    broken = weight.clone()
    broken[-1, -1] = 0
    assert _is_near(gemm.linear(x, gemm.pack(weight)), x, weight, None)
    assert not _is_near(gemm.linear(x, gemm.pack(broken)), x, weight, None)


@pytest.mark.parametrize(("size_in", "size_out"), [(768, 320), (2047, 80)])
def test_a_row_has_the_same_bits_in_any_batch(size_in: int, size_out: int) -> None:
    torch.manual_seed(0)
    x, packed = torch.randn(600, size_in).to(BFLOAT16), gemm.pack(torch.randn(size_out, size_in).to(BFLOAT16))
    whole = gemm.linear(x, packed)
    for threads in (1, 2, 3):
        with _threads(threads):
            for rows in (*ROWS, 256, 257, 600):
                for first in {0, min(5, 600 - rows), 600 - rows}:
                    assert torch.equal(gemm.linear(x[first : first + rows], packed), whole[first : first + rows])
    other = x.clone()
    other[3, -1] += 1
    assert (gemm.linear(other, packed) != whole).any(-1).nonzero().tolist() == [[3]], "and on its own numbers"


def test_what_is_not_a_number_stays_in_its_row() -> None:
    torch.manual_seed(0)
    x, packed = torch.randn(40, 100).to(BFLOAT16), gemm.pack(torch.randn(70, 100).to(BFLOAT16))
    before = gemm.linear(x, packed)
    x[7, 3], x[20, 99] = torch.nan, torch.inf
    after = gemm.linear(x, packed)
    assert after[7].isnan().all()
    assert after[20].isinf().all()
    others = [t for t in range(40) if t not in (7, 20)]
    assert torch.equal(after[others], before[others])


def test_rows_may_lie_anywhere() -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(2, 9, 300).to(BFLOAT16), torch.randn(64, 100).to(BFLOAT16)
    packed = gemm.pack(weight)
    for x in (wide[..., 100:200], wide[..., ::3], wide[:, ::2, 1:101], wide[0, 0, :100], wide[:, :0, :100]):
        given = gemm.linear(x, packed)
        assert torch.equal(given, gemm.linear(x.contiguous(), packed))
        assert given.shape == (*x.shape[:-1], 64)
        assert _is_near(given, x, weight, None)


@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (3, 70), (769, 65), (2048, 128)])
def test_a_weight_can_be_had_back(size_in: int, size_out: int) -> None:
    weight = torch.randn(size_out, size_in).to(BFLOAT16)
    packed = gemm.pack(weight)
    assert torch.equal(gemm.unpack(packed), weight)
    for view in (torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight), weight.T.contiguous().T):
        assert torch.equal(gemm.unpack(gemm.pack(view)), weight)
    padded = -(-size_out // 64) * 64 * -(-size_in // 2) * 2
    assert packed.data.numel() * 2 == padded


def test_what_does_not_fit_is_refused() -> None:
    weight, x = torch.randn(16, 8).to(BFLOAT16), torch.randn(2, 8).to(BFLOAT16)
    packed = gemm.pack(weight)
    with pytest.raises(ValueError, match=r"weight: needs \[O, I\] bfloat16 on the CPU, given torch.float32 \[16, 8\]"):
        gemm.pack(weight.float())
    with pytest.raises(ValueError, match=r"weight: .* \[0, 8\]"):
        gemm.pack(weight[:0])
    with pytest.raises(ValueError, match=r"x: needs \[\.\.\., 8\] bfloat16 on the CPU, given torch.float32 \[2, 8\]"):
        gemm.linear(x.float(), packed)
    with pytest.raises(ValueError, match=r"x: .* \[2, 7\]"):
        gemm.linear(x[:, :7], packed)
    with pytest.raises(ValueError, match="x: carries a gradient"):
        gemm.linear(x.clone().requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"bias: needs contiguous \[16\] bfloat16, given torch.bfloat16 \[8\]"):
        gemm.linear(x, packed, x[0])
    with pytest.raises(ValueError, match=r"bias: .* torch.float32 \[16\]"):
        gemm.linear(x, packed, torch.zeros(16))
