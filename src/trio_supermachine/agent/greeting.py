"""What the host and a guest say on the lifeline, when the guest boots or goes on as a copy.

See the sections "Set-up" and "Restore" of the "Wire formats" page of the docs.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from enum import IntEnum

import attrs

from .wire import VERSION, FrameType, Reader, WireError, blob, frame, string, strings


class HelloKind(IntEnum):
    """Why a guest opens its lifeline."""

    BOOT = 0
    RESTORE = 1


@attrs.frozen
class Hello:
    """The guest's first words."""

    version: int
    kind: HelloKind
    kernel: str

    @classmethod
    def decode(cls, payload: bytes) -> Hello:
        reader = Reader(payload)
        version, kind, kernel = reader.u32(), reader.u32(), reader.string()
        reader.end()
        try:
            return cls(version, HelloKind(kind), kernel)
        except ValueError:
            raise WireError(f"a greeting of unknown kind {kind}") from None


def _new_machine_id() -> str:
    return uuid.uuid4().hex  # as systemd makes them


@attrs.frozen(kw_only=True)
class Setup:
    """What a freshly booted guest is told."""

    seed: bytes = attrs.field(repr=False)
    hostname: str
    layers: int
    environment: Sequence[str] = ()
    workdir: str = "/"
    user: str = ""
    workload: Sequence[str] = ()
    stop_signal: int = 15
    #: 32 hexadecimal digits, for an image without a machine id of its own.
    machine_id: str = attrs.field(factory=_new_machine_id)

    def encode(self, realtime_ns: int) -> bytes:
        """As a SETUP frame, with the time of now."""
        return frame(
            FrameType.SETUP,
            b"".join(
                (
                    struct.pack("<IQ", VERSION, realtime_ns),
                    string(self.hostname),
                    blob(self.seed),
                    struct.pack("<I", self.layers),
                    strings(self.environment),
                    string(self.workdir),
                    string(self.user),
                    strings(self.workload),
                    struct.pack("<i", self.stop_signal),
                    string(self.machine_id),
                )
            ),
        )


@attrs.frozen(kw_only=True)
class Restore:
    """What a restored guest is told, to be a machine of its own.

    ``seed`` is 32 to 512 bytes of entropy; an empty ``hostname`` keeps the one it has. With
    ``ends_programs`` the programs that ran at the capture are killed before they run again.
    """

    seed: bytes = attrs.field(repr=False)
    hostname: str = ""
    #: 32 hexadecimal digits.
    machine_id: str = attrs.field(factory=_new_machine_id)
    #: A UUID with its dashes.
    boot_id: str = attrs.field(factory=lambda: str(uuid.uuid4()))
    ends_programs: bool = False

    def encode(self, realtime_ns: int) -> bytes:
        """As a RESTORE frame, with the time of now."""
        return frame(
            FrameType.RESTORE,
            b"".join(
                (
                    struct.pack("<IQ", VERSION, realtime_ns),
                    string(self.hostname),
                    blob(self.seed),
                    string(self.machine_id),
                    string(self.boot_id),
                    # Absent where it says nothing: agents of older snapshots do not know it.
                    struct.pack("<I", 1) if self.ends_programs else b"",
                )
            ),
        )
