"""Compile the programs in C before the package is put together, or installed as editable."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProgramBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        package = Path(self.root, "src", "trio_supermachine")
        # The guest's programs are static and not linked to this Python: they serve all hosts.
        runpy.run_path(str(package / "guest" / "build.py"))["build"]()
        self._bind_kvm(package / "hv" / "kvm" / "_build.py", build_data)

    def _bind_kvm(self, script: Path, build_data: dict[str, Any]) -> None:
        binding = runpy.run_path(str(script))
        try:
            binding["build"]()
        except binding["CannotBuild"] as exc:
            # The package works without; its KVM engine says what is missing.
            self.app.display_warning(f"Built without the KVM engine: {exc}")
            build_data["pure_python"] = True
        else:
            build_data["pure_python"] = False
            build_data["tag"] = binding["wheel_tag"]()
