"""One adapter as a trainable module on a frozen base, through the mathematics of `weft.methods`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import AdapterLimits
from weft.methods import bitfit, bottleneck, dora, ia3, lora, prefix, prompt, ptuning, targets
from weft.methods.checkpoint import directory
from weft.methods.checkpoint.bottleneck import require_places
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Adapter, BaseShape, Drop, Method, SiteKind, SoftRows, VirtualKV
from weft.model.loader import Base
from weft_training import activation, prompt_init, reparameterization
from weft_training.reparameterization import Reparameterization

SiteConfig = lora.LoraConfig | dora.DoraConfig | ia3.Ia3Config | bitfit.BitfitConfig
VirtualConfig = prefix.PrefixConfig | prompt.PromptConfig | ptuning.PtuningConfig
MethodConfig = SiteConfig | VirtualConfig | bottleneck.BottleneckConfig


class _Kind(NamedTuple):
    """A method and how its parameters begin: at a site, or, for virtual positions, for the whole base.

    takes: the kinds of sites that it acts on where it is told to; usual: where it is told nothing.
    """

    method: Method
    init: Callable[..., Any]
    takes: tuple[SiteKind, ...] = (SiteKind.LINEAR,)
    usual: tuple[SiteKind, ...] = (SiteKind.LINEAR,)


_WITH_HEAD = (SiteKind.LINEAR, SiteKind.HEAD)


_KINDS: Mapping[type, _Kind] = MappingProxyType(
    {
        lora.LoraConfig: _Kind(lora.METHOD, lora.init, _WITH_HEAD),
        dora.DoraConfig: _Kind(dora.METHOD, dora.init, _WITH_HEAD),
        bitfit.BitfitConfig: _Kind(bitfit.METHOD, bitfit.init, tuple(SiteKind), (SiteKind.LINEAR, SiteKind.NORM)),
        ia3.Ia3Config: _Kind(ia3.METHOD, ia3.init),
        prefix.PrefixConfig: _Kind(prefix.METHOD, prefix.init),
        prompt.PromptConfig: _Kind(prompt.METHOD, prompt.init),
        ptuning.PtuningConfig: _Kind(ptuning.METHOD, ptuning.init),
        bottleneck.BottleneckConfig: _Kind(bottleneck.METHOD, bottleneck.init),
    }
)

# What a method is trained with when nothing else is said, by its name. IA³'s sites are the paper's, named as in models
# of the Llama type.
USUAL: Mapping[str, MethodConfig] = MappingProxyType(
    {
        lora.METHOD.name: lora.LoraConfig(),
        dora.METHOD.name: dora.DoraConfig(),
        bitfit.METHOD.name: bitfit.BitfitConfig(),
        ia3.METHOD.name: ia3.Ia3Config(
            target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",)
        ),
        prefix.METHOD.name: prefix.PrefixConfig(),
        prompt.METHOD.name: prompt.PromptConfig(),
        ptuning.METHOD.name: ptuning.PtuningConfig(),
        bottleneck.METHOD.name: bottleneck.BottleneckConfig(),
    }
)


# IA³'s sites by what bases call them: keys and values, fused or apart, and the feed-forward input last. GPT-2 has one
# name for the ends of both sublayers, so there the attention's is scaled too.
_IA3_MODULES = (("k_proj", "v_proj", "down_proj"), ("qkv_proj", "down_proj"), ("c_attn", "c_proj"))


def usual(method: str, shape: BaseShape) -> MethodConfig:
    """`USUAL`, with modules called as this base calls them; ValueError where it has none that the method knows."""
    config = USUAL[method]
    if not isinstance(config, ia3.Ia3Config):
        return config
    suffixes = {site.suffix for site in shape.sites.values()}
    for modules in _IA3_MODULES:
        if suffixes >= set(modules):
            return replace(config, target_modules=modules, feedforward_modules=modules[-1:])
    raise ValueError(
        f"target_modules: must be given for {method} on this base, which has {', '.join(sorted(suffixes))}"
    )


def method_of(config: MethodConfig) -> Method:
    """The method that `config` configures."""
    return _KINDS[type(config)].method


def initial(config: MethodConfig, shape: BaseShape, generator: torch.Generator) -> Adapter:
    """Return an untrained adapter for a base.

    Empty `target_modules` means every linear module, for BitFit every norm too.
    Its config is resolved: `target_modules` are all that it touches, and `layers` and `exclude` are worked in.
    Raises ValueError for a name, an index or a pattern that means nothing on this base, and InvalidAdapter where a
    bottleneck has no place.
    """
    kind = _KINDS[type(config)]
    if kind.method.virtual is not None:
        return Adapter(method=kind.method, config=config, sites={}, prefix=kind.init(config, shape, generator))
    if isinstance(config, bottleneck.BottleneckConfig):
        targets.require_layers(config.layers, shape)
        if config.layers:
            others = set(range(shape.num_layers)).difference(config.layers)
            config = replace(config, layers=(), leave_out=tuple(sorted(others.union(config.leave_out))))
        require_places(config, shape)
        places = bottleneck.places(config, shape.sites.values())
        for layer in config.reduction_factors:
            if all(site.layer != layer for site in places):
                raise ValueError(f"reduction_factors: must name layers that have adapters, given {layer}")
        params = {site.name: kind.init(config, site, generator) for site in places}
        return Adapter(method=kind.method, config=config, sites=params)
    config = cast(SiteConfig, config)
    usual = tuple(sorted({site.suffix for site in shape.of_kind(*kind.usual)}))
    sites = targets.select(
        shape.of_kind(*kind.takes),
        shape,
        targets=config.target_modules or usual,
        layers=config.layers,
        exclude=config.exclude,
    )
    if isinstance(config, lora.LoraConfig):
        targets.require_decisive("rank_pattern", config.rank_pattern, sites)
        targets.require_decisive("alpha_pattern", config.alpha_pattern, sites)
    if isinstance(config, ia3.Ia3Config):
        targets.require_named("feedforward_modules", config.feedforward_modules, sites)
    params = {site.name: kind.init(config, site, generator) for site in sites}
    resolved = replace(config, target_modules=targets.describe(params, shape), layers=(), exclude=())
    return Adapter(method=kind.method, config=resolved, sites=params)


def begin(config: MethodConfig, base: Base, generator: torch.Generator) -> "AdaptedModel":
    """A base with an untrained adapter, and with the module that makes it where the method trains one.

    Raises ValueError for a target that no site is called, or an `init_text` without tokens.
    """
    adapter = initial(config, base.shape, generator)
    if isinstance(config, prompt.PromptConfig) and config.prompt_init is not prompt.PromptInit.RANDOM:
        rows = prompt_init.token_rows(config, base, generator)
        adapter = replace(adapter, prefix=prompt.PromptParams(rows))
    return AdaptedModel(base, adapter, reparameterization.begin(config, base.shape, generator))


def read(path: Path, shape: BaseShape) -> Adapter:
    """The adapter in a PEFT directory. Raises what `directory.read` raises."""
    return directory.load(path, shape, AdapterLimits())


def map_tensors(adapter: Adapter, function: Callable[[Tensor], Tensor]) -> Adapter:
    """The same adapter with `function` of every parameter tensor."""

    def convert(params: Any) -> Any:
        changed = {name: function(value) for name, value in params._asdict().items() if isinstance(value, Tensor)}
        return params._replace(**changed)

    sites = {name: convert(params) for name, params in adapter.sites.items()}
    return replace(adapter, sites=sites, prefix=None if adapter.prefix is None else convert(adapter.prefix))


def _dropping(adapter: Adapter, drop: Drop) -> Method:
    """The adapter's method, with `drop` in its delta where its config wants dropout."""
    if not getattr(adapter.config, "dropout", 0):
        return adapter.method
    method = adapter.method
    if method.after is not None:
        return replace(method, after=cast(Any, partial(cast(Any, method.after), drop=drop)))
    return replace(method, post=cast(Any, partial(cast(Any, method.post), drop=drop)))


