"""The greeting on the lifeline, when a guest boots or goes on as a copy.

The guest sends :class:`Hello`, which says which of the two. The host answers :class:`Setup` or
:class:`Restore`: who the guest is now. The guest carries it out and answers READY, or ERROR. See
the sections "Set-up" and "Restore" of the "Wire formats" page of the docs.
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
    """The guest's first frame.

    :ivar version: of the wire format that it speaks.
    :ivar kernel: its kernel's release.
    """

    version: int
    kind: HelloKind
    kernel: str

    @classmethod
    def decode(cls, payload: bytes) -> Hello:
        """Read a payload. :raises WireError: it makes no sense."""
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
    """The identity and the tasks that a guest gets when it has booted.

    :ivar seed: 32 to 512 bytes of entropy.
    :ivar layers: the number of disks that hold the image's layers, the lowest first.
    :ivar workload: the argument vector of the image's workload; empty for none.
    :ivar stop_signal: the signal that ends the workload.
    :ivar machine_id: 32 hexadecimal digits, for an image without a machine id of its own.
    """

    seed: bytes = attrs.field(repr=False)
    hostname: str
    layers: int
    environment: Sequence[str] = ()
    workdir: str = "/"
    user: str = ""
    workload: Sequence[str] = ()
    stop_signal: int = 15
    machine_id: str = attrs.field(factory=_new_machine_id)

    def encode(self, realtime_ns: int) -> bytes:
        """Encode it as a SETUP frame.

        :param realtime_ns: the time of now, in nanoseconds since 1970.
        """
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
    """The new identity of a restored guest, by which it is a machine of its own.

    :ivar seed: 32 to 512 bytes of entropy.
    :ivar hostname: its new host name; empty keeps the one of the capture.
    :ivar machine_id: 32 hexadecimal digits.
    :ivar boot_id: a UUID with its dashes.
    :ivar ends_programs: kill the programs that ran at the capture before they run again.
    """

    seed: bytes = attrs.field(repr=False)
    hostname: str = ""
    machine_id: str = attrs.field(factory=_new_machine_id)
    boot_id: str = attrs.field(factory=lambda: str(uuid.uuid4()))
    ends_programs: bool = False

    def encode(self, realtime_ns: int, version: int = VERSION) -> bytes:
        """Encode it as a RESTORE frame.

        :param realtime_ns: the time of now, in nanoseconds since 1970.
        """
        return frame(
            FrameType.RESTORE,
            b"".join(
                (
                    struct.pack("<IQ", version, realtime_ns),
                    string(self.hostname),
                    blob(self.seed),
                    string(self.machine_id),
                    string(self.boot_id),
                    struct.pack("<I", self.ends_programs) if version >= 4 else b"",
                )
            ),
        )
