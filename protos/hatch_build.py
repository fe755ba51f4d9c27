"""What hatch does beside copying files, for the distribution of the client: it takes the Python of ../server/weft."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PythonOfTheServersTree(BuildHookInterface):
    """Puts the packages `client` and `v1` of the server's tree into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        tree = Path(self.root).parent / "server" / "weft"
        if version == "editable" or not tree.is_dir():  # in an sdist, it lies beside the protos already
            return
        for package in ("client", "v1"):
            build_data["force_include"][str(tree / package)] = f"weft/{package}"
