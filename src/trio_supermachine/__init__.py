"""Run any OCI image as a microVM from Trio.

A VM is a nursery, an exec is a pair of streams, and a cancel scope is the timeout.
"""

from ._pool_core import PoolStats
from ._version import __version__
from .assets import AssetPaths
from .config import MountSpec, SymlinkPolicy, VmConfig
from .errors import (
    AcquireTimeout,
    AdmissionRefused,
    AssetNotFound,
    BakeFailed,
    CaptureFailed,
    ConfigError,
    DiskFull,
    EngineUnavailable,
    ExecEof,
    FileTooLarge,
    ImageCorrupt,
    ImageNotFound,
    NotSupported,
    ReferenceInvalid,
    RegistryError,
    ResourceError,
    ResourceErrorKind,
    RestoreTimeout,
    SnapshotIncompatible,
    SnapshotInvalid,
    StartTimeout,
    SupermachineError,
    VmExited,
)
from .exec import ExecChild, ExecSignaler
from .exec_builder import ExecBuilder, ExecOutcome
from .images.builder import OciImageBuilder
from .images.image import Image, PullPolicy
from .limits import LimitStatistics, memory_admission, spawn_concurrency
from .net.events import EgressEvent
from .net.forward import TcpForwarder
from .net.policy import EgressPolicy
from .net.tls import TlsConfig
from .net.udp import UdpForwarder
from .oci.config import ImageConfig
from .oci.progress import Progress
from .pool import Pool, PoolBuilder, PooledVm
from .resources import (
    DEFAULT_CMDLINE,
    DEFAULT_EXEC_GUEST_PORT,
    EndpointResources,
    SnapshotResources,
    VmProfile,
    VmResources,
    VolumeSpec,
)
from .vm import Vm

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
