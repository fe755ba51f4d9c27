"""The methods there are, and the kinds of adapters: these and mixtures of them."""

from collections.abc import Mapping
from types import MappingProxyType

from weft.methods import bitfit, bottleneck, dora, ia3, lora, mixture, prefix, prompt, ptuning
from weft.methods.protocol import Method

_ALL = (
    *(lora.METHOD, dora.METHOD, bitfit.METHOD, ia3.METHOD, bottleneck.METHOD),
    *(prefix.METHOD, prompt.METHOD, ptuning.METHOD),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
KINDS = frozenset({*METHODS, mixture.METHOD.name})
