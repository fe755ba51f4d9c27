"""One adapter as a trainable module on a frozen base, with the mathematics of `weft.methods`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import AdapterLimits
from weft.methods.catalog import METHODS
from weft.methods.checkpoint import directory
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Adapter, BaseShape, Drop, Method, MethodConfig, SoftRows, VirtualKV
from weft.model.loader import Base
from weft_training import activation, prompt_init, reparameterization

# Default training config of each method, by name.
USUAL: Mapping[str, MethodConfig] = MappingProxyType({name: method.usual for name, method in METHODS.items()})


def usual(method: str, shape: BaseShape) -> MethodConfig:
    """Return the method's `USUAL` config with this base's module names; ValueError if the base has none for it."""
    return METHODS[method].fit(USUAL[method], shape)


def method_of(config: MethodConfig) -> Method:
    """Return the method that `config` configures."""
    return next(method for method in METHODS.values() if type(method.usual) is type(config))


def initial(config: MethodConfig, shape: BaseShape, generator: torch.Generator) -> Adapter:
    """Return an untrained adapter for a base.

    Empty `target_modules` means every linear module, and for BitFit every norm too. Raises the errors of
    `Method.begin`.
    """
    method = method_of(config)
    assert method.begin is not None
    return Adapter(method=method, **method.begin(config, shape, generator)._asdict())


def begin(config: MethodConfig, base: Base, generator: torch.Generator) -> "AdaptedModel":
    """Return a base with an untrained adapter, and with the module that makes it if the method trains one.

    Raises ValueError for a target that names no site, or an `init_text` without tokens.
    """
    adapter = initial(config, base.shape, generator)
    rows = prompt_init.begin(config, base, generator)
    adapter = adapter if rows is None else replace(adapter, prefix=rows)
    return AdaptedModel(base, adapter, reparameterization.begin(config, base.shape, generator))


def read(path: Path, shape: BaseShape) -> Adapter:
    """Read the adapter in a PEFT directory. Raises the errors of `directory.read`."""
    return directory.load(path, shape, AdapterLimits())


def map_tensors(adapter: Adapter, function: Callable[[Tensor], Tensor]) -> Adapter:
    """Return the adapter with `function` applied to every parameter tensor; frozen shared ones follow to its device."""
    moved: dict[int, Any] = {}

    def convert(params: Any) -> Any:
        changed = {name: function(value) for name, value in params._asdict().items() if isinstance(value, Tensor)}
        device = next(iter(changed.values())).device
        for name, frozen in params._asdict().items():
            if isinstance(frozen, tuple):
                if id(frozen) not in moved:
                    moved[id(frozen)] = type(frozen)(*(tensor.to(device) for tensor in frozen))
                changed[name] = moved[id(frozen)]
        return params._replace(**changed)

    sites = {name: convert(params) for name, params in adapter.sites.items()}
    return replace(adapter, sites=sites, prefix=None if adapter.prefix is None else convert(adapter.prefix))


def _dropping(adapter: Adapter, drop: Drop) -> Method:
    """Return the adapter's method, with `drop` in its delta if its config has dropout."""
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

    def __init__(self, base: Base, adapter: Adapter, reparameterized: nn.Module | None = None) -> None:
        super().__init__()
        self.base = base
        self.reparameterized = reparameterized
        if reparameterized is None:
            adapter = map_tensors(adapter, lambda t: nn.Parameter(t.to(base.device, torch.float32, copy=True)))
        else:
            reparameterized.to(base.device)
        # The optimizer updates the parameters in place, so this and the driver always hold the newest values.
        self._adapter = adapter
        self.tensors = nn.ParameterList([] if reparameterized is not None else adapter.tensors())
        self._segment = Segment(_dropping(adapter, self._drop), adapter.sites)
        self.driver: Driver = ReferenceDriver((self._segment,))  # of the latest batch

    def _drop(self, tensor: Tensor) -> Tensor:
        """Drop a share of the adapter's input, in training mode only; torch's generator decides which."""
        return nn.functional.dropout(tensor, self._adapter.config.dropout, self.training)

    @property
    def adapter(self) -> Adapter:
        """The adapter with its current parameters, as it would be written."""
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
        """The tokens from which on the adapter acts in a prompt; empty if it acts everywhere."""
        return self._adapter.invocation_tokens

    @property
    def num_trained(self) -> int:
        """Number of trained parameters; transformers has a `num_parameters` on its own models."""
        return self.adapter.num_parameters

    @property
    def inputs(self) -> tuple[str, ...]:
        """Digests of what the run reads besides its data and its base: none."""
        return ()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], and the loss if labels are given. All inputs are [B, T], padded on the right.

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
        """Return prompts [B, T], padded on the left, with continuations [B, T + N]; the options are transformers'."""
        # transformers drops as many ids as the cache already holds, so the ids of the virtual positions are never read.
        ids = torch.cat([input_ids.new_zeros(len(input_ids), self.num_virtual_tokens), input_ids], dim=1)
        past = self.past(len(ids))
        self._activate(input_ids, attention_mask)
        was_training = self.training
        self.eval()  # no dropout in answers
        try:
            with self.base.context.use(self.driver):
                whole = self.base.model.generate(
                    ids, attention_mask=self._extend(attention_mask), past_key_values=past, **options
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
        """Return a cache with the virtual positions of every row; None for a method without any."""
        virtual = self.virtual()
        if virtual is None:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*virtual, strict=True)):  # each [P, H, D]
            rows = [t.to(self.base.dtype).transpose(0, 1).expand(batch_size, -1, -1, -1) for t in (keys, values)]
            cache.update(rows[0], rows[1], layer)  # [B, H, P, D]
        return cache

    def virtual(self) -> VirtualKV | None:
        """Return keys and values of the virtual positions; differentiable. None for a method without any.

        Soft rows go through the base once, as in serving, not once per row. Deviation from PEFT, which puts them before
        every row: the first token of a row is no target, because no server ever generates it.
        """
        adapter = self.adapter
        if adapter.method.virtual is None:
            return None
        virtual = adapter.method.virtual(adapter.prefix)
        return self._computed(virtual) if isinstance(virtual, SoftRows) else virtual

    def _computed(self, soft: SoftRows) -> VirtualKV:
        """Compute the base's keys and values of soft rows at positions 0 to P - 1; differentiable."""
        cache = DynamicCache()
        self.base.model(
            inputs_embeds=soft.rows[None].to(self.base.dtype), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        layers: Any = cache.layers  # its type allows other kinds of layers
        keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in layers), strict=True)  # each [H, P, D]
        return VirtualKV(torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2))

    def _extend(self, attention_mask: Tensor) -> Tensor:
        """Return the mask [B, P + T]: every row sees all virtual positions, and its tokens count from P."""
        seen = attention_mask.new_ones(len(attention_mask), self.num_virtual_tokens)
        return torch.cat([seen, attention_mask], dim=1)
