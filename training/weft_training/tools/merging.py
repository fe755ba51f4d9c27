"""Merge several LoRAs into one, module by module: the rules for adding their weighted updates.

    ΔW = Σ wᵢ ΔWᵢ,    ΔWᵢ = scalingᵢ · Bᵢ Aᵢ

    exact            all of it: A below A, weighted B beside B; the rank is the sum of the ranks
    svd              the best approximation of rank R: truncated singular values (Eckart and Young 1936)
    magnitude_prune  Σ wᵢ trim(ΔWᵢ); trim keeps the share `density` of entries that is largest
    ties             the same, but at each entry only those of the elected sign, and their mean (Yadav et al. 2023,
                     arXiv:2306.01708)
    dare_linear      Σ wᵢ drop(ΔWᵢ); drop keeps entries with probability `density`, over `density` (Yu et al. 2024,
                     arXiv:2311.03099)
    dare_ties        drop, then signs elected and means as in ties

All but `exact` end in `svd`'s truncation. The papers work on whole updates ΔWᵢ, and so does this. What PEFT and LoRAX
call "linear" adds A and B separately: PEFT's (Σ √(wᵢ scalingᵢ) Bᵢ)(Σ √(wᵢ scalingᵢ) Aᵢ) has products Bᵢ Aⱼ of different
adapters and is not a sum of updates.

Deviation: the weights, which TIES does not have, are applied after the election and do not vote (as in PEFT). A
bias of B is merged as one more update.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.methods import lora, targets
from weft.methods.lora.math import LoraConfig, LoraParams
from weft.methods.protocol import Adapter


class Part(NamedTuple):
    """One adapter's update of a module, and its weight."""

    params: LoraParams
    weight: float


class Merged(NamedTuple):
    """One module's update. kept: its Frobenius norm ÷ that of the update before truncation; below 1 if rank was cut."""

    params: LoraParams
    kept: float


Rule = Callable[[Sequence[Part]], Merged]


def merge(adapters: Sequence[tuple[Adapter, float]], rule: Rule) -> tuple[Adapter, float]:
    """Return one LoRA of scaling 1, in float32, and the least share of its norm that any module kept.

    Raises ValueError if an adapter is not a LoRA, or is an activated one, or if the sum is zero.
    """
    for index, (adapter, _) in enumerate(adapters):
        if adapter.method is not lora.METHOD:
            raise ValueError(f"part {index}: only LoRAs can be merged, given {adapter.method.name}")
        if adapter.invocation_tokens:  # a sum acts everywhere
            raise ValueError(f"part {index}: activated LoRAs cannot be merged, given one with invocation tokens")
    names = list(dict.fromkeys(name for adapter, _ in adapters for name in adapter.sites))
    merged = {name: rule([Part(a.sites[name], weight) for a, weight in adapters if name in a.sites]) for name in names}
    sites = {name: one.params for name, one in merged.items()}
    if not any(params.b.any() or (params.bias is not None and params.bias.any()) for params in sites.values()):
        raise ValueError("the parts cancel: nothing is left of their sum")
    if any(params.bias is not None for params in sites.values()):  # PEFT's form requires all to have one
        sites = {name: _with_bias(params) for name, params in sites.items()}
    return Adapter(method=lora.METHOD, config=_config(sites), sites=sites), min(one.kept for one in merged.values())


def exact(parts: Sequence[Part]) -> Merged:
    """Stack A and B, so that the result adds what the composition of the parts adds."""
    a = torch.cat([params.a.float() for params, _ in parts])
    b = torch.cat([params.b.float() * (weight * params.scaling) for params, weight in parts], dim=1)
    biases = [params.bias.float() * (weight * params.scaling) for params, weight in parts if params.bias is not None]
    return Merged(LoraParams(a, b, 1.0, torch.stack(biases).sum(0) if biases else None), 1.0)


