"""Arrow: a router made of LoRA experts, without training (Ostapenko et al. 2024, arXiv:2405.11157, section 4.2).

    ΔW = scaling · B A = U S Vᵀ        logits = |V₀ᵀ h| / τ        gates = softmax over the top k

V₀, the input direction that an expert's update amplifies most, is the expert's row. Deviations: the paper and PEFT gate
each module by its own input. Here a layer has one gate for everything that an expert does in it, so

- the updates of all modules of the layer that read a norm of the residual stream are stacked before V₀ is taken. V₀ is
  the direction that they amplify most together; modules with other inputs (o_proj, down_proj) do not count;
- a norm's gain g is folded in, ΔW diag(g), since the router reads h / rms(h) and not each norm's output. If the norm
  subtracts the mean, so does ΔW. Modules after a layer's second norm are judged by the state that enters the layer.

An expert without such a module in a layer gets a row of zeros, the least possible logit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.methods import sublayers
from weft.methods.inject import AdaptedLinear
from weft.methods.lora.math import LoraParams
from weft.methods.mixture import MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape


class NormReader(NamedTuple):
    """A site whose input is a norm of the residual stream: x = gain ⊙ h / rms(h), up to a constant.

    gain: float64 [hidden]. centers: whether the norm first subtracts the mean of h.
    """

    site: str
    layer: int
    gain: Tensor
    centers: bool


def config(num_experts: int, *, top_k: int, temperature: float) -> MixtureConfig:
    """Return the mixture config for Arrow's rows. Raises ValueError for numbers that no mixture may have."""
    return MixtureConfig(num_experts=num_experts, top_k=top_k, temperature=temperature, rms_norm=True, absolute=True)


def norm_readers(model: Any, shape: BaseShape) -> list[NormReader]:
    """Find the sites that read a norm, by their inputs on a run over two tokens. `model` is wrapped and idle.

    Raises ValueError if no module does, as on bases whose norms only follow sublayers.
    """
    layers = sublayers.layers_of(model, list(shape.sites.values()))
    normed: list[tuple[nn.Module, Tensor]] = []
    found: list[NormReader] = []

    def keep(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        normed.append((norm, output))

    def enter(site: str, layer: int) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            for norm, output in normed:
                if x.shape == output.shape and torch.equal(x, output):
                    found.append(NormReader(site, layer, *_gain(norm, x)))
                    return

        return look

    hooks = [norm.register_forward_hook(keep) for _, norm in sublayers.norms(model)]
    for layer, path in enumerate(layers):
        for site in shape.sites.values():
            module = model.get_submodule(site.name)
            if site.name.startswith(path + ".") and isinstance(module, AdaptedLinear):
                hooks.append(module.register_forward_pre_hook(enter(site.name, layer)))
    try:
        sublayers.run_on_two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("base: none of its modules reads a norm of the residual stream, so Arrow has nothing to go by")
    return found


def _gain(norm: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """Measure the norm's gain, and whether it subtracts the mean, without reading attributes of its class.

    Alternating ±1 has mean 0 and mean square 1, so norm(±x) = ±g ⊙ x + bias; a constant added to x shows the mean.
    """
    x = torch.ones_like(like[..., :1, :])
    x[..., 1::2] = -1
    at, opposite, shifted = (norm(each).double().flatten() for each in (x, -x, x + 1))
    gain = (at - opposite) / 2 * x.double().flatten()
    return gain.cpu(), bool((shifted - at).norm() < 0.1 * at.norm())


def router(
    readers: Sequence[NormReader], experts: Sequence[Mapping[str, LoraParams]], shape: BaseShape
) -> MixtureParams:
    """Return a row for each expert in each layer, [L, N, hidden]. experts: the parameters of each by site.

    Raises ValueError for an expert without a row in any layer.
    """
    weight = torch.zeros(shape.num_layers, len(experts), len(readers[0].gain))
    for layer in range(shape.num_layers):
        here = [reader for reader in readers if reader.layer == layer]
        for index, sites in enumerate(experts):
            weight[layer, index] = direction([(reader, sites[reader.site]) for reader in here if reader.site in sites])
    for index in range(len(experts)):
        if not weight[:, index].any():
            raise ValueError(f"experts[{index}]: adapts no module that reads a norm, so Arrow has nothing to go by")
    return MixtureParams(weight)


def direction(updates: Sequence[tuple[NormReader, LoraParams]]) -> Tensor | float:
    """Return the unit vector [hidden] that the stacked updates amplify most; 0 if there are none.

    With B = Q R the right singular vectors of B A are those of R A, which has as few rows as the rank.
    """
    rows = []
    for reader, params in updates:
        r = torch.linalg.qr(params.b.double().cpu(), mode="r").R
        update = params.scaling * (r @ params.a.double().cpu()) * reader.gain
        rows.append(update - update.mean(-1, keepdim=True) if reader.centers else update)
    if not rows:
        return 0.0
    _, sizes, right = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    return right[0].float() if sizes[0] > 0 else 0.0
