"""Compute each norm of a base, and each gate of its MLPs, in one kernel call.

Model code computes a norm in six operations and a gate in two, each of which writes a tensor. A module gets another
`forward` only if it was seen to compute the formula, on noise and in the base's own dtype. Everything else stays: its
class, its parameters, its name, its hooks. For serving only: kernels carry no gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.methods import sublayers
from weft.methods.inject import AdaptedLinear, GroupedLinear, LinearGroup
from weft.methods.protocol import SiteKind

RmsNorm = Callable[[Tensor, Tensor, float], Tensor]
Gate = Callable[[Tensor, Tensor, str], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_SCALES = (1.0, 1e-3)  # of the noise: at the second one, eps counts


@torch.inference_mode()
def fuse_norms(model: nn.Module, rms_norm: RmsNorm) -> int:
    """Replace the RMS norms of a model with the kernel; return how many were replaced."""
    fused = 0
    for _, norm in sublayers.norms(model):
        found = _rms_norm_of(norm)
        if found is not None:
            norm.forward = _norm_forward(rms_norm, *found)
            fused += 1
    return fused


@torch.inference_mode()
def fuse_gates(model: nn.Module, gate: Gate) -> int:
    """Replace gated MLPs whose projections are held as one with the kernel; return how many were replaced."""
    fused = 0
    for mlp, group, down in _gated(model):
        found = _gate_of(mlp, group, down)
        if found is not None:
            mlp.forward = _gated_forward(gate, group, down, *found)
            fused += 1
    return fused


def _rms_norm_of(norm: nn.Module) -> tuple[Tensor, float] | None:
    """Return (gain, eps) if the module is x · gain / √(mean(x²) + eps)."""
    weight: Any = norm.weight
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or getattr(norm, "bias", None) is not None:
        return None
    for gain in (weight.float(), 1 + weight.float()):
        if all(_is_close(norm(x), F.rms_norm(x.float(), gain.shape, gain, eps)) for x in _noise(weight)):
            return gain.contiguous(), eps
    return None


def _gate_of(mlp: nn.Module, group: LinearGroup, down: nn.Module) -> tuple[str, int] | None:
    """Return (activation, which of the group's two outputs it applies to) if the module is down(act(one) · other)."""
    size = group.sites[0].in_features
    weight: Any = group.whole.weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    noise = _noise(torch.empty(size, dtype=dtype, device=weight.device))
    for activation, function in _ACTIVATIONS.items():
        for place in (0, 1):
            outputs = [group.outputs(x) for x in noise]
            wanted = [down(function(pair[place]) * pair[1 - place]) for pair in outputs]
            if all(_is_close(mlp(x), y.float()) for x, y in zip(noise, wanted, strict=True)):
                return activation, place
    return None


def _gated(model: nn.Module) -> Iterator[tuple[nn.Module, LinearGroup, nn.Module]]:
    """Yield modules that hold a group of two and one more linear site, whose input is as wide as each of the two."""
    for parent in model.modules():
        children = dict(parent.named_children())
        groups = {child.group for child in children.values() if isinstance(child, GroupedLinear)}
        sites = [child for child in children.values() if isinstance(child, AdaptedLinear)]
        if len(groups) != 1 or len(sites) != 3:
            continue
        (group,) = groups
        rest = [child for child in sites if child.site not in group.sites and child.site.kind is SiteKind.LINEAR]
        if len(group.sites) == 2 and len(rest) == 1 and set(group.sizes) == {rest[0].site.in_features}:
            yield parent, group, rest[0]


def _noise(like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(1, 2, len(like), generator=generator)).to(like) for scale in _SCALES]


def _is_close(given: Tensor, wanted: Tensor) -> bool:
    """Return whether the two differ by no more than a few roundings to the module's dtype."""
    error = (given.float() - wanted).norm()
    return bool(error <= 4 * torch.finfo(given.dtype).eps * wanted.norm())


def _norm_forward(rms_norm: RmsNorm, gain: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, gain, eps)


def _gated_forward(
    gate: Gate, group: LinearGroup, down: nn.Module, activation: str, place: int
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        outputs = group.outputs(x)
        return down(gate(outputs[place], outputs[1 - place], activation))

    return forward
