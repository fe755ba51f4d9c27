"""The product with an NF4 weight for CUDA against bitsandbytes' dequantization and a matmul."""

from typing import NamedTuple

import pytest
import torch
from bitsandbytes import functional as bnb
from tests.kernels.interpreted import DEVICE
from torch import Tensor

from weft.kernels.cuda import nf4

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


class Stored(NamedTuple):
    """A weight as bitsandbytes stores it; `weight` [O, I] is its value, in `dtype`."""

    packed: Tensor
    scales: Tensor
    code: Tensor
    weight: Tensor


def stored(size_out: int, size_in: int, dtype: torch.dtype = BFLOAT16) -> Stored:
    torch.manual_seed(size_out + size_in)
    weight = (torch.randn(size_out, size_in) * torch.rand(size_out, 1)).to(dtype).to(DEVICE)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return Stored(packed, state.absmax, state.code, bnb.dequantize_4bit(packed, state))


def multiply(x: Tensor, held: Stored, bias: Tensor | None = None) -> Tensor:
    return nf4.multiply(x, held.packed, held.scales, held.code, bias)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_the_weight_is_bitsandbytes_to_the_bit(dtype: torch.dtype) -> None:
    """Rows of a unit matrix extract its columns."""
    held = stored(96, 192, dtype)
    for first in range(0, 192, 64):
        unit = torch.eye(192, dtype=dtype, device=DEVICE)[first : first + 64]
        assert torch.equal(multiply(unit, held), held.weight[:, first : first + 64].T)
    # Negative control: with the halves of a byte swapped it is another weight.
    swapped = held._replace(packed=(held.packed >> 4) | (held.packed << 4))
    assert not torch.equal(multiply(unit, swapped), held.weight[:, 128:].T)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 33, 64])
@pytest.mark.parametrize(("size_out", "size_in"), [(64, 128), (80, 192), (1, 64), (200, 2112)])
def test_the_product(num_rows: int, size_out: int, size_in: int) -> None:
    held = stored(size_out, size_in)
    x = torch.randn(num_rows, size_in).to(BFLOAT16).to(DEVICE)
    bias = torch.randn(size_out).to(BFLOAT16).to(DEVICE)
    exact = x.double() @ held.weight.double().T
    for out, expected in ((multiply(x, held), exact), (multiply(x, held, bias), exact + bias.double())):
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


def test_inputs_are_split_where_outputs_are_few() -> None:
    """By the weight's shape alone: 8B models have 6144, 4096 and 28672 outputs of 4096 inputs, and 4096 of 14336."""
    assert [nf4.splits_of(4096, size) for size in (6144, 4096, 28672)] == [4, 4, 1]
    assert nf4.splits_of(14336, 4096) == 4
    assert nf4.splits_of(512, 64) == 1
    assert nf4.splits_of(2112, 200) == 4  # of the product above: the last part is shorter


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    held = stored(72, 2048)
    x = torch.randn(16, 2048).to(BFLOAT16).to(DEVICE)
    before = multiply(x, held)
    others = x * 2
    others[5] = x[5]
    after = multiply(others, held)
    assert torch.equal(before[5], after[5])
    assert torch.equal(multiply(x[:9], held), before[:9])
    assert not torch.equal(before[4], after[4])


def test_rows_may_be_strided() -> None:
    held = stored(64, 128)
    x = torch.randn(5, 256).to(BFLOAT16).to(DEVICE)[:, :128]
    assert torch.equal(multiply(x, held), multiply(x.contiguous(), held))


def test_no_rows() -> None:
    assert multiply(torch.zeros(0, 128, dtype=BFLOAT16, device=DEVICE), stored(64, 128)).shape == (0, 64)


def test_misuse_is_named() -> None:
    held, x = stored(64, 128), torch.zeros(4, 128, dtype=BFLOAT16, device=DEVICE)
    bad_calls = [
        ("x: needs up to 64 contiguous rows", lambda: multiply(x.repeat(17, 1), held)),
        ("x: needs up to 64 contiguous rows", lambda: multiply(x.repeat(1, 2)[:, ::2], held)),
        ("x: needs .* a multiple of 64 inputs", lambda: multiply(x[:, :96], held)),
        ("packed, scales, code: need uint8", lambda: multiply(x, held._replace(packed=held.packed.char()))),
        ("packed, scales, code: need uint8", lambda: multiply(x, held._replace(scales=held.scales.half()))),
        ("scales, code: need 128 and 16", lambda: multiply(x, held._replace(scales=held.scales[1:]))),
        ("scales, code: need 128 and 16", lambda: multiply(x, held._replace(code=held.code[1:]))),
    ]
    for text, call in bad_calls:
        with pytest.raises(ValueError, match=text):
            call()
