"""Paths of the files that come with Weft: the demo base, the demo's adapters, the recipes.

A wheel carries them in this package, under their names in the repository (pyproject.toml); a checkout, and an editable
install of it, has them in the repository itself.
"""

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("weft_training"))).resolve()
# The directory whose models/, adapters_store/ and training/ go with this code.
ROOT = _PACKAGE / "files" if (_PACKAGE / "files").is_dir() else _PACKAGE.parents[1]
BASE = ROOT / "models" / "weft-demo"
ADAPTERS = ROOT / "adapters_store" / "demo"
REAL = ROOT / "adapters_store" / "real"
STYLES = ROOT / "adapters_store" / "styles"
_RECIPES = ROOT / "training" / "recipes"


def recipes() -> dict[str, Path]:
    """Return the recipes by name."""
    return {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}
