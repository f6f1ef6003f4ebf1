"""Exceptions of this library: one class for each kind of failure.

Each carries the values that a program needs to react as attributes, and a message that says what
to do next. They can be pickled, with their attributes. Failures of single file or process calls
inside the guest are not here: they are plain :class:`OSError` subclasses with the guest's errno.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from enum import Enum
from typing import Any

import trio

from ._public import public

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

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception calls the class with its args when it is unpickled. Here that is the message
        # alone, which is not what __init__ takes.
        # (typeshed does not have the function that pickle itself uses for this.)
        new = copyreg.__newobj__  # type: ignore[attr-defined]
        return new, (type(self),), {**self.__dict__, "args": self.args}


@public
class ConfigError(SupermachineError, ValueError):
    """A configuration value makes no sense. Raised where the value is written."""


@public
class ResourceErrorKind(Enum):
    """Faults that :meth:`VmResources.validate_for_run` finds, in the order of its checks."""

    ZERO_MEMORY = "zero-memory"
    ZERO_VCPUS = "zero-vcpus"
    MISSING_KERNEL = "missing-kernel"
    SNAPSHOT_TRIGGER_WITHOUT_OUTPUT = "snapshot-trigger-without-output"


@public
class ResourceError(ConfigError):
    """A :class:`VmResources` cannot be run.

    :ivar kind: the first fault that was found.
    """

    def __init__(self, kind: ResourceErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@public
class NotSupported(SupermachineError):
    """This version or engine does not have a feature.

    :ivar feature: the name of the feature.
    """

    def __init__(self, feature: str, message: str | None = None) -> None:
        super().__init__(message or f"{feature} is not supported by this version; leave it out")
        self.feature = feature


@public
class ReferenceInvalid(SupermachineError):
    """An image reference does not parse.

    :ivar reference: the reference as it was given, cut where it is very long.
    :ivar reason: the rule that it breaks.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"invalid image reference {reference!r}: {reason}")
        self.reference = reference
        self.reason = reason


@public
class ImageNotFound(SupermachineError):
    """The image that a reference names does not exist.

    :ivar reference: the reference.
    :ivar reason: where the image was looked for, and what is there instead.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"image {reference!r} not found: {reason}")
        self.reference = reference
        self.reason = reason


@public
class ImageCorrupt(SupermachineError):
    """An image's content is damaged, has another digest than it says or tries to leave its root.

    :ivar reference: the reference.
    :ivar reason: the fault.
    """

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(f"image {reference!r} is corrupt: {reason}")
        self.reference = reference
        self.reason = reason


@public
class RegistryError(SupermachineError):
    """A registry refused or failed.

    :ivar registry: the registry, or another server that it relies on, as ``HOST[:PORT]``.
    :ivar status: the HTTP status; ``None`` if there was none.
    """

    def __init__(self, message: str, *, registry: str, status: int | None = None) -> None:
        super().__init__(message)
        self.registry = registry
        self.status = status


@public
class DiskFull(SupermachineError):
    """The disk has no room for an image.

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

    :ivar console: the tail of the guest's console.
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

    :ivar path: the file or directory at fault.
    :ivar reason: the fault.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"snapshot {path}: {reason}")
        self.path = path
        self.reason = reason


@public
class SnapshotIncompatible(SnapshotInvalid):
    """A snapshot is sound, but another format version, engine or kind of host made it."""


@public
class AssetNotFound(SupermachineError):
    """A file or tool that this library needs is missing.

    :ivar asset: the file or tool, such as ``"kernel"`` or ``"sqfstar"``.
    :ivar reason: where it was looked for.
    :ivar remedy: the command to run, or the thing to do.
    """

    def __init__(self, asset: str, reason: str, *, remedy: str) -> None:
        super().__init__(f"{asset}: {reason}; to get it: {remedy}")
        self.asset = asset
        self.reason = reason
        self.remedy = remedy


@public
class EngineUnavailable(SupermachineError):
    """No engine can run a guest here, or not the only one that may.

    :ivar tried: the reason of each engine, by its name.
    """

    def __init__(self, tried: Mapping[str, str], *, remedy: str = "") -> None:
        said = "; ".join(f"{name}: {reason}" for name, reason in tried.items())
        message = f"no engine can start a VM here ({said})"
        if len(tried) == 1:
            message = f"the engine {said.replace(': ', ' cannot start a VM here: ', 1)}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.tried: dict[str, str] = dict(tried)


@public
class StartTimeout(SupermachineError, TimeoutError):
    """A guest did not answer within :attr:`VmConfig.start_timeout`.

    :ivar seconds: the timeout.
    :ivar console: the tail of the guest's console.
    :ivar detail: for a guest that wrote nothing at all: what it ran on, and what to try.
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
    """A restored guest did not answer within :attr:`VmConfig.restore_timeout`.

    :ivar seconds: the timeout.
    :ivar console: the tail of the guest's console.
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

    It is also a :exc:`trio.BrokenResourceError`, so that streams into a VM raise it.

    :ivar reason: ``"shutdown"`` (power-off), ``"reset"`` (reboot or panic), ``"killed"`` (the
        engine's process was killed), ``"failed"`` (the engine gave up) or ``"stopped"``
        (:meth:`Vm.stop` was called).
    :ivar detail: more about the reason, for people; may be empty.
    :ivar console: the tail of the guest's console.
    """

    def __init__(self, reason: str, detail: str = "", *, console: str = "") -> None:
        message = f"the VM has exited ({reason})" + (f": {detail}" if detail else "")
        super().__init__(_with_console(message, console))
        self.reason = reason
        self.detail = detail
        self.console = console


@public
class ExecEof(SupermachineError, trio.BrokenResourceError):
    """The connection of an exec ended early. The exec's streams raise it, too.

    :ivar is_setup_failure: whether the program had not been started yet, so that another attempt
        cannot run it twice.
    """

    def __init__(self, message: str, *, is_setup_failure: bool) -> None:
        super().__init__(message)
        self.is_setup_failure = is_setup_failure


@public
class AdmissionRefused(SupermachineError):
    """A guest asks for more memory than can ever be admitted.

    :ivar requested_mib: the guest's memory in MiB.
    :ivar limit_mib: the limit of :data:`memory_admission` in MiB.
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

    :ivar path: the file in the guest.
    :ivar max_bytes: the cap in bytes.
    :ivar size: the file's size in bytes; ``None`` if it is not known.
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
