"""Compositions on a stock transformers model, module by module: the oracle of their tests.

    x' = x + Σ w · pre(x),   y = W₀x',   out = y + Σ w · delta(x, y)

Each method is written once more, as a person would from its paper, with nothing of `weft.methods` but the tensors. Keys
and values of virtual positions go in as a cache; log(w) of each goes into the mask that is added to the scores.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from weft.methods.bitfit.math import BitfitParams
from weft.methods.bottleneck.math import BottleneckParams
from weft.methods.dora.math import DoraParams
from weft.methods.ia3.math import Ia3Params
from weft.methods.lora.math import LoraParams
from weft.methods.prefix.math import PrefixParams
from weft.methods.prompt.math import PromptParams
from weft.methods.protocol import Adapter
from weft.methods.vera.math import VeraParams

Composition = Sequence[tuple[Adapter, float]]
Weight = float | Tensor  # of a delta: one for all tokens, or [N, 1], one for each
Weighted = Sequence[tuple[Adapter, Weight]]
_NORMS = {
    "self_attn": "input_layernorm",
    "mlp": "post_attention_layernorm",
    "attn": "ln_1",
    "gpt2 mlp": "ln_2",
}


def logits(model: Any, tokens: Sequence[int], parts: Weighted) -> Tensor:
    """[N, V] in the model's dtype; the model is left as it was."""
    dtype = model.get_input_embeddings().weight.dtype
    virtual = [(adapter, weight) for adapter, weight in parts if adapter.prefix is not None and weight != 0]
    spans = [(*_keys_and_values(model, adapter, dtype), math.log(weight)) for adapter, weight in virtual]
    num_virtual = sum(keys.shape[3] for keys, _, _ in spans)
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers if spans else 0):
        cache.update(
            torch.cat([keys[layer] for keys, _, _ in spans], dim=2),
            torch.cat([values[layer] for _, values, _ in spans], dim=2),
            layer,
        )
    count = len(tokens)
    seen = torch.full((count, count), float("-inf"), dtype=dtype).triu(1)
    columns = [torch.full((count, keys.shape[3]), log_weight, dtype=dtype) for keys, _, log_weight in spans]
    mask = torch.cat([*columns, seen], dim=1)
    undo = [_wrap(model, name, parts) for name in sorted({name for adapter, _ in parts for name in adapter.sites})]
    try:
        return model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=num_virtual + torch.arange(count)[None],
            past_key_values=cache,
            attention_mask=mask[None, None],
            use_cache=True,
        ).logits[0]
    finally:
        for restore in undo:
            restore()


def _keys_and_values(model: Any, adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the adapter alone, each [L, 1, H, P, D]."""
    if isinstance(adapter.prefix, PrefixParams):
        rows = adapter.prefix.embeddings.to(dtype)  # [P, L, 2, H, D]
        both = rows.permute(2, 1, 3, 0, 4)[:, :, None]
        return both[0], both[1]
    assert isinstance(adapter.prefix, PromptParams)
    rows = adapter.prefix[0].to(dtype)
    cache = model(inputs_embeds=rows[None], use_cache=True).past_key_values
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


def _wrap(model: Any, name: str, parts: Weighted) -> Callable[[], None]:
    """Give one module the deltas that are made there; returns what takes them away again."""
    module = model.get_submodule(name)
    here = [(adapter.sites[name], weight) for adapter, weight in parts if _is_there(weight) and name in adapter.sites]
    original, residual = module.forward, {}
    hook = None
    if any(isinstance(params, BottleneckParams) for params, _ in here):
        layer, sublayer = name.split(".")[:3], name.split(".")[3]
        norms = _NORMS["gpt2 mlp" if (sublayer, layer[0]) == ("mlp", "transformer") else sublayer]
        norm = model.get_submodule(".".join([*layer, norms]))
        hook = norm.register_forward_pre_hook(lambda module, inputs: residual.update(r=inputs[0]))

    def forward(x: Tensor) -> Tensor:
        entering = [weight * _pre(params, x) for params, weight in here if _acts_before(params)]
        y = original(x + sum(entering)) if entering else original(x)
        out = y
        for params, weight in here:
            if not _acts_before(params):
                out = out + weight * _delta(module, params, x, y, residual.get("r"))
        return out

    def restore() -> None:
        module.forward = original
        if hook is not None:
            hook.remove()

    module.forward = forward
    return restore


def _is_there(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _acts_before(params: Any) -> bool:
    return isinstance(params, Ia3Params) and params.is_feedforward


def _pre(params: Ia3Params, x: Tensor) -> Tensor:
    return x * params.scale.to(x) - x


def _delta(module: nn.Module, params: Any, x: Tensor, y: Tensor, r: Tensor | None) -> Tensor:
    match params:
        case LoraParams(a, b, scaling, bias):
            return scaling * (F.linear(F.linear(x, a.to(x)), b.to(x)) + (0 if bias is None else bias.to(x)))
        case DoraParams(a, b, magnitude, scaling, _):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            bias = 0 if module.bias is None else module.bias
            update = scaling * b.to(x) @ a.to(x)
            stretch = magnitude.to(x) / (weight + update).norm(dim=1)
            # m (W₀ + ΔW) x / ‖W₀ + ΔW‖ - W₀x, where the base output y stands for W₀x.
            return (stretch - 1) * (y - bias) + stretch * F.linear(x, update)
        case VeraParams(lambda_d, lambda_b, _, (a, b)):
            narrow = F.linear(x, a[:, : x.shape[-1]].to(x)) * lambda_d.to(x)
            return F.linear(narrow, b[: len(lambda_b)].to(x)) * lambda_b.to(x)
        case BitfitParams(bias):
            return bias.to(y).expand_as(y)
        case Ia3Params(scale, _):
            return y * scale.to(y) - y
        case BottleneckParams():
            return _bottleneck(params, y, r)
    raise AssertionError(type(params))


def _bottleneck(params: BottleneckParams, h: Tensor, r: Tensor | None) -> Tensor:
    def norm(z: Tensor) -> Tensor:
        if params.norm is None or params.norm_bias is None:
            return z
        centred = z - z.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + params.norm_eps).sqrt()
        return centred / spread * params.norm.to(z) + params.norm_bias.to(z)

    def network(z: Tensor) -> Tensor:
        activation = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[params.activation.value]
        hidden = activation(F.linear(z, params.down.to(z), params.down_bias.to(z)))
        return params.scaling * F.linear(hidden, params.up.to(z), params.up_bias.to(z))

    match params.form.value:
        case "serial":
            return network(norm(h))
        case "parallel":
            return norm(h + network(h)) - h
        case "sum":
            assert r is not None
            return network(norm(h + r))
        case _:
            assert r is not None
            return network(norm(r))
