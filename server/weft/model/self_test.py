"""Compare a base, as it serves, with the same model's own attention: two requests in one step against each alone.

    expect(model, …)     before the model is wrapped: its own eager attention, each request alone and whole
    require(base, …)     afterwards, as it serves: both requests flattened into one sequence, in chunks, over pages

The logits change if anything connects rows of different requests (attention outside AttentionInterface, convolutions,
frequencies that follow the longest request), loses what an earlier chunk stored, or counts positions differently. The
second request sits at the last positions that are served, where frequencies that depend on the length would differ.

In `expect`, quantized modules compute with their weight dequantized to float32: bitsandbytes' own products are tested,
not trusted. So a base that fails was computed wrongly or too coarsely, and is refused either way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from weft.methods.bnb import Linear4bit, Linear8bitLt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.config import Quantization
from weft.kernels.step import Paging
from weft.methods.base_weight import ModuleWeight, ReadModule
from weft.methods.sublayers import attending
from weft.model.gate import BaseRefused, refusing
from weft.model.loader import Base
from weft.model.paged_attention import ATTENTION, Attend, KVCache, Paged, ReferenceAttend, register

_LENGTHS = (29, 11)  # tokens of the two requests
_NUM_DRAWS = 4
_BLOCK_SIZE = 16
_BLOCKS = ((3, 0), (1, 2))  # of each request, in no order
# Steps, each of (request, first token, end): prompts in chunks, side by side in either order, and single tokens.
_TOGETHER = (((0, 0, 13), (1, 0, 4)), ((1, 4, 10), (0, 13, 14)), ((0, 14, 28),), ((0, 28, 29), (1, 10, 11)))
_APART = tuple(((request, 0, length),) for request, length in enumerate(_LENGTHS))

MakeAttend = Callable[[Sequence[Tensor], Sequence[Tensor]], Attend]
Part = tuple[int, int, int]


class Tolerance(NamedTuple):
    """Differences that rounding explains, as a share of the logits' norm.

    attention: between served and eager attention, over the same linear modules.
    products: between the model as it serves and as it was loaded, with quantized weights dequantized to float32.
    """

    attention: float
    products: float


class Request(NamedTuple):
    """One request: token ids int64 [N], positions int64 [N], and logits [N, V] of the model alone."""

    token_ids: Tensor
    positions: Tensor
    logits: Tensor


Expected = tuple[tuple[Request, Request], ...]
"""Draws of two requests each. A base passes if one draw passes. A mixture of experts may send a row to other experts
when rounding decides a near tie, which is luck; a base that is computed wrongly fails with all draws."""


def tolerance(dtype: torch.dtype, quantization: Quantization) -> Tolerance:
    """Return the tolerance of a base.

    Set from the tiny families of tests/families and a real model of 30 layers. Correct ones reach 2e-6 in float32; in
    bfloat16, 0.04 unquantized, 0.06 in NF4, and 0.15 in int8, which rounds inputs to 8 bits in each layer. Wrong ones
    (bloom, codegen, lfm2 …) begin at 0.31, and a position that is off by one in a chunk at 0.19.
    """
    match quantization:
        case Quantization.NONE:
            return Tolerance(1e-3, 1e-3) if dtype is torch.float32 else Tolerance(0.1, 0.1)
        case Quantization.NF4:
            return Tolerance(0.1, 0.15)
        case Quantization.INT8:
            return Tolerance(0.18, 0.25)


@torch.inference_mode()
def expect(model: Any, *, max_model_len: int) -> Expected:
    """Compute each request alone, by transformers' `model` itself with eager attention.

    The model must not be wrapped yet, and is left as it was. Raises BaseRefused if its own forward pass fails.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    by_length = []
    name = Path(model.config.name_or_path).name or type(model).__name__
    with refusing(name, "computed by transformers itself"), _dequantized(model):
        for length, first in zip(_LENGTHS, (0, max(0, max_model_len - _LENGTHS[1])), strict=True):
            token_ids = torch.randint(vocab_size, (_NUM_DRAWS, length), generator=generator).to(model.device)
            positions = torch.arange(first, first + length, device=model.device)
            logits = _alone(model, token_ids, positions)
            by_length.append([Request(ids, positions, of_ids) for ids, of_ids in zip(token_ids, logits, strict=True)])
    return tuple(zip(*by_length, strict=True))


