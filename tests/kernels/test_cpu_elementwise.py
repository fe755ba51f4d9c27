"""Norms and gates in one pass equal the formula in float64, for any shape and stride; rows are independent."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weft.kernels.cpu import elementwise, library

pytestmark = pytest.mark.skipif(not library.available(), reason="no compiler for the kernels")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
FORMULAS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _near(given: Tensor, wanted: Tensor, scale: Tensor) -> None:
    """Check results against float64; rounding errors are relative to `scale`."""
    assert ((given.double() - wanted).abs() <= TOLERANCES[given.dtype] * scale.abs() + 1e-30).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 32), (1, 5, 100), (2, 3, 64), (1, 70, 1024)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, scale: float, threads: int) -> None:
    torch.manual_seed(0)
    x, gain = (scale * torch.randn(shape)).to(dtype), torch.randn(shape[-1])
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    given = elementwise.rms_norm(x, gain, 1e-6)
    torch.set_num_threads(before)
    wanted = x.double() * gain.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert given.shape == x.shape
    assert given.dtype is dtype
    _near(given, wanted, wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("size", [1, 33, 128, 2048])
def test_gate(size: int, activation: str, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    both = (4 * torch.randn(1, 9, 2 * size)).to(dtype)
    both[0, 0, :size] = torch.linspace(-90, 90, size)  # the limits of exponentials
    given, up = both.split(size, -1)  # strided, as a group gives them
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    out = elementwise.gate(given, up, activation)
    torch.set_num_threads(before)
    wanted = FORMULAS[activation](given.double()) * up.double()
    # At large negative inputs GELU's formula itself cancels, so its error is relative to the input.
    _near(out, wanted, wanted if activation == "silu" else given.double() * up.double())
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_among_others_and_none_sees_a_neighbours_nan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(1, 40, 768).to(dtype), torch.randn(768)
    x[0, 7] = torch.nan
    for function in (lambda v: elementwise.rms_norm(v, gain, 1e-6), lambda v: elementwise.gate(v, v, "silu")):
        all_rows = function(x)
        assert all_rows[0, 7].isnan().all()
        for t in (0, 6, 8, 39):
            assert torch.equal(all_rows[:, t], function(x[:, t]))
            assert all_rows[:, t].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    x, gain = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"x: needs float32 or bfloat16 on the CPU, given torch\.float64"):
        elementwise.rms_norm(x.double(), gain, 1e-6)
    with pytest.raises(ValueError, match=r"gain: needs contiguous \[8\] float32, given torch.float32 \[7\]"):
        elementwise.rms_norm(x, gain[:7], 1e-6)
    with pytest.raises(ValueError, match=r"up: needs torch.float32 \[2, 8\], given torch.bfloat16 \[2, 8\]"):
        elementwise.gate(x, x.bfloat16(), "silu")
    with pytest.raises(ValueError, match="relu"):
        elementwise.gate(x, x, "relu")
