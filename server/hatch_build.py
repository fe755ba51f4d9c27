"""What hatch does beside copying files, for the distribution of the server.

It depends on the client of its own version. A wheel carries what the demo and the trainer read, and for Linux on x86-64
prebuilt CPU kernels; one that is built where there is no compiler is pure, and says so. WEFT_WHEEL_KERNELS names sets
of instructions, where not all are wanted ("x86-64-v3 x86-64-v4"). An editable install gets none of it: it finds the
files where they are, and its kernels are compiled at first use.
"""

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

_CLIENT = "weft-serve-client"
_FILES = "weft_training/files"
_KERNELS = "weft/kernels/cpu"
_TAG = "py3-none-manylinux_2_28_x86_64"  # tests/deploy/test_wheel.py holds the libraries to it


class ClientOfThisVersion(MetadataHookInterface):
    """Requires the client of this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = [f"{_CLIENT}=={metadata['version']}", *self.config["dependencies"]]


class FilesAndKernels(BuildHookInterface):
    """Puts the shipped files and the compiled kernels into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for name in self.config["shipped"]:
            build_data["force_include"][str(Path(self.root, name))] = f"{_FILES}/{name}"
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            self._add_kernels(build_data)

    def _add_kernels(self, build_data: dict[str, Any]) -> None:
        build = _load(Path(self.root, "server", _KERNELS, "build.py"))
        self._scratch = tempfile.TemporaryDirectory(prefix="weft-kernels-")
        files: dict[str, str] = {}
        try:
            for name in os.environ.get("WEFT_WHEEL_KERNELS", "").split() or build.INSTRUCTION_SETS:
                flags, _ = build.INSTRUCTION_SETS[name]
                path = Path(self._scratch.name, f"{name}.so")
                build.link(path, flags)
                files[str(path)] = f"{_KERNELS}/prebuilt/{path.name}"
        except build.KernelsUnavailable as error:
            self.app.display_warning(f"this wheel carries no prebuilt CPU kernels: {error}")
            return
        build_data["force_include"].update(files)
        build_data["pure_python"] = False
        build_data["tag"] = _TAG

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
