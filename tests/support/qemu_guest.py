"""A guest of a busybox and a script, for tests of the engine alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from trio_supermachine.hv.base import Machine, MachineSpec
from trio_supermachine.kernels import CachedKernel, list_kernels, prepare_kernel

BUSYBOX = Path("/bin/busybox")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
exec >/dev/console 2>&1
"""


async def scripted(directory: Path, script: str) -> MachineSpec:
    """A machine whose init runs ``script`` with busybox, its output on the console."""
    boot = await prepare_kernel()
    (kernel,) = [kernel for kernel in await list_kernels() if kernel.kernel == boot.kernel]
    return MachineSpec(kernel=boot.kernel, initramfs=_archive(directory, kernel, script))


def _archive(directory: Path, kernel: CachedKernel, script: str) -> Path:
    if not BUSYBOX.exists():
        pytest.skip("needs busybox-static")
    root = directory / "root"
    for name in ("bin", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin")
    shutil.copytree(kernel.directory / "modules", root / "modules")
    (root / "modules/order").write_text("".join(f"{name}.ko\n" for name in kernel.modules))
    (root / "init").write_text(_INIT + script)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = directory / "initramfs"
    with archive.open("wb") as output:
        command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
        subprocess.run(command, cwd=root, input=names.encode(), stdout=output, check=True)
    return archive


async def console_until(machine: Machine, marker: bytes, *, patience: float = 60) -> bytes:
    """Read the console from its start until ``marker`` has come, for ``patience`` seconds."""
    seen = b""
    with trio.fail_after(patience):
        async for chunk in machine.console:
            seen += chunk
            if marker in seen:
                return seen
    raise AssertionError(f"the console ended without {marker!r}: {seen!r}")
