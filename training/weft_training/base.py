"""Frozen base for training: the model that serving loads, differentiable.

The base stays in evaluation mode, as in serving, which never has dropout's noise. Only its quantized linear modules are
put into bitsandbytes' training mode. In evaluation mode on a CPU with AVX512-BF16 they repack their weight in the first
forward pass whose input needs no gradient, and the repacked product has no backward: autograd then silently omits the
path through the base, and the gradients at all sites but the last are wrong by 35 to 98 % of their norm (measured with
bitsandbytes 0.50.2; tests/training/test_trainer.py checks for it). The repacked weight also holds its scales in
bfloat16, so serving on such a CPU differs from training by rounding.
"""

import logging
from dataclasses import replace

from weft.methods.bnb import Linear4bit, Linear8bitLt

from torch import Tensor

from weft.config import ModelConfig
from weft.model import loader, rope, self_test
from weft.model.loader import Base

_log = logging.getLogger(__name__)


def load(config: ModelConfig, *, max_model_len: int | None = None) -> Base:
    """Return the base, frozen, differentiable in its inputs and in what adapters add.

    max_model_len: limit of the server that the adapters are for; None takes the model's. Rotary factors that depend on
        the length use this one (model/rope.py), which is logged, and no row may be longer.

    The base must pass the server's self-test (model/self_test.py), so that no adapter is trained for a base that cannot
    be served. Raises what `loader.read` raises, and ValueError for a length that the model does not support.
    """
    # On a CPU the fused attention's backward pass has a large fixed cost: 18 ms against 2 ms for 32 rows of 22 tokens
    # with 8 heads. It breaks even at 400 tokens and is faster only beyond them.
    on_cpu = loader.resolve_device(config.device).type == "cpu"
    checkpoint = loader.read(config, attention="eager" if on_cpu else "sdpa")
    limit = checkpoint.max_model_len
    if max_model_len is None:
        max_model_len = limit
    if not 2 <= max_model_len <= limit:
        raise ValueError(f"max_model_len must be 2 to {limit}, the base's limit, given {max_model_len}")
    factors = rope.fix(checkpoint.model, max_model_len)
    if factors.name:
        _log.warning("%s; give the max_model_len of the server, whose factors go by its own", factors)
    expected = self_test.expect(checkpoint.model, max_model_len=max_model_len)
    base = replace(loader.wrap(replace(checkpoint, rope_factors=factors.name)), max_model_len=max_model_len)
    for module in base.model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.train()
    self_test.require(base, expected)
    return base


def num_parameters(base: Base) -> int:
    """Count the base's parameters, tied ones once, and a packed 4-bit weight by the numbers that it stands for."""
    return sum(_count(parameter) for parameter in base.model.parameters())


def _count(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
