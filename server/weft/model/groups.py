"""Hold linear modules that share an input as one: one product and one call of the deltas, not three, for q, k and v.

The groups are found on the model itself: in a run over two tokens, their members are called one after another with the
same tensor. For serving only: training calls each site by itself.
"""

import copy
from collections.abc import Sequence
from typing import Any

from weft.methods.bnb import Linear4bit, Params4bit
from weft.methods.bnb import functional as bnb

import torch
from torch import Tensor, nn

from weft.methods import sublayers
from weft.methods.inject import AdapterContext, GroupedLinear, LinearGroup
from weft.methods.protocol import Site, SiteKind

_TILE_ROWS = 32  # of bitsandbytes' packed layout: members of a 4-bit weight begin at a tile


def fuse(model: Any, context: AdapterContext) -> int:
    """Hold linear modules of a wrapped model that read the same input as one, in place; return the number of groups."""
    fused = 0
    for sites in shared_inputs(model, context):
        members = [model.get_submodule(site.name) for site in sites]
        whole = _stacked([member.base for member in members])
        if whole is None:
            continue
        group = LinearGroup(whole, sites, context)
        for place, site in enumerate(sites):
            model.set_submodule(site.name, GroupedLinear(group, place))
        fused += 1
    return fused


def shared_inputs(model: Any, context: AdapterContext) -> list[tuple[Site, ...]]:
    """Return runs of two or more linear sites of one parent that are called one after another with the same tensor."""
    runs: list[tuple[Tensor, list[Site]]] = []

    def zeros(site: Site, x: Tensor) -> Tensor:
        if runs and runs[-1][0] is x and _parent(runs[-1][1][-1]) == _parent(site):
            runs[-1][1].append(site)
        else:
            runs.append((x, [site]))
        return x.new_zeros(*x.shape[:-1], site.out_features)

    with context.use(sublayers.Answering(zeros)):
        sublayers.run_on_two_tokens(model)
    return [tuple(run) for _, run in runs if len(run) > 1 and all(site.kind is SiteKind.LINEAR for site in run)]


def _parent(site: Site) -> str:
    return site.name.rpartition(".")[0]


def _stacked(modules: Sequence[Any]) -> nn.Module | None:
    """Return one module with all their outputs side by side; None if modules of this kind cannot be stacked."""
    if len({(type(module), module.bias is None) for module in modules}) > 1:
        return None
    if all(type(module) is nn.Linear for module in modules):
        return _with(nn.Linear, modules, torch.cat([module.weight for module in modules]))
    if all(isinstance(module, Linear4bit) for module in modules):
        return _stacked_4bit(modules)
    return None


def _stacked_4bit(modules: Sequence[Any]) -> nn.Module | None:
    """Stack the rows of 4-bit weights, each in whole blocks; scales that are quantized themselves cannot be stacked."""
    states: list[bnb.QuantState] = [module.weight.quant_state for module in modules]
    first = states[0]
    whole_blocks = all(module.in_features % first.blocksize == 0 for module in modules)
    alike = len({(state.quant_type, state.blocksize, state.dtype) for state in states}) == 1
    nested = any(state.nested or getattr(state, "packing_format_for_cpu", False) for state in states)
    if not whole_blocks or not alike or nested or any(module.out_features % _TILE_ROWS for module in modules):
        return None
    state = copy.copy(first)
    state.absmax = torch.cat([one.absmax for one in states])
    state.shape = torch.Size((sum(module.out_features for module in modules), modules[0].in_features))
    data = torch.cat([module.weight.data.reshape(-1, 1) for module in modules])
    made: Any = Params4bit  # typed as a plain Parameter, which takes fewer arguments
    weight = made(
        data,
        quant_state=state,
        blocksize=first.blocksize,
        compress_statistics=False,
        quant_type=first.quant_type,
        quant_storage=data.dtype,
        bnb_quantized=True,
    )
    return _with(Linear4bit, modules, weight, compute_dtype=modules[0].compute_dtype, quant_type=first.quant_type)


def _with(made: Any, modules: Sequence[Any], weight: Tensor, **options: Any) -> nn.Module:
    """Return a module of class `made` with this weight and all biases."""
    biased = modules[0].bias is not None
    size_out = sum(module.out_features for module in modules)
    whole = made(modules[0].in_features, size_out, bias=biased, device="meta", **options)
    whole.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if isinstance(weight, Params4bit):
        weight.module = whole
        whole.quant_state = weight.quant_state
    if biased:
        whole.bias = nn.Parameter(torch.cat([module.bias for module in modules]), requires_grad=False)
    return whole.eval()
