"""bitsandbytes, imported in this one place, without the code that it would fetch from a hub.

If the package `kernels` is installed and the processor has AVX512-BF16, bitsandbytes downloads compiled code during its
import. Nothing is ever downloaded here unless the user names it, so `kernels` is hidden for that moment.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FETCHES, _ABSENT = "kernels", object()
# One recommends that package; the other logs a cast at each int8 product, 200 times in a step of a small model.
_NOISY = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    before = sys.modules.get(_FETCHES, _ABSENT)
    sys.modules[_FETCHES] = None  # pyright: ignore[reportArgumentType]  # an import of it fails
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield
    finally:
        del sys.modules[_FETCHES]
        if before is not _ABSENT:
            sys.modules[_FETCHES] = before  # pyright: ignore[reportArgumentType]  # None: hidden by the caller


with _without_hub_kernels():
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit", "functional"]
