"""Mixtures on a stock transformers model: the oracle of their tests, over that of compositions.

    g = normalize(top_k(softmax(W h / τ))),   out = y + Σ g · delta(x, y)

Gates are made number by number, in Python's own floats, with nothing of `weft.methods` but the tensors. Bounds are met
by bisection: the scale s at which Σ clip(s g, floor, ceiling) is the sum that the gates had.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mixing import textbook_composition as composition
from weft.methods.mixture import Level, Mixture, MixtureConfig
from weft.methods.protocol import Adapter

Bound = tuple[bool, float, float]  # allowed, floor, ceiling


def gates(config: MixtureConfig, weight: Tensor, hidden: Tensor, bounds: Sequence[Bound] = ()) -> Tensor:
    """[T, N] of hidden states [T, H], float64."""
    rows = [_row(config, weight.double().tolist(), row, bounds) for row in hidden.double().tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def _row(config: MixtureConfig, weight: list[list[float]], h: list[float], bounds: Sequence[Bound]) -> list[float]:
    if config.rms_norm:
        spread = math.sqrt(sum(x * x for x in h) / len(h) + 1e-6)
        h = [x / spread for x in h]
    logits = [sum(w * x for w, x in zip(row, h, strict=True)) for row in weight]
    if config.absolute:
        logits = [abs(logit) for logit in logits]
    allowed = [index >= config.num_experts or not bounds or bounds[index][0] for index in range(len(logits))]
    top = max(logit for logit, may in zip(logits, allowed, strict=True) if may)
    raised = [
        math.exp((logit - top) / config.temperature) if may else 0.0 for logit, may in zip(logits, allowed, strict=True)
    ]
    chances = [one / sum(raised) for one in raised]
    kept = sorted(range(len(chances)), key=lambda index: (-chances[index], index))[: config.top_k]
    chosen = [chance if index in kept else 0.0 for index, chance in enumerate(chances)]
    if config.normalize:
        chosen = [one / sum(chosen) for one in chosen]
    return _bounded(chosen[: config.num_experts], bounds) if bounds else chosen[: config.num_experts]


def _bounded(chosen: list[float], bounds: Sequence[Bound]) -> list[float]:
    total = sum(chosen)

    def at(scale: float) -> list[float]:
        return [
            0.0 if not may else min(max(scale * gate, floor), ceiling)
            for gate, (may, floor, ceiling) in zip(chosen, bounds, strict=True)
        ]

    if sum(at(0.0)) >= total:
        return at(0.0)
    low, high = 0.0, 1.0
    while sum(at(high)) < total and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)


class Gate:
    """Stands where a weight stands: one expert's gates in the layer that is being computed."""

    def __init__(self, now: list[Tensor], expert: int) -> None:
        self._now = now
        self._expert = expert

    def __mul__(self, delta: Tensor) -> Tensor:
        return self._now[-1][:, self._expert, None].to(delta) * delta


def logits(
    model: Any, tokens: Sequence[int], mixture: Mixture, experts: Sequence[Adapter], bounds: Sequence[Bound] = ()
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and gates [L, T, N]; the model is left as it was."""
    now: list[Tensor] = []
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    pooled = model.get_input_embeddings()(torch.tensor(list(tokens))).mean(0)

    def enter(layer: int, hidden: Tensor) -> None:
        read = pooled.expand(len(tokens), -1) if mixture.config.level is Level.SEQUENCE else hidden[0]
        weight = mixture.params.weight[0 if mixture.config.shared else layer]
        now.append(gates(mixture.config, weight, read, bounds))

    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs, named, index=index: enter(index, inputs[0] if inputs else named["hidden_states"]),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]
    hooks += _gate_spans(layers, experts, now)
    try:
        parts: Any = [
            (adapter, Gate(now, index) if adapter.prefix is None else 1.0) for index, adapter in enumerate(experts)
        ]
        return composition.logits(model, tokens, parts), torch.stack(now[-len(layers) :])
    finally:
        for hook in hooks:
            hook.remove()


def _gate_spans(layers: Any, experts: Sequence[Adapter], now: list[Tensor]) -> list[Any]:
    """Hooks that put log g of each expert's virtual positions into the mask, which is added to the scores."""
    columns: list[tuple[int, slice]] = []
    start = 0
    for index, adapter in enumerate(experts):
        if adapter.num_virtual_tokens:
            columns.append((index, slice(start, start + adapter.num_virtual_tokens)))
            start += adapter.num_virtual_tokens

    def gate(module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if named["attention_mask"] is None:  # soft rows on their way through the base, alone
            return inputs, named
        mask = named["attention_mask"].clone()
        for index, place in columns:
            mask[0, 0, :, place] = now[-1][:, index, None].log().to(mask)
        return inputs, {**named, "attention_mask": mask}

    if not columns:
        return []
    attentions = [getattr(layer, "self_attn", None) or layer.attn for layer in layers]
    return [attention.register_forward_pre_hook(gate, with_kwargs=True) for attention in attentions]
