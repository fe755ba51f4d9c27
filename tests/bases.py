"""Tiny bases as tests take them: written and loaded once a session, or fresh for a test that changes one."""

from pathlib import Path
from typing import Any

from tests import tiny
from weft.config import ModelConfig, Quantization
from weft.kernels.selection import select
from weft.model import loader, paged_attention, serving_form
from weft.model.loader import Base


def load(
    path: Path,
    quantization: Quantization = Quantization.NONE,
    dtype: str = "auto",
    *,
    attention: str = paged_attention.ATTENTION,
    device: str = "cpu",
    double_quant: bool = False,
) -> Base:
    """Load the base of a directory as a server does."""
    paged_attention.register()
    config: Any = {"quantization": quantization, "dtype": dtype, "device": device, "double_quant": double_quant}
    return loader.load(ModelConfig(path=path, **config), attention=attention)


class Bases:
    """The bases of tests/tiny.py. `bases(...)` is shared with other tests, so a test that changes one takes `fresh`.

    Changes are: other modules, weights or thresholds, the serving form. Adapters and steps leave a base as it is, but
    bitsandbytes repacks NF4 weights at their first product, so whoever reads those weights takes a fresh base, too.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[object, Base] = {}

    def path(self, architecture: str = "llama") -> Path:
        """Return the checkpoint, in a directory of the architecture's name; tests only read it."""
        path = self._directory / architecture
        return path if path.exists() else tiny.save_base(path, architecture)

    def __call__(
        self,
        architecture: str = "llama",
        quantization: Quantization = Quantization.NONE,
        dtype: str = "auto",
        **more: Any,
    ) -> Base:
        """Return the base that all tests of this session share; `more` as in `load`."""
        key = (architecture, quantization, dtype, *sorted(more.items()))
        if key not in self._held:
            self._held[key] = self.fresh(architecture, quantization, dtype, **more)
        return self._held[key]

    def fresh(
        self,
        architecture: str = "llama",
        quantization: Quantization = Quantization.NONE,
        dtype: str = "auto",
        **more: Any,
    ) -> Base:
        """Load a base that the caller may change; `more` as in `load`."""
        return load(self.path(architecture), quantization, dtype, **more)

    def served(
        self,
        architecture: str = "llama",
        quantization: Quantization = Quantization.NONE,
        dtype: str = "auto",
        **more: Any,
    ) -> Base:
        """Load a base of the caller's own, in its serving form; `more` as in `load`."""
        base = self.fresh(architecture, quantization, dtype, **more)
        serving_form.take(base, select(base.device, base.dtype))
        return base