def svd(parts: Sequence[Part], *, rank: int) -> Merged:
    """Truncate the sum to `rank`, by the singular values of the small R_B R_Aᵀ, which Q_B R_B R_Aᵀ Q_Aᵀ shares."""
    (a, b, _, bias), _ = exact(parts)
    q_b, r_b = torch.linalg.qr(b.double())  # [O, Q], [Q, R]
    q_a, r_a = torch.linalg.qr(a.double().mT)  # [I, P], [P, R]
    (inner_a, inner_b, *_), kept = _truncated(r_b @ r_a.mT, rank)
    return Merged(LoraParams((inner_a @ q_a.mT).float(), (q_b @ inner_b).float(), 1.0, bias), kept)


def magnitude_prune(parts: Sequence[Part], *, rank: int, density: float) -> Merged:
    """Add trimmed updates."""
    return _merged(parts, rank, lambda update: trim(update, density), _sum)


def ties(parts: Sequence[Part], *, rank: int, density: float) -> Merged:
    """Trim the updates, and at each entry average those of the elected sign."""
    return _merged(parts, rank, lambda update: trim(update, density), elected_mean)


def dare_linear(parts: Sequence[Part], *, rank: int, density: float, generator: torch.Generator) -> Merged:
    """Add updates with random entries dropped."""
    return _merged(parts, rank, lambda update: drop(update, density, generator), _sum)


def dare_ties(parts: Sequence[Part], *, rank: int, density: float, generator: torch.Generator) -> Merged:
    """Drop random entries of the updates, and at each entry average those of the elected sign."""
    return _merged(parts, rank, lambda update: drop(update, density, generator), elected_mean)


def trim(update: Tensor, density: float) -> Tensor:
    """Set all but the largest entries of `update` to 0; `density`, rounded down, is the share that stays."""
    flat = update.reshape(-1)
    kept = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(update)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, divided by `density`, else 0: the expectation is `update`."""
    kept = torch.bernoulli(torch.full_like(update, density), generator=generator)
    return update * kept / density


def elected_mean(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average, at each entry, wᵢ · updateᵢ over those with the sign of the unweighted sum (+ if the sum is 0)."""
    sign = torch.where(_sum(updates, [1.0] * len(updates)) >= 0, 1.0, -1.0)
    agreeing = [update.sign() == sign for update in updates]
    total = _sum([update * agrees for update, agrees in zip(updates, agreeing, strict=True)], weights)
    return total / torch.stack(agreeing).sum(0).clamp(min=1)


def _merged(
    parts: Sequence[Part],
    rank: int,
    thin: Callable[[Tensor], Tensor],
    combine: Callable[[Sequence[Tensor], Sequence[float]], Tensor],
) -> Merged:
    def combined(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return combine([thin(update) for update in updates], weights)

    weights = [weight for _, weight in parts]
    update = combined([(p.b.float() @ p.a.float()) * p.scaling for p, _ in parts], weights)  # [O, I]
    params, kept = _truncated(update, rank)
    with_bias = [(p.bias.float() * p.scaling, weight) for p, weight in parts if p.bias is not None]
    if with_bias:
        biases, weights = zip(*with_bias, strict=True)
        params = params._replace(bias=combined(biases, weights))
    return Merged(params, kept)


def _with_bias(params: LoraParams) -> LoraParams:
    return params if params.bias is not None else params._replace(bias=params.b.new_zeros(len(params.b)))


def _sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([update * weight for update, weight in zip(updates, weights, strict=True)]).sum(0)


def _truncated(update: Tensor, rank: int) -> Merged:
    """Return the nearest matrix of at most that rank, with its singular values in B."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    whole = s.norm().item()
    kept = s[:rank].norm().item() / whole if whole else 1.0
    return Merged(LoraParams(vh[:rank].contiguous(), u[:, :rank] * s[:rank], 1.0), kept)


def _config(sites: dict[str, LoraParams]) -> LoraConfig:
    """Make alpha the rank everywhere, and name the modules of a rank other than most in the patterns."""
    ranks = [params.rank for params in sites.values()]
    usual = max(ranks, key=ranks.count)
    others = {name: params.rank for name, params in sites.items() if params.rank != usual}
    return LoraConfig(
        rank=usual,
        alpha=float(usual),
        lora_bias=any(params.bias is not None for params in sites.values()),
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in sites})),
        rank_pattern=targets.patterns_of(others),
        alpha_pattern=targets.patterns_of({name: float(rank) for name, rank in others.items()}),
    )
