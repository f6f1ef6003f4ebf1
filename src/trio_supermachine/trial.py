"""A program that is run for nothing but the paths through the guest that it leaves warm."""

from __future__ import annotations

import subprocess
from typing import Final

from .vm import Vm

#: The guest's init, the one program that every image has.
_OTHER_TRIAL: Final = ["/proc/1/exe", "--trial"]


async def run_trial(vm: Vm) -> None:
    """Run a program in the guest, so that the next one is quick.

    Before a capture it brings into memory what a copy needs, and in a copy it has the engine
    translate what will run again. The image's own ``true`` comes nearest to a real program: it
    needs the image's files, user and loader.
    """
    quiet = subprocess.DEVNULL
    try:
        await vm.run_process(["true"], check=False, stdout=quiet, stderr=quiet)
    except OSError:
        await vm.run_process(_OTHER_TRIAL, env={}, cwd="/", user=0, stdout=quiet, stderr=quiet)
