"""Compile the programs in C before the package is put together, or installed as editable."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GuestBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        script = Path(self.root, "src", "trio_supermachine", "guest", "build.py")
        runpy.run_path(str(script))["build"]()
        # The programs are static and not linked to this Python: one wheel serves all.
        build_data["pure_python"] = True