class AdaptedModel(nn.Module):
    """A base with one adapter on every row.

    `parameters()` is what is trained, in float32, and nothing else: the adapter, or the module that makes its virtual
    positions. The base is no submodule, so no optimizer, state_dict, `train()` or `to()` reaches it.
    """

    def __init__(self, base: Base, adapter: Adapter, reparameterized: Reparameterization | None = None) -> None:
        super().__init__()
        self.base = base
        self.reparameterized = reparameterized
        if reparameterized is None:
            adapter = map_tensors(adapter, lambda t: nn.Parameter(t.to(base.device, torch.float32, copy=True)))
        else:
            cast(nn.Module, reparameterized).to(base.device)
        # The optimizer writes the parameters in place, so this and the driver always hold the newest values.
        self._adapter = adapter
        self.tensors = nn.ParameterList([] if reparameterized is not None else adapter.tensors())
        self._segment = Segment(_dropping(adapter, self._drop), adapter.sites)
        self.driver: Driver = ReferenceDriver((self._segment,))  # of the newest batch

    def _drop(self, tensor: Tensor) -> Tensor:
        """Drop a share of what the adapter reads, in training mode alone; torch's generator decides which."""
        return nn.functional.dropout(tensor, self._adapter.config.dropout, self.training)

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, and as it would be written."""
        if self.reparameterized is None:
            return self._adapter
        return replace(self._adapter, prefix=self.reparameterized())

    @property
    def made(self) -> Adapter:
        """What is written at the end: the adapter."""
        return self.adapter

    @property
    def method(self) -> str:
        """The method's name."""
        return self._adapter.method.name

    @property
    def invocation_tokens(self) -> Sequence[int]:
        """What the adapter waits for in a prompt; empty where it acts everywhere."""
        return self._adapter.invocation_tokens

    @property
    def num_trained(self) -> int:
        """Parameters of what is made. (`num_parameters` would be what transformers calls on its own models.)"""
        return self.adapter.num_parameters

    @property
    def inputs(self) -> tuple[str, ...]:
        """Digests of what the run reads beside its data and its base: nothing."""
        return ()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss where there are labels. All inputs are [B, T], rows padded on the right.

        Packed rows come with positions instead of a mask (weft_training/packing.py).
        """
        past = self.past(len(input_ids))
        self._activate(input_ids, attention_mask, labels)
        with self.base.context.use(self.driver):
            return self.base.model(
                input_ids=input_ids,
                attention_mask=None if attention_mask is None else self._extend(attention_mask),
                position_ids=position_ids,
                past_key_values=past,
                use_cache=past is not None,
                labels=labels,
                **loss_options,
            )

    @property
    def num_virtual_tokens(self) -> int:
        return self._adapter.num_virtual_tokens

    @property
    def device(self) -> torch.device:
        return self.base.device

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Prompts [B, T], padded on the left, with their continuations [B, T + N]; the options are transformers'."""
        # transformers drops as many ids as the cache already holds: the virtual positions' are never looked at.
        ids = torch.cat([input_ids.new_zeros(len(input_ids), self.num_virtual_tokens), input_ids], dim=1)
        past = self.past(len(ids))
        self._activate(input_ids, attention_mask)
        was_training = self.training
        self.eval()  # an answer is nothing to drop from
        try:
            with self.base.context.use(self.driver):
                whole = self.base.model.generate(
                    ids,
                    attention_mask=self._extend(attention_mask),
                    past_key_values=past,
                    **options,
                )
        finally:
            self.train(was_training)
        return whole[:, self.num_virtual_tokens :]

    def _activate(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Let an activated adapter act on these rows from their invocations on; any other acts everywhere."""
        invocation = self._adapter.invocation_tokens
        if invocation:
            counts = activation.counts(invocation, input_ids, attention_mask, labels)
            self.driver = activation.ActivatedDriver(self._segment, counts)

    def past(self, batch_size: int) -> DynamicCache | None:
        """The cache that holds the virtual positions of every row; None for a method without any."""
        virtual = self.virtual()
        if virtual is None:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*virtual, strict=True)):  # each [P, H, D]
            rows = [t.to(self.base.dtype).transpose(0, 1).expand(batch_size, -1, -1, -1) for t in (keys, values)]
            cache.update(rows[0], rows[1], layer)  # [B, H, P, D]
        return cache

    def virtual(self) -> VirtualKV | None:
        """Keys and values of the virtual positions; differentiable. None for a method without any.

        Soft rows go through the base once, as in serving, not once per row. Deviation from PEFT, which puts them before
        every row: the first token of a row is no target, as no server ever generates it.
        """
        adapter = self.adapter
        if adapter.method.virtual is None:
            return None
        virtual = adapter.method.virtual(adapter.prefix)
        return self._computed(virtual) if isinstance(virtual, SoftRows) else virtual

    def _computed(self, soft: SoftRows) -> VirtualKV:
        """What the base alone makes of soft rows at positions 0 to P - 1; differentiable."""
        cache = DynamicCache()
        self.base.model(
            inputs_embeds=soft.rows[None].to(self.base.dtype), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        layers: Any = cache.layers  # typed for layers of other kinds too
        keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in layers), strict=True)  # each [H, P, D]
        return VirtualKV(torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2))

    def _extend(self, attention_mask: Tensor) -> Tensor:
        """The mask [B, P + T]: every row sees all virtual positions, and its tokens count from P."""
        seen = attention_mask.new_ones(len(attention_mask), self.num_virtual_tokens)
        return torch.cat([seen, attention_mask], dim=1)
