"""The exceptions of this library: one class per thing that failed.

Each carries, as attributes, the values a program needs to react, and a message that says what
to do next. Failures of single file or process calls inside the guest are not here: they are
plain :class:`OSError` subclasses with the guest's errno.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import trio

from ._util.public import public

__all__ = [
    "AcquireTimeout",
    "AdmissionRefused",
    "AssetNotFound",
    "BakeFailed",
    "CaptureFailed",
    "ConfigError",
    "DiskFull",
    "EngineUnavailable",
    "ExecEof",
    "FileTooLarge",
    "ImageCorrupt",
    "ImageNotFound",
    "NotSupported",
    "ReferenceInvalid",
    "RegistryError",
    "ResourceError",
    "ResourceErrorKind",
    "RestoreTimeout",
    "SnapshotIncompatible",
    "SnapshotInvalid",
    "StartTimeout",
    "SupermachineError",
    "VmExited",
]


@public
class SupermachineError(Exception):
    """Base of every exception that this library defines."""


@public
class ConfigError(SupermachineError, ValueError):
    """A configuration value makes no sense. Raised where the value is written."""


@public
class ResourceErrorKind(Enum):
    """What :meth:`VmResources.validate_for_run` found wrong, in the order it looks."""

    ZERO_MEMORY = "zero-memory"
    ZERO_VCPUS = "zero-vcpus"
    MISSING_KERNEL = "missing-kernel"
    SNAPSHOT_TRIGGER_WITHOUT_OUTPUT = "snapshot-trigger-without-output"


@public
class ResourceError(ConfigError):
    """A :class:`VmResources` cannot be run.

    :ivar kind: why, a :class:`ResourceErrorKind`.
    """

    def __init__(self, kind: ResourceErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@public
class NotSupported(SupermachineError):
    """This version, or this engine, does not have a feature.

    :ivar feature: its name, such as ``"volumes"``.
    """

    def __init__(self, feature: str, message: str | None = None) -> None:
        super().__init__(message or f"{feature} is not supported by this version; leave it out")
        self.feature = feature


@public
class ReferenceInvalid(SupermachineError):
    """An image reference does not parse.

    :ivar reference: the reference as it was given.
    :ivar reason: why it does not parse, for people.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"invalid image reference {reference!r}: {reason}")
        self.reference = reference
        self.reason = reason


@public
class ImageNotFound(SupermachineError):
    """The image that a reference names does not exist.

    :ivar reference: the reference.
    :ivar reason: who says so, for people.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"image {reference!r} not found: {reason}")
        self.reference = reference
        self.reason = reason


@public
class ImageCorrupt(SupermachineError):
    """An image's content is damaged, lies about its digest or tries to leave its root.

    :ivar reference: the reference.
    :ivar reason: what is wrong with it, for people.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"image {reference!r} is corrupt: {reason}")
        self.reference = reference
        self.reason = reason


@public
class RegistryError(SupermachineError):
    """A registry refused or failed.

    :ivar registry: its host, with the port if there is one.
    :ivar status: the HTTP status, or ``None`` without an answer.
    """

    def __init__(self, message: str, *, registry: str, status: int | None = None) -> None:
        super().__init__(message)
        self.registry = registry
        self.status = status


@public
class DiskFull(SupermachineError):
    """There is no room in the data directory for an image.

    :ivar path: the file that was being written.
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"no space is left for {path}; free some (trio-supermachine prune removes what no"
            " image needs), or set TRIO_SUPERMACHINE_HOME to a directory on another disk"
        )
        self.path = path


@public
class BakeFailed(SupermachineError):
    """A bake did not reach its capture.

    :ivar console: the end of the guest's console.
    """

    def __init__(self, message: str, *, console: str = "") -> None:
        super().__init__(_with_console(message, console))
        self.console = console


@public
class CaptureFailed(SupermachineError):
    """A running VM could not be captured. It goes on."""


@public
class SnapshotInvalid(SupermachineError):
    """A snapshot is truncated, corrupt or incomplete.

    :ivar path: the file at fault.
    :ivar reason: what is wrong with it, for people.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"snapshot {path}: {reason}")
        self.path = path
        self.reason = reason


@public
class SnapshotIncompatible(SnapshotInvalid):
    """A snapshot is sound, but made by another format version, engine or machine."""


