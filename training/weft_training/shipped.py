"""Paths of the files that come with Weft: the demo base, the demo's adapters, the recipes.

A wheel carries them in this package, under their names in the repository (pyproject.toml); a checkout, and an editable
install of it, has them in the repository itself.
"""

from importlib.resources import files
from pathlib import Path


def _root(package: Path) -> Path:
    """Return the directory whose models/, adapters_store/ and training/ go with the code in `package`."""
    carried = package / "files"
    return carried if carried.is_dir() else package.parents[1]


ROOT = _root(Path(str(files("weft_training"))).resolve())
BASE = ROOT / "models" / "weft-demo"
ADAPTERS = ROOT / "adapters_store" / "demo"
REAL = ROOT / "adapters_store" / "real"
STYLES = ROOT / "adapters_store" / "styles"
_RECIPES = ROOT / "training" / "recipes"


def recipes() -> dict[str, Path]:
    """Return the recipes by name."""
    return {path.stem: path for path in sorted(_RECIPES.glob("*.yaml"))}
