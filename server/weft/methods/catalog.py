"""The methods there are."""

from collections.abc import Mapping
from types import MappingProxyType

from weft.methods import bottleneck, ia3, lora, prefix
from weft.methods.protocol import Method

METHODS: Mapping[str, Method] = MappingProxyType(
    {m.name: m for m in (lora.METHOD, ia3.METHOD, prefix.METHOD, bottleneck.METHOD)}
)