@public
class AssetNotFound(SupermachineError):
    """A file or tool that this library needs is missing. The message names the remedy.

    :ivar asset: what is missing, such as ``"kernel"`` or ``"sqfstar"``.
    :ivar reason: where it was looked for, for people.
    :ivar remedy: the command to run.
    """

    def __init__(self, asset: str, reason: str, *, remedy: str) -> None:
        super().__init__(f"{asset}: {reason}; to get it: {remedy}")
        self.asset = asset
        self.reason = reason
        self.remedy = remedy


@public
class EngineUnavailable(SupermachineError):
    """No engine can run a guest here.

    :ivar tried: each engine that was tried, and why it cannot.
    """

    def __init__(self, tried: Mapping[str, str]) -> None:
        said = "; ".join(f"{name}: {reason}" for name, reason in tried.items())
        super().__init__(f"no engine can start a VM here ({said})")
        self.tried = dict(tried)


@public
class StartTimeout(SupermachineError, TimeoutError):
    """A guest did not answer within ``start_timeout``.

    :ivar seconds: the timeout.
    :ivar detail: what a guest that wrote nothing at all ran on, and what to try; else empty.
    :ivar console: the end of the guest's console.
    """

    def __init__(self, seconds: float, *, console: str = "", detail: str = "") -> None:
        message = f"the guest did not answer within {seconds:g} s" + (
            f"; {detail}" if detail else ""
        )
        super().__init__(_with_console(message, console))
        self.seconds = seconds
        self.console = console
        self.detail = detail


@public
class RestoreTimeout(SupermachineError, TimeoutError):
    """A restored guest did not answer within ``restore_timeout``.

    :ivar seconds: the timeout.
    :ivar console: the end of the guest's console.
    """

    def __init__(self, seconds: float, *, console: str = "") -> None:
        super().__init__(
            _with_console(f"the restored guest did not answer within {seconds:g} s", console)
        )
        self.seconds = seconds
        self.console = console


@public
class AcquireTimeout(SupermachineError, TimeoutError):
    """A pool had no VM to give within its acquire timeout.

    :ivar seconds: the timeout.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no VM became free within {seconds:g} s; raise the pool's max")
        self.seconds = seconds


@public
class VmExited(SupermachineError, trio.BrokenResourceError):
    """The VM has ended: power-off, reboot, panic, its engine died, or it was stopped.

    It is a :exc:`trio.BrokenResourceError` too, so that streams into a VM raise it.

    :ivar reason: ``"shutdown"`` (power-off), ``"reset"`` (reboot or panic), ``"killed"`` (the
        engine's process was killed), ``"failed"`` (the engine gave up) or ``"stopped"``
        (:meth:`Vm.stop` was called).
    :ivar detail: more about it, for people; may be empty.
    :ivar console: the end of the guest's console.
    """

    def __init__(self, reason: str, detail: str = "", *, console: str = "") -> None:
        message = f"the VM has exited ({reason})" + (f": {detail}" if detail else "")
        super().__init__(_with_console(message, console))
        self.reason = reason
        self.detail = detail
        self.console = console


@public
class ExecEof(SupermachineError, trio.BrokenResourceError):
    """The agent's connection of an exec ended early. The streams of the exec then raise it, too.

    :ivar is_setup_failure: whether the program had not been started yet, so that trying again
        cannot run it twice.
    """

    def __init__(self, message: str, *, is_setup_failure: bool) -> None:
        super().__init__(message)
        self.is_setup_failure = is_setup_failure


@public
class AdmissionRefused(SupermachineError):
    """A guest asks for more memory than could ever be admitted.

    :ivar requested_mib: the memory of the guest, in MiB.
    :ivar limit_mib: the limit that it can never fit, in MiB.
    """

    def __init__(self, requested_mib: int, limit_mib: int) -> None:
        super().__init__(
            f"a guest of {requested_mib} MiB can never fit the admission limit of {limit_mib} MiB;"
            " raise memory_admission.limit or ask for less"
        )
        self.requested_mib = requested_mib
        self.limit_mib = limit_mib


@public
class FileTooLarge(SupermachineError):
    """A guest file is larger than the caller's cap.

    :ivar path: the file.
    :ivar max_bytes: the cap.
    :ivar size: the size of the file in bytes, or ``None`` if it is not known.
    """

    def __init__(self, path: str, max_bytes: int, size: int | None = None) -> None:
        actual = "more" if size is None else f"{size} bytes"
        super().__init__(
            f"{path}: {actual}, the cap is {max_bytes} bytes; use vm.open_read for a stream"
        )
        self.path = path
        self.max_bytes = max_bytes
        self.size = size


def _with_console(message: str, console: str) -> str:
    if not console:
        return message
    return f"{message}\n--- console ---\n{console.rstrip()}"
