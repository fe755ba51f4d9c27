"""One adapter as a trainable module on a frozen base, through the mathematics of `weft.methods`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import AdapterLimits
from weft.methods import ia3, lora, prefix
from weft.methods.checkpoint import directory
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import Adapter, BaseShape, Method
from weft.model.loader import Base

MethodConfig = lora.LoraConfig | ia3.Ia3Config | prefix.PrefixConfig


class _Kind(NamedTuple):
    """A method and how its parameters begin: at a site, or, for virtual positions, for the whole base."""

    method: Method
    init: Callable[..., Any]


_KINDS: Mapping[type, _Kind] = MappingProxyType(
    {
        lora.LoraConfig: _Kind(lora.METHOD, lora.init),
        ia3.Ia3Config: _Kind(ia3.METHOD, ia3.init),
        prefix.PrefixConfig: _Kind(prefix.METHOD, prefix.init),
    }
)


def method_of(config: MethodConfig) -> Method:
    """The method that `config` configures."""
    return _KINDS[type(config)].method
