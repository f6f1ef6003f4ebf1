"""QEMU driven by hand: the floor that benchmarks stand beside. Needs busybox-static and cpio."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from trio_supermachine.guest import launcher_binary

INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while ! ls /dev/vport*p1 >/dev/null 2>&1; do sleep 0.02; done
exec 3<>$(ls /dev/vport*p1)
echo READY >&3
"""
APPLETS = ("sh", "mount", "ls", "cat", "sleep", "dd")


class RawQemu:
    """A QEMU with a busybox initramfs; entered when the guest has answered on its port.

    :param script: what the guest's shell does afterwards, with the port as descriptor 3.
    """

    def __init__(self, kernel: Path, script: str, *, cpu: str = "max") -> None:
        self._kernel = kernel
        self._script = script
        self._cpu = cpu
        self._directory = Path(tempfile.mkdtemp(prefix="raw-qemu-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self.initramfs = self._make_initramfs()
        khz = subprocess.check_output([launcher_binary(), "tsc-khz"], text=True).strip()
        self._words = (
            "console=ttyS0 reboot=t panic=-1 quiet mitigations=off no_timer_check "
            f"tsc_early_khz={khz}"
        )

    def _make_initramfs(self) -> Path:
        root = self._directory / "root"
        for name in ("bin", "proc", "sys", "dev"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")
        (root / "init").write_text(INIT + self._script)
        (root / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = self._directory / "initramfs"
        with archive.open("wb") as output:
            command = ["cpio", "--quiet", "-o", "-H", "newc"]
            subprocess.run(command, cwd=root, input=names.encode(), stdout=output, check=True)
        return archive

    def __enter__(self) -> socket.socket:
        self._port, other = socket.socketpair()
        fd = other.fileno()
        self._process = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "microvm,acpi=on,pcie=on", "-accel", "tcg,thread=single",
             "-cpu", self._cpu, "-m", "256", "-nodefaults", "-no-user-config",
             "-display", "none", "-no-reboot", "-kernel", self._kernel,
             "-initrd", self.initramfs, "-append", self._words, "-serial", "null",
             "-device", "virtio-serial-pci", "-chardev", f"socket,id=c0,fd={fd}",
             "-device", "virtserialport,chardev=c0,name=agent"],
            pass_fds=[fd],
        )  # fmt: skip
        other.close()
        assert self._port.recv(16) == b"READY\n"
        return self._port

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._port is not None:
            self._port.close()
        shutil.rmtree(self._directory)
