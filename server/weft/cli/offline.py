"""What the libraries below a server may fetch: only what the operator named."""

import os
import sys
from pathlib import Path

_CODE = "kernels"  # the package through which transformers and bitsandbytes load compiled code of the hub


def fetch_only(model: Path) -> None:
    """Keep this process from the hub's code and, if the base is a path here, from the hub.

    Call it before huggingface_hub is imported, which reads the environment then.
    """
    sys.modules[_CODE] = None  # pyright: ignore[reportArgumentType]  # an import of it fails
    if model.expanduser().exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
