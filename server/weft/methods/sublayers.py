"""Finds the linear modules that end an attention or MLP sublayer, and where the residual stream enters it.

This is measured on the model itself, not read off its names: every linear module is made to return noise, the model
runs on two tokens, and a module ends a sublayer if its noise turns up added to the residual stream:

    in a row (Llama, GPT-2 …):     input of a later norm = input of an earlier norm + noise
    norms after sublayers:         input of a later norm = input of the layer, or output of a norm, + noise
    sublayers side by side:        input of a later norm = input of a norm + the noise of both

Only in the first layout does a norm open the sublayer alone, so that its input is the residual r of that sublayer. A
module whose noise is changed on its way to the stream (Gemma 2 norms it) ends no sublayer here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.methods.inject import AdaptedLinear, AdapterContext, Driver, inject
from weft.methods.protocol import Site, SiteKind


def mark(model: Any, sites: Sequence[Site]) -> list[Site]:
    """Return `sites`, with those that end a sublayer marked as such.

    `model` is a transformers model that is not yet wrapped. No weight of a linear site is used, and the model
    is left as it was.
    """
    linear = [site for site in sites if site.kind is SiteKind.LINEAR]
    layers = layers_of(model, linear)
    trace = _run(model, linear, layers)
    return [_marked(site, model, layers, trace) for site in sites]


class _Norm(NamedTuple):
    """A norm as it was seen during the run, after `num_answers` sites had been called."""

    name: str
    num_answers: int
    entered: Tensor  # float32 [tokens, features]
    left: Tensor


class _Trace(NamedTuple):
    """Inputs and outputs of modules in one run, all float32 [tokens, features]."""

    norms: list[_Norm]
    layers: dict[str, Tensor]  # inputs
    answers: list[tuple[str, Tensor]]  # outputs of sites, in the order of the run


def _marked(site: Site, model: nn.Module, layers: Sequence[str], trace: _Trace) -> Site:
    layer = next((name for name in layers if site.name.startswith(name + ".")), None)
    index = next((i for i, (name, _) in enumerate(trace.answers) if name == site.name), None)
    if layer is None or index is None:
        return site
    answer = trace.answers[index][1]
    norms_here = [norm for norm in trace.norms if norm.entered.shape == answer.shape]
    before = [norm for norm in norms_here if norm.num_answers <= index]
    later = [norm.entered for norm in norms_here if norm.num_answers > index]
    here = {"sublayer": _sublayer(site, layer, model), "layer": layers.index(layer)}
    inside = [norm for norm in before if norm.name.startswith(layer + ".")]
    if inside and _was_added(answer, inside[-1].entered, later):
        return replace(site, **here, norm=inside[-1].name)
    streams = [norm.entered for norm in inside] + [norm.left for norm in before if norm.left.shape == answer.shape]
    if trace.layers[layer].shape == answer.shape:
        streams.append(trace.layers[layer])
    others = [other for name, other in trace.answers if name.startswith(layer + ".") and name != site.name]
    beside = [answer, *(answer + other for other in others if other.shape == answer.shape)]
    if any(_was_added(added, stream, later) for stream in streams for added in beside):
        return replace(site, **here)
    return site


def _was_added(noise: Tensor, stream: Tensor, later: Sequence[Tensor]) -> bool:
    """Return whether stream plus noise turns up in `later`, up to rounding, which is small beside the noise."""
    return any((one - stream - noise).norm() < 0.1 * noise.norm() for one in later)


def _sublayer(site: Site, layer: str, model: nn.Module) -> str:
    """Return the kind of the sublayer: attention if a module on the site's path in the layer has a layer index.

    Attention needs that index to find its keys and values.
    """
    path = site.name.removeprefix(layer + ".").split(".")[:-1]
    inside = (".".join([layer, *path[:depth]]) for depth in range(1, len(path) + 1))
    return "attention" if any(hasattr(model.get_submodule(name), "layer_idx") for name in inside) else "mlp"


def layers_of(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Return the paths of the decoder layers: the members of the longest list of modules that all hold sites."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            members = [f"{name}.{index}" for index in range(len(module))]
            holds = all(any(site.name.startswith(member + ".") for site in sites) for member in members)
            if holds and len(members) > len(found):
                found = members
    return found


def _run(model: Any, sites: Sequence[Site], layers: Sequence[str]) -> _Trace:
    trace = _Trace([], {}, [])
    generator = torch.Generator().manual_seed(0)

    def answer(site: Site, x: Tensor) -> Tensor:
        noise = torch.randn(*x.shape[:-1], site.out_features, generator=generator).to(x.device, x.dtype)
        trace.answers.append((site.name, _rows(noise)))
        return noise

    def watch(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs:  # passed by position, as the layers' own norms receive it
                trace.norms.append(_Norm(name, len(trace.answers), _rows(inputs[0]), _rows(output)))

        return keep

    def enter(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            trace.layers[name] = _rows(inputs[0] if inputs else named["hidden_states"])

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(enter(name), with_kwargs=True) for name in layers]
    hooks += [module.register_forward_hook(watch(name)) for name, module in norms(model)]
    context = AdapterContext()
    inject(model, list(sites), context)
    try:
        with context.use(Answering(answer)):
            run_on_two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
        for site in sites:
            wrapped = model.get_submodule(site.name)
            assert isinstance(wrapped, AdaptedLinear)
            model.set_submodule(site.name, wrapped.base)
    return trace


def run_on_two_tokens(model: Any) -> None:
    """Run the body of a transformers `model` with eager attention: the registered one would need a paged batch."""
    with attending(model, "eager"), torch.inference_mode():
        model.base_model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Let a transformers `model` compute attention by another implementation inside the block."""
    given = model.config._attn_implementation
    try:
        model.set_attn_implementation(implementation)
        yield
    finally:
        model.set_attn_implementation(given)


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield leaf modules whose weight is a vector: layer norms of any kind, whatever their class."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and not any(module.children()):
            yield name, module


@dataclass(frozen=True, slots=True)
class Answering(Driver):
    """A driver that returns `answer(site, x)` and never computes the base's output, so that no weight is read."""

    answer: Callable[[Site, Tensor], Tensor]

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.answer(site, x)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().float().reshape(-1, tensor.shape[-1])