@torch.inference_mode()
def require(base: Base, expected: Expected, make_attend: MakeAttend | None = None) -> None:
    """Raise BaseRefused unless `base`, as it serves, computes what was `expected`.

    make_attend: the device's attention; None for the reference.
    """
    allowed = tolerance(base.dtype, base.quantization)
    smallest = Tolerance(float("inf"), float("inf"))
    for requests in expected:
        with refusing(base.shape.name, "computed as one sequence of many requests"):
            errors = measure(base, requests, make_attend)
        smallest = Tolerance(*map(min, smallest, errors))
        if errors.attention <= allowed.attention and errors.products <= allowed.products:
            return
    what, error, limit = "its own attention", smallest.attention, allowed.attention
    if error <= limit:
        what, error, limit = "the model as it was loaded", smallest.products, allowed.products
    raise BaseRefused(
        base.shape.name,
        f"does not pass its self-test: as served, beside another request, its logits differ from {what} by {error:.2g} "
        f"of their norm, where up to {limit:.2g} is rounding",
    )


def measure(base: Base, requests: Sequence[Request], make_attend: MakeAttend | None = None) -> Tolerance:
    """Return how far `base` is from the logits of two `requests`, in the terms of Tolerance."""
    model = base.model
    plain = [_alone(model, request.token_ids[None], request.positions)[0] for request in requests]
    register()
    with attending(model, ATTENTION):
        served = [_served(base, requests, steps, make_attend) for steps in (_TOGETHER, _APART)]
    return Tolerance(
        attention=max(_error(*pair) for found in served for pair in zip(found, plain, strict=True)),
        products=max(_error(found, request.logits) for found, request in zip(plain, requests, strict=True)),
    )


def _alone(model: Any, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Return logits float32 [B, N, V] of token ids [B, N] at positions [N], with the model's own eager attention."""
    with attending(model, "eager"):
        return model(input_ids=token_ids, position_ids=positions.expand_as(token_ids), use_cache=False).logits.float()


def _served(
    base: Base, requests: Sequence[Request], steps: Sequence[Sequence[Part]], make_attend: MakeAttend | None
) -> list[Tensor]:
    """Return logits [N, V] of each request, computed in `steps` over pages."""
    cache = KVCache.allocate(
        base.shape,
        num_blocks=sum(map(len, _BLOCKS)),
        block_size=_BLOCK_SIZE,
        dtype=base.dtype,
        device=base.device,
    )
    attend = (make_attend or ReferenceAttend)(cache.keys, cache.values)
    found: list[list[Tensor]] = [[] for _ in requests]
    for parts in steps:
        out = base.model(
            input_ids=torch.cat([requests[index].token_ids[begin:end] for index, begin, end in parts])[None],
            position_ids=torch.cat([requests[index].positions[begin:end] for index, begin, end in parts])[None],
            use_cache=False,
            paged=Paged(_paging(cache, parts), attend),
        )
        sizes = [end - begin for _, begin, end in parts]
        for (index, _, _), logits in zip(parts, out.logits[0].float().split(sizes), strict=True):
            found[index].append(logits)
    return [torch.cat(parts) for parts in found]


def _paging(cache: KVCache, parts: Sequence[Part]) -> Paging:
    device = cache.keys[0].device
    sizes = torch.tensor([0] + [end - begin for _, begin, end in parts])
    slots = [cache.slots(list(_BLOCKS[index]), end)[begin:] for index, begin, end in parts]
    return Paging(
        torch.cat(slots),
        sizes.cumsum(0).to(device, torch.int32),
        torch.tensor([end for _, _, end in parts], dtype=torch.int32, device=device),
        torch.zeros(len(parts), 0, dtype=torch.int32, device=device),
        torch.tensor([_BLOCKS[index] for index, _, _ in parts], dtype=torch.int32, device=device),
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the median over rows of the difference's norm divided by the norm.

    Both norms leave out what is common to all tokens, which softmax does not see. It is the median because a mixture of
    experts may send a few rows to other experts when rounding decides a near tie, whereas an error affects most rows.
    """
    found, wanted = (logits - logits.mean(-1, keepdim=True) for logits in (found, wanted))
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@contextmanager
def _dequantized(model: nn.Module) -> Iterator[None]:
    """Let quantized modules multiply with their weight in float32 inside the context."""
    quantized = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
    ]
    for name, module in quantized:
        module.forward = partial(_product, ReadModule(model, name))
    try:
        yield
    finally:
        for _, module in quantized:
            del module.forward


def _product(read: ReadModule, x: Tensor) -> Tensor:
    def multiply(weight: ModuleWeight) -> Tensor:
        out = torch.cat([F.linear(x.float(), block) for block in weight.blocks(torch.float32)], -1)
        return out if weight.bias is None else out + weight.bias.float()

    return read(multiply).to(x.dtype)
