"""QEMU driven by hand: the floor that benchmarks stand beside."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from trio_supermachine.guest import launcher_binary

#: The programs that it takes.
NEEDS = ("qemu-system-x86_64", "busybox", "cpio")

INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while ! ls /dev/vport*p1 >/dev/null 2>&1; do sleep 0.02; done
exec 3<>$(ls /dev/vport*p1)
echo READY >&3
"""
APPLETS = ("sh", "mount", "ls", "cat", "sleep", "dd")

#: Each answer takes a fork, as an exec does.
ECHO = 'while read -r line <&3; do echo "ECHO $line $(cat /proc/uptime)" >&3; done\n'


class RawGuest:
    """A kernel, and a busybox initramfs in a directory of its own.

    :param script: what the guest's shell does once it has said READY on its port, with the port
        as descriptor 3.
    """

    def __init__(self, kernel: Path, script: str, *, cpu: str = "max") -> None:
        self._kernel = kernel
        self._cpu = cpu
        self.directory = Path(tempfile.mkdtemp(prefix="raw-qemu-"))
        self._initramfs = self._make_initramfs(script)
        khz = subprocess.check_output([launcher_binary(), "tsc-khz"], text=True).strip()
        self._words = (
            "console=ttyS0 reboot=t panic=-1 quiet mitigations=off no_timer_check "
            f"tsc_early_khz={khz}"
        )

    def _make_initramfs(self, script: str) -> Path:
        root = self.directory / "root"
        for name in ("bin", "proc", "sys", "dev"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")
        (root / "init").write_text(INIT + script)
        (root / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = self.directory / "initramfs"
        with archive.open("wb") as output:
            command = ["cpio", "--quiet", "-o", "-H", "newc"]
            subprocess.run(command, cwd=root, input=names.encode(), stdout=output, check=True)
        return archive

    def start(
        self, port: int, *more: str | Path, machine: str = "", fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a QEMU; ``port`` is the descriptor for the guest's port."""
        return subprocess.Popen(
            ["qemu-system-x86_64", "-M", "microvm,acpi=on,pcie=on" + machine,
             "-accel", "tcg,thread=single",
             "-cpu", self._cpu, "-m", "256", "-nodefaults", "-no-user-config",
             "-display", "none", "-no-reboot", "-kernel", self._kernel,
             "-initrd", self._initramfs, "-append", self._words, "-serial", "null",
             "-device", "virtio-serial-pci", "-chardev", f"socket,id=c0,fd={port}",
             "-device", "virtserialport,chardev=c0,name=agent", *more],
            pass_fds=[port, *fds],
        )  # fmt: skip

    def remove(self) -> None:
        shutil.rmtree(self.directory)


class RawQemu:
    """A :class:`RawGuest` that boots; entered when it has answered on its port."""

    def __init__(self, kernel: Path, script: str, *, cpu: str = "max") -> None:
        self._guest = RawGuest(kernel, script, cpu=cpu)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None

    def __enter__(self) -> socket.socket:
        self._port, other = socket.socketpair()
        with other:
            self._process = self._guest.start(other.fileno())
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
        self._guest.remove()


class Qmp:
    """Commands to a QEMU, one after another."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = control.makefile("r")
        self._events: set[str] = set()
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._control.sendall(json.dumps(request).encode() + b"\n")
        while "return" not in (message := self._next()):
            pass
        return message["return"]

    def wait_for(self, event: str) -> None:
        while event not in self._events:
            self._next()

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._lines.readline())
        assert "error" not in message, message
        self._events.add(message.get("event", ""))
        return message

    def leave_memory_out(self) -> None:
        capability = {"capability": "x-ignore-shared", "state": True}
        self.execute("migrate-set-capabilities", capabilities=[capability])


class RawSnapshot:
    """A guest that was booted with its memory in a file, and its devices saved by hand.

    Entered when it is; :meth:`restore` then goes on from there, any number of times.
    """

    def __init__(self, kernel: Path) -> None:
        self._guest = RawGuest(kernel, ECHO)
        self._memory = self._guest.directory / "memory"
        self._state = self._guest.directory / "state"

    def __enter__(self) -> RawSnapshot:
        with ExitStack() as stack:
            port, qmp = self._start(stack, "on")
            assert port.recv(16) == b"READY\n"
            for _ in range(5):
                self._ask(port)
            # It ends stopped, and what goes on from its state goes on running.
            qmp.leave_memory_out()
            qmp.execute("migrate", uri=f"exec:cat >{self._state}")
            while qmp.execute("query-migrate").get("status") != "completed":
                time.sleep(0.003)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guest.remove()

    def restore(self) -> tuple[float, float, float]:
        """Milliseconds until QEMU can be talked to, has loaded the state, and has an answer."""
        begin = time.perf_counter()
        with ExitStack() as stack:
            state = stack.enter_context(self._state.open("rb"))
            port, qmp = self._start(stack, "off", "-incoming", "defer", fd=state.fileno())
            qmp.leave_memory_out()
            ready = time.perf_counter()
            qmp.execute("migrate-incoming", uri=f"fd:{state.fileno()}")
            qmp.wait_for("RESUME")
            loaded = time.perf_counter()
            self._ask(port)
            answered = time.perf_counter()
        return (ready - begin) * 1e3, (loaded - begin) * 1e3, (answered - begin) * 1e3

    def _start(
        self, stack: ExitStack, share: str, *more: str, fd: int | None = None
    ) -> tuple[socket.socket, Qmp]:
        port, other = (stack.enter_context(end) for end in socket.socketpair())
        control, qemus = (stack.enter_context(end) for end in socket.socketpair())
        fds = (qemus.fileno(),) if fd is None else (qemus.fileno(), fd)
        process = self._guest.start(
            other.fileno(),
            *("-object", f"memory-backend-file,id=mem,size=256M,mem-path={self._memory}"
              f",share={share}"),
            *("-chardev", f"socket,id=qmp,fd={qemus.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *more,
            machine=",memory-backend=mem",
            fds=fds,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        other.close()
        qemus.close()
        return port, Qmp(control)

    @staticmethod
    def _ask(port: socket.socket) -> None:
        port.sendall(b"hi\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += port.recv(256)
