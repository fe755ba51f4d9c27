"""The methods there are."""

from collections.abc import Mapping
from types import MappingProxyType

from weft.methods import ia3, lora, prefix, prompt, ptuning
from weft.methods.protocol import Method

METHODS: Mapping[str, Method] = MappingProxyType(
    {m.name: m for m in (lora.METHOD, ia3.METHOD, prefix.METHOD, prompt.METHOD, ptuning.METHOD)}
)
