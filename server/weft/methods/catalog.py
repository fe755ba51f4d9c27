"""The catalog of methods, and the kinds of adapters: these methods and mixtures of them."""

from collections.abc import Mapping
from types import MappingProxyType

from weft.methods import bitfit, bottleneck, dora, ia3, lora, mixture, prefix, prompt, ptuning, vera
from weft.methods.protocol import Method

_FOLDERS = (lora, dora, vera, bitfit, ia3, bottleneck, prefix, prompt, ptuning)

METHODS: Mapping[str, Method] = MappingProxyType({folder.METHOD.name: folder.METHOD for folder in _FOLDERS})
KINDS = frozenset({*METHODS, mixture.METHOD.name})
