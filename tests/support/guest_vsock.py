"""The guest on real AF_VSOCK: QEMU on KVM, this host's kernel being the other side by vhost."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import attrs

from . import guest_client as g
from .guest_client import frame, restore_payload, string, strings, u32

_WORDS = "console=ttyS0 reboot=t panic=-1 quiet supermachine.channel=vsock"


def frames(connection: socket.socket) -> Generator[tuple[int, int, bytes], None, None]:
    with closing(connection.makefile("rb")) as file:
        while header := file.read(8):
            length, kind, stream, _ = struct.unpack("<IBBH", header)
            yield kind, stream, file.read(length)


@attrs.frozen
class Boot:
    """What guests are started from."""

    kernel: Path
    initramfs: Path
    layers: tuple[Path, ...]
    vcpus: int = 1
    cid: int = 3


class VsockGuest:
    """A guest that has answered. Plain sockets, no library code."""

    def __init__(self, cid: int, lifeline: socket.socket) -> None:
        self.cid, self.lifeline = cid, lifeline

    def dial(self) -> socket.socket:
        connection = socket.socket(socket.AF_VSOCK)
        connection.settimeout(g.PATIENCE)
        connection.connect((self.cid, g.AGENT_PORT))
        return connection

    def ask(self, request: bytes) -> list[tuple[int, int, bytes]]:
        """All frames that answer a request."""
        with self.dial() as connection:
            connection.sendall(request)
            return list(frames(connection))

    def call(self, kind: int, payload: bytes = b"") -> None:
        assert [answer[0] for answer in self.ask(frame(kind, payload))] == [g.OK]

    def run(self, *argv: str) -> bytes:
        answers = self.ask(g.exec_request(argv, window=1 << 30))
        (end,) = [payload for kind, _, payload in answers if kind == g.EXIT]
        output = b"".join(payload for kind, _, payload in answers if kind == g.DATA)
        assert struct.unpack_from("<i", end) == (0,), output
        return output


@contextmanager
def listening() -> Iterator[socket.socket]:
    """The host's end of the lifeline, before a guest dials it."""
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.settimeout(g.PATIENCE)
        listener.bind((socket.VMADDR_CID_ANY, g.LIFELINE_PORT))
        listener.listen()
        yield listener


class Qemu:
    """One QEMU, on KVM, with a vhost-vsock device."""

    def __init__(self, boot: Boot, directory: Path, *more: str) -> None:
        ours, theirs = socket.socketpair()
        self.console = directory / "console"
        machine = ["-M", "microvm,acpi=on,pcie=on,pit=off", "-accel", "kvm", "-cpu", "host"]
        start = ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs), "-append", _WORDS]
        with theirs:
            self.process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", *machine, "-smp", str(boot.vcpus), "-m", "256"),
                    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", *start),
                    *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                    *("-mon", "chardev=qmp,mode=control", "-serial", f"file:{self.console}"),
                    *("-device", f"vhost-vsock-pci,guest-cid={boot.cid}"),
                    *_disks(boot.layers),
                    *more,
                ],
                pass_fds=[theirs.fileno()],
            )
        self._qmp = ours.makefile("rwb")
        ours.close()
        self._migrated = False
        self._take()
        self.execute("qmp_capabilities")
        self.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )

    def execute(self, command: str, **arguments: object) -> object:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        self._qmp.flush()
        while True:
            answer = self._take()
            if "event" not in answer:
                return answer["return"]

    def _take(self) -> dict[str, object]:
        answer: dict[str, object] = json.loads(self._qmp.readline())
        if answer.get("event") == "MIGRATION":
            status = answer["data"]
            assert status != {"status": "failed"}
            self._migrated = status == {"status": "completed"}
        return answer

    def save(self, file: Path) -> None:
        """Stop, and write the machine's state."""
        self.execute("stop")
        self._transfer("migrate", f"exec:cat >{file}")

    def load(self, file: Path) -> None:
        """Go on from such a state."""
        self._transfer("migrate-incoming", f"exec:cat {file}")
        self.execute("cont")

    def _transfer(self, command: str, uri: str) -> None:
        self.execute(command, uri=uri)
        while not self._migrated:
            self._take()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._qmp.close()


def _disks(layers: Sequence[Path]) -> list[str]:
    words = []
    for n, layer in enumerate(layers):
        words += ["-drive", f"if=none,id=disk{n},file={layer},format=raw,readonly=on"]
        words += ["-device", f"virtio-blk-pci,drive=disk{n}"]
    return words


@contextmanager
def greeted(listener: socket.socket, answer: bytes) -> Iterator[VsockGuest]:
    """Wait for a guest's HELLO and answer it."""
    lifeline, (cid, _) = listener.accept()
    listener.close()  # a guest that dials anew is refused
    with lifeline:
        lifeline.settimeout(g.PATIENCE)
        answers = frames(lifeline)
        assert next(answers)[0] == g.HELLO
        lifeline.sendall(answer)
        kind, _, payload = next(answers)
        assert kind == g.READY, payload
        yield VsockGuest(cid, lifeline)
        answers.close()


@contextmanager
def booted(boot: Boot, directory: Path) -> Iterator[tuple[Qemu, VsockGuest]]:
    setup = struct.pack("<IQ", g.VERSION, time.time_ns()) + string("tester") + string(bytes(32))
    setup += u32(len(boot.layers)) + strings([]) + string("/") + string("") + strings([])
    setup += u32(15) + string("0" * 32)
    with listening() as listener:
        qemu = Qemu(boot, directory)
        try:
            with greeted(listener, frame(g.SETUP, setup)) as guest:
                yield qemu, guest
        finally:
            qemu.close()


@contextmanager
def restored(boot: Boot, directory: Path, state: Path) -> Iterator[tuple[Qemu, VsockGuest]]:
    with listening() as listener:
        qemu = Qemu(boot, directory, "-incoming", "defer")
        try:
            qemu.load(state)
            with greeted(listener, frame(g.RESTORE, restore_payload())) as guest:
                yield qemu, guest
        finally:
            qemu.close()
