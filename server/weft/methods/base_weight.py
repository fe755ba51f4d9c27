"""The frozen weight of one linear module as plain numbers, however the base holds it: plain, Conv1D, NF4 or int8.

It is read in blocks of rows, so that at most one block exists in full precision at a time.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from weft.methods.bnb import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from weft.methods.bnb import functional as bnb

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.methods.shapes import Float

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB in float32
_ROWS_MULTIPLE = 64  # a block begins with a quantization block, and with a tile of the packed layout
_TILE_ROWS = 32  # rows that bitsandbytes interleaves in its packed layout

T = TypeVar("T")


class LinearPart:
    """A range of a linear module's output rows, seen as a linear module of its own."""

    def __init__(self, whole: Callable[[], nn.Module], begin: int, size: int) -> None:
        self._whole = whole
        self.begin = begin
        self.size = size

    @property
    def whole(self) -> nn.Module:
        """The module as the base holds it now."""
        return self._whole()

    @property
    def weight(self) -> Tensor:
        """[size, I]; for a quantized module the stored data of all rows, since that cannot be sliced."""
        weight = cast(Tensor, self.whole.weight)
        return weight if isinstance(self.whole, Linear4bit) else weight[self.begin : self.begin + self.size]

    @property
    def bias(self) -> Float[Tensor, " O"] | None:
        """The bias of these rows; None if the module has none."""
        bias = cast("Tensor | None", self.whole.bias)
        return None if bias is None else bias[self.begin : self.begin + self.size]


class ModuleWeight:
    """The content of a linear module of the base; implements weft.methods.protocol.BaseWeight."""

    def __init__(self, module: nn.Module | LinearPart) -> None:
        self._module = module

    @property
    def bias(self) -> Float[Tensor, " O"] | None:
        """The bias in the base's dtype; None if the module has none."""
        return cast("Tensor | None", self._module.bias)

    def blocks(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "N I"]]:
        """Yield the weight [O, I] as blocks of its rows, in order, in `dtype`."""
        num_rows, width, rows_of = _rows(self._module)
        step = max(1, _BLOCK_ELEMENTS // width // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        for begin in range(0, num_rows, step):
            yield rows_of(begin, min(begin + step, num_rows)).to(dtype)


class ReadModule:
    """Reads one module's weight immediately, in the calling thread; implements weft.methods.protocol.ReadBase.

    The module is looked up by its path at each reading, because a server may replace the module that it loaded.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        self._model = model
        self._name = name

    def __call__(self, function: Callable[[ModuleWeight], T], /) -> T:
        module = self._model.get_submodule(self._name)
        return function(ModuleWeight(getattr(module, "base", module)))  # wrapped as soon as the base serves


def _rows(module: nn.Module | LinearPart) -> tuple[int, int, Callable[[int, int], Tensor]]:
    """Return O, I, and a function of (begin, end) that returns those rows of the weight; begin is a multiple of 64."""
    if isinstance(module, LinearPart):
        _, width, rows_of = _rows(module.whole)
        first = module.begin
        return module.size, width, lambda begin, end: rows_of(first + begin, first + end)
    if isinstance(module, Linear4bit):
        return module.out_features, module.in_features, _rows_of_4bit(module)
    if isinstance(module, Linear8bitLt):
        return module.out_features, module.in_features, _rows_of_int8(module)
    weight = module.weight.mT if isinstance(module, Conv1D) else cast(Tensor, module.weight)  # [O, I]
    return weight.shape[0], weight.shape[1], lambda begin, end: weight[begin:end]


def _rows_of_4bit(module: Linear4bit) -> Callable[[int, int], Tensor]:
    """Return a function that reads rows of a 4-bit weight.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weight at its first use in evaluation mode and rounds the scales
    to bfloat16. They are rounded here from the beginning, so that a base reads the same before and after.
    """
    weight = cast(Params4bit, module.weight)
    state = weight.quant_state
    data = weight.data
    width = module.in_features
    assert state.blocksize is not None
    block_size = state.blocksize
    if getattr(state, "packing_format_for_cpu", False):
        return _rows_of_packed(data, state, width)
    scales = state.absmax
    if state.nested and state.offset is not None:  # double quantization: the scales are quantized themselves
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.float()
    if data.device.type == "cpu" and module.support_avx512bf16_for_cpu and not module.training:
        scales = scales.bfloat16().float()
    flat = data.view(torch.uint8).reshape(-1)  # two values per byte

    def rows_of(begin: int, end: int) -> Tensor:
        part = copy.copy(state)
        part.absmax = scales[begin * width // block_size : -(-end * width // block_size)]
        part.shape = torch.Size((end - begin, width))
        part.nested = False
        part.dtype = torch.float32
        return bnb.dequantize_4bit(flat[begin * width // 2 : -(-end * width // 2), None], part)

    return rows_of


def _rows_of_packed(data: Tensor, state: bnb.QuantState, width: int) -> Callable[[int, int], Tensor]:
    """Return a function that reads rows of a repacked weight.

    The layout is tiles of 32 rows, column pair by column pair, with the first 16 rows in the low nibbles.
    """
    scales = state.absmax.float().mT  # [O, I / block size]; the packed state holds them transposed
    assert state.code is not None
    code = state.code.float()  # the 16 values of the data type
    bytes_per_row = width // 2

    def rows_of(begin: int, end: int) -> Tensor:
        part = data.reshape(-1)[begin * bytes_per_row : end * bytes_per_row].view(-1, bytes_per_row, _TILE_ROWS)
        nibbles = torch.cat([part & 0xF, part >> 4], dim=-1)  # [tiles, I / 2, 64]
        codes = nibbles.view(-1, bytes_per_row, _TILE_ROWS, 2).transpose(1, 2).reshape(end - begin, width)
        return code[codes.int()] * scales[begin:end].repeat_interleave(state.blocksize, dim=1)

    return rows_of


def _rows_of_int8(module: Linear8bitLt) -> Callable[[int, int], Tensor]:
    """Return a function that reads rows of an int8 weight: whole numbers times 1/127 of their row's scale."""
    state = module.state  # bitsandbytes moves codes and scales there at the first use
    weight = cast(Int8Params, module.weight)
    codes = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB

    def rows_of(begin: int, end: int) -> Tensor:
        return codes[begin:end].float() * (scales[begin:end, None].float() / 127)

    return rows_of
