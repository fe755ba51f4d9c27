"""What hatch does beside copying files: it puts prebuilt CPU kernels into a wheel for Linux on x86-64.

An editable install gets none (its kernels are compiled at first use), and neither does a wheel that is built where
there is no compiler: that one is pure, and says so.
"""

import importlib.util
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = "weft/kernels/cpu"
_TAG = "py3-none-manylinux_2_28_x86_64"  # tests/deploy/test_wheel.py holds the libraries to it


class PrebuiltKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        build = _load(Path(self.root, "server", _KERNELS, "build.py"))
        self._scratch = tempfile.TemporaryDirectory(prefix="weft-kernels-")
        files: dict[str, str] = {}
        try:
            for name, (flags, _) in build.INSTRUCTION_SETS.items():
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
