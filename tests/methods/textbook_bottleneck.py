"""Bottleneck adapters written out as plain modules on a stock transformers model: the oracle of their tests.

No library that has them can be installed beside this version of transformers, so the formulas are written again in
another way: torch's own modules, hooked on whole sublayers, with the residual of the decoder layer and its second norm.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Names of attention, MLP and the norm that opens the MLP, by architecture.
_CHILDREN = {"gpt2": ("attn", "mlp", "ln_2"), "gpt_neox": ("attention", "mlp", "post_attention_layernorm")}
_USUAL_CHILDREN = ("self_attn", "mlp", "post_attention_layernorm")


class Network(nn.Module):
    """f, as modules."""

    def __init__(self, features: int, size: int, activation: str, *, has_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features) if has_norm else nn.Identity()
        self.down = nn.Linear(features, size)
        self.activation = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[activation]
        self.up = nn.Linear(size, features)
        self.scaling = 1.0

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.activation(self.down(self.norm(z)))) * self.scaling


def serial(network: Network, h: Tensor, r: Tensor) -> Tensor:
    """Return the value in place of a sublayer's output h; the layer itself adds the residual r."""
    return h + network(h)


def parallel(network: Network, h: Tensor, r: Tensor) -> Tensor:
    """Return LN(h + f(h)), in which f has no LN."""
    return network.norm(h + network.up(network.activation(network.down(h))) * network.scaling)


def sum_(network: Network, h: Tensor, r: Tensor) -> Tensor:
    return h + network(h + r)


def residual(network: Network, h: Tensor, r: Tensor) -> Tensor:
    return h + network(r)


FORMS: Mapping[str, Callable[[Network, Tensor, Tensor], Tensor]] = {
    "serial": serial,
    "parallel": parallel,
    "sum": sum_,
    "residual": residual,
}


def attach(model: Any, networks: Mapping[tuple[int, str], Network], form: str) -> None:
    """Hook the networks, by layer and sublayer, on a transformers model."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and hasattr(m[0], "mlp"))
    names = _CHILDREN.get(model.config.model_type, _USUAL_CHILDREN)
    for index, layer in enumerate(layers):
        attention, mlp, norm = (getattr(layer, name) for name in names)
        seen: dict[str, Tensor] = {}
        layer.register_forward_pre_hook(_keep(seen, "attention"), with_kwargs=True)
        norm.register_forward_pre_hook(_keep(seen, "mlp"), with_kwargs=True)
        for sublayer, module in (("attention", attention), ("mlp", mlp)):
            if (index, sublayer) in networks:
                module.register_forward_hook(_change(networks[index, sublayer], FORMS[form], seen, sublayer))


def _keep(seen: dict[str, Tensor], sublayer: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen[sublayer] = inputs[0] if inputs else named["hidden_states"]

    return hook


def _change(
    network: Network, form: Callable[[Network, Tensor, Tensor], Tensor], seen: dict[str, Tensor], sublayer: str
) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (form(network, output[0], seen[sublayer]), *output[1:])
        return form(network, output, seen[sublayer])

    return hook


def logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Return the logits of every position of each prompt."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
