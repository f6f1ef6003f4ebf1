"""Run any OCI image as a microVM from Trio.

A VM is a nursery, an exec is a pair of streams, and a cancel scope is the timeout.

Each name is imported when it is first used: a program that wants a part of the library, such as the
command line's ``--help``, does not wait for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from ._util.progress import Progress as Progress
    from .api import Image as Image
    from .api import OciImageBuilder as OciImageBuilder
    from .api import Pool as Pool
    from .api import PoolBuilder as PoolBuilder
    from .api import PooledVm as PooledVm
    from .api import Vm as Vm
    from .config.resources import DEFAULT_CMDLINE as DEFAULT_CMDLINE
    from .config.resources import DEFAULT_EXEC_GUEST_PORT as DEFAULT_EXEC_GUEST_PORT
    from .config.resources import EndpointResources as EndpointResources
    from .config.resources import SnapshotResources as SnapshotResources
    from .config.resources import VmProfile as VmProfile
    from .config.resources import VmResources as VmResources
    from .config.resources import VolumeSpec as VolumeSpec
    from .config.vm import MountSpec as MountSpec
    from .config.vm import SymlinkPolicy as SymlinkPolicy
    from .config.vm import VmConfig as VmConfig
    from .errors import AcquireTimeout as AcquireTimeout
    from .errors import AdmissionRefused as AdmissionRefused
    from .errors import AssetNotFound as AssetNotFound
    from .errors import BakeFailed as BakeFailed
    from .errors import CaptureFailed as CaptureFailed
    from .errors import ConfigError as ConfigError
    from .errors import DiskFull as DiskFull
    from .errors import EngineUnavailable as EngineUnavailable
    from .errors import ExecEof as ExecEof
    from .errors import FileTooLarge as FileTooLarge
    from .errors import ImageCorrupt as ImageCorrupt
    from .errors import ImageNotFound as ImageNotFound
    from .errors import NotSupported as NotSupported
    from .errors import ReferenceInvalid as ReferenceInvalid
    from .errors import RegistryError as RegistryError
    from .errors import ResourceError as ResourceError
    from .errors import ResourceErrorKind as ResourceErrorKind
    from .errors import RestoreTimeout as RestoreTimeout
    from .errors import SnapshotIncompatible as SnapshotIncompatible
    from .errors import SnapshotInvalid as SnapshotInvalid
    from .errors import StartTimeout as StartTimeout
    from .errors import SupermachineError as SupermachineError
    from .errors import VmExited as VmExited
    from .host.assets import AssetPaths as AssetPaths
    from .images.policy import PullPolicy as PullPolicy
    from .net.events import EgressEvent as EgressEvent
    from .net.forward import TcpForwarder as TcpForwarder
    from .net.policy import EgressPolicy as EgressPolicy
    from .net.tls import TlsConfig as TlsConfig
    from .net.udp import UdpForwarder as UdpForwarder
    from .oci.config import ImageConfig as ImageConfig
    from .pool.core import PoolStats as PoolStats
    from .programs.builder import ExecBuilder as ExecBuilder
    from .programs.builder import ExecOutcome as ExecOutcome
    from .programs.child import ExecChild as ExecChild
    from .programs.child import ExecSignaler as ExecSignaler
    from .vm.limits import LimitStatistics as LimitStatistics
    from .vm.limits import memory_admission as memory_admission
    from .vm.limits import spawn_concurrency as spawn_concurrency

#: The module of each public name.
_MODULES = {
    "._util.progress": ("Progress",),
    ".api": ("Image", "OciImageBuilder", "Pool", "PoolBuilder", "PooledVm", "Vm"),
    ".config.resources": (
        "DEFAULT_CMDLINE",
        "DEFAULT_EXEC_GUEST_PORT",
        "EndpointResources",
        "SnapshotResources",
        "VmProfile",
        "VmResources",
        "VolumeSpec",
    ),
    ".config.vm": ("MountSpec", "SymlinkPolicy", "VmConfig"),
    ".errors": (
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
    ),
    ".host.assets": ("AssetPaths",),
    ".images.policy": ("PullPolicy",),
    ".net.events": ("EgressEvent",),
    ".net.forward": ("TcpForwarder",),
    ".net.policy": ("EgressPolicy",),
    ".net.tls": ("TlsConfig",),
    ".net.udp": ("UdpForwarder",),
    ".oci.config": ("ImageConfig",),
    ".pool.core": ("PoolStats",),
    ".programs.builder": ("ExecBuilder", "ExecOutcome"),
    ".programs.child": ("ExecChild", "ExecSignaler"),
    ".vm.limits": ("LimitStatistics", "memory_admission", "spawn_concurrency"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DEFAULT_CMDLINE",
    "DEFAULT_EXEC_GUEST_PORT",
    "AcquireTimeout",
    "AdmissionRefused",
    "AssetNotFound",
    "AssetPaths",
    "BakeFailed",
    "CaptureFailed",
    "ConfigError",
    "DiskFull",
    "EgressEvent",
    "EgressPolicy",
    "EndpointResources",
    "EngineUnavailable",
    "ExecBuilder",
    "ExecChild",
    "ExecEof",
    "ExecOutcome",
    "ExecSignaler",
    "FileTooLarge",
    "Image",
    "ImageConfig",
    "ImageCorrupt",
    "ImageNotFound",
    "LimitStatistics",
    "MountSpec",
    "NotSupported",
    "OciImageBuilder",
    "Pool",
    "PoolBuilder",
    "PoolStats",
    "PooledVm",
    "Progress",
    "PullPolicy",
    "ReferenceInvalid",
    "RegistryError",
    "ResourceError",
    "ResourceErrorKind",
    "RestoreTimeout",
    "SnapshotIncompatible",
    "SnapshotInvalid",
    "SnapshotResources",
    "StartTimeout",
    "SupermachineError",
    "SymlinkPolicy",
    "TcpForwarder",
    "TlsConfig",
    "UdpForwarder",
    "Vm",
    "VmConfig",
    "VmExited",
    "VmProfile",
    "VmResources",
    "VolumeSpec",
    "__version__",
    "memory_admission",
    "spawn_concurrency",
]


if not TYPE_CHECKING:  # a checker would take every misspelt name for one that is here

    def __getattr__(name: str) -> object:
        try:
            module = _HOME[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        value = globals()[name] = getattr(import_module(module, __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
