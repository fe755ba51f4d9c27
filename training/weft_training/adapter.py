"""One adapter as a trainable module on a frozen base, through the mathematics of `weft.methods`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import AdapterLimits
from weft.methods import bottleneck, ia3, lora, prefix
from weft.methods.checkpoint import directory
from weft.methods.checkpoint.bottleneck import require_places
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import Adapter, BaseShape, Method
from weft.model.loader import Base

SiteConfig = lora.LoraConfig | ia3.Ia3Config
MethodConfig = SiteConfig | prefix.PrefixConfig | bottleneck.BottleneckConfig


class _Kind(NamedTuple):
    """A method and how its parameters begin: at a site, or, for virtual positions, for the whole base."""

    method: Method
    init: Callable[..., Any]


_KINDS: Mapping[type, _Kind] = MappingProxyType(
    {
        lora.LoraConfig: _Kind(lora.METHOD, lora.init),
        ia3.Ia3Config: _Kind(ia3.METHOD, ia3.init),
        prefix.PrefixConfig: _Kind(prefix.METHOD, prefix.init),
        bottleneck.BottleneckConfig: _Kind(bottleneck.METHOD, bottleneck.init),
    }
)

# What a method is trained with when nothing else is said, by its name. IA³'s sites are the paper's, named as in models
# of the Llama type.
USUAL: Mapping[str, MethodConfig] = MappingProxyType(
    {
        lora.METHOD.name: lora.LoraConfig(),
        ia3.METHOD.name: ia3.Ia3Config(
            target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",)
        ),
        prefix.METHOD.name: prefix.PrefixConfig(),
        bottleneck.METHOD.name: bottleneck.BottleneckConfig(),
    }
)


def method_of(config: MethodConfig) -> Method:
    """The method that `config` configures."""
    return _KINDS[type(config)].method


def initial(config: MethodConfig, shape: BaseShape, generator: torch.Generator) -> Adapter:
    """An untrained adapter for a base. Empty `target_modules` means every site.

    Raises ValueError for a target that no site is called, and InvalidAdapter where a bottleneck has no place.
    """
    kind = _KINDS[type(config)]
    if kind.method.virtual is not None:
        return Adapter(method=kind.method, config=config, sites={}, prefix=kind.init(config, shape, generator))
    if isinstance(config, bottleneck.BottleneckConfig):
        require_places(config, shape)
        places = bottleneck.places(config, shape.sites.values())
        params = {site.name: kind.init(config, site, generator) for site in places}
        return Adapter(method=kind.method, config=config, sites=params)
    suffixes = {site.suffix for site in shape.sites.values()}
    config = cast(SiteConfig, config)
    targets = config.target_modules or tuple(sorted(suffixes))
    for target in targets:
        if target not in suffixes:
            known = ", ".join(sorted(suffixes))
            raise ValueError(f"target_modules: must name linear modules of the base ({known}), given {target!r}")
    config = replace(config, target_modules=targets)
    sites = [site for site in shape.sites.values() if site.suffix in targets]
    params = {site.name: kind.init(config, site, generator) for site in sites}
    return Adapter(method=kind.method, config=config, sites=params)


def read(path: Path, shape: BaseShape) -> Adapter:
    """The adapter in a PEFT directory. Raises what `directory.read` raises."""
    config = json.loads((path / directory.CONFIG_FILE).read_text())
    with safe_open(path / directory.WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        return directory.read(config, tensors, file.metadata() or {}, shape, AdapterLimits())


def map_tensors(adapter: Adapter, function: Callable[[Tensor], Tensor]) -> Adapter:
    """The same adapter with `function` of every parameter tensor."""

    def convert(params: Any) -> Any:
        changed = {name: function(value) for name, value in params._asdict().items() if isinstance(value, Tensor)}
        return params._replace(**changed)

    sites = {name: convert(params) for name, params in adapter.sites.items()}
    return replace(adapter, sites=sites, prefix=None if adapter.prefix is None else convert(adapter.prefix))


class AdaptedModel(nn.Module):
    """A base with one adapter on every row.

    `parameters()` is the adapter in float32 and nothing else: the base is no submodule, so no optimizer, state_dict,
    `train()` or `to()` reaches it.
    """

    def __init__(self, base: Base, adapter: Adapter) -> None:
        super().__init__()
        self.base = base
        # The optimizer writes these in place, so `adapter` and the driver always hold the newest values.
        self.adapter = map_tensors(adapter, lambda t: nn.Parameter(t.to(base.device, torch.float32, copy=True)))
        self.tensors = nn.ParameterList(self.adapter.tensors())
        self.driver = ReferenceDriver((Segment(self.adapter.method, self.adapter.sites),))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **loss_options: Any
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss where there are labels. All inputs are [B, T], rows padded on the right."""
        past = self.past(len(input_ids))
        with self.base.context.use(self.driver):
            return self.base.model(
                input_ids=input_ids,
                attention_mask=self._extend(attention_mask),
                past_key_values=past,
                use_cache=past is not None,
                labels=labels,
                **loss_options,
            )

    @property
    def device(self) -> torch.device:
        return self.base.device

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Prompts [B, T], padded on the left, with their continuations [B, T + N]; the options are transformers'."""
        # transformers drops as many ids as the cache already holds: the virtual positions' are never looked at.
        ids = torch.cat([input_ids.new_zeros(len(input_ids), self.adapter.num_virtual_tokens), input_ids], dim=1)
        with self.base.context.use(self.driver):
            whole = self.base.model.generate(
                ids,
                attention_mask=self._extend(attention_mask),
                past_key_values=self.past(len(ids)),
                **options,
            )
        return whole[:, self.adapter.num_virtual_tokens :]

    def past(self, batch_size: int) -> DynamicCache | None:
        """The cache that holds the virtual positions of every row; None for a method without any."""
        virtual = self.adapter.method.virtual
        if virtual is None:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*virtual(self.adapter.prefix), strict=True)):  # each [P, H, D]
            rows = [t.to(self.base.dtype).transpose(0, 1).expand(batch_size, -1, -1, -1) for t in (keys, values)]
            cache.update(rows[0], rows[1], layer)  # [B, H, P, D]
        return cache

    def _extend(self, attention_mask: Tensor) -> Tensor:
        """The mask [B, P + T]: every row sees all virtual positions, and its tokens count from P."""
        seen = attention_mask.new_ones(len(attention_mask), self.adapter.num_virtual_tokens)
        return torch.cat([seen, attention_mask], dim=1)
