"""Images: what a VM runs."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, cast, final, get_args

import attrs

from .._validators import StrPath
from ..config import EngineName
from ..errors import SnapshotIncompatible
from ..oci.config import ImageConfig
from ..oci.progress import ProgressCallback
from ..snapshots import Snapshot, open_snapshot
from ..vm import Vm

if TYPE_CHECKING:
    from ..config import VmConfig
    from ..pool import PoolBuilder, PooledVm
    from .builder import OciImageBuilder


class PullPolicy(Enum):
    """When to ask a registry what a name stands for, as Docker's; local sources are always read
    as they are, and a digest that is here is never asked for.

    ``ALWAYS`` asks each time, and downloads only what is not here. ``MISSING`` asks when the
    image is not here for the platform. ``NEVER`` uses no network, and raises
    :exc:`ImageNotFound` instead.
    """

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


@final
@attrs.frozen(eq=False, kw_only=True, repr=False)
class Image:
    """An image that is ready to run. :meth:`from_oci`, :meth:`builder` and :meth:`from_snapshot`
    make one, and so does :meth:`Vm.snapshot`.

    :ivar reference: the reference as it was given.
    :ivar config: what the image says about running it.
    :ivar layers: read-only squashfs files, lowest first.
    :ivar digest: the digest of the image's manifest; for a docker archive that of its
        configuration, and for what is no OCI image a digest of what it was made of.
    :ivar engine: the engine that VMs of it run on unless told otherwise.
    :ivar snapshot: what VMs of it are restored from; ``None`` for an image that boots.
    :ivar memory_mib: the memory that its VMs have unless told otherwise, in MiB.
    :ivar vcpus: the number of CPUs that its VMs have unless told otherwise.
    :ivar guest_port: the TCP port that its workload serves, if that is known.
    :ivar name: the name it was baked under.
    """

    reference: str
    config: ImageConfig
    layers: tuple[Path, ...]
    digest: str
    engine: EngineName = "auto"
    snapshot: Snapshot | None = None
    memory_mib: int | None = None
    vcpus: int | None = None
    guest_port: int | None = None
    name: str | None = None

    def __repr__(self) -> str:
        return f"<Image {self.reference!r} {self.digest}>"

    @staticmethod
    async def from_oci(
        ref: str,
        *,
        pull: PullPolicy = PullPolicy.MISSING,
        platform: str | None = None,
        engine: EngineName = "auto",
        progress: ProgressCallback | None = None,
    ) -> Image:
        """The image that ``ref`` names, baked: booted once, and restored from then on.

        From a registry it is pulled into the data directory (:doc:`images`), where a pull that was
        broken off goes on the next time. Its layers become read-only file systems there, once for
        all programs, while they are downloaded; digests are verified. The first call for an image
        boots it with 256 MiB and one CPU, waits until its workload is ready (see
        :meth:`OciImageBuilder.with_snapshot`) and captures it; later calls find that snapshot.
        :meth:`builder` bakes with other settings. Cancelling ends the work and leaves nothing
        half-made.

        :param ref: a name in a registry, as Docker writes them
            (``[docker://][HOST[:PORT]/]NAME[:TAG][@DIGEST]``), ``oci:DIR[:TAG]``,
            ``oci-archive:FILE[:TAG]``, ``docker-archive:FILE[:NAME]``, ``rootfs:DIR`` or
            ``builtin:busybox``.
        :param pull: when to ask a registry.
        :param platform: such as ``"linux/arm64"``; ``None`` is Linux on this machine's
            architecture.
        :param engine: the engine for the bake and the VMs of this image.
        :param progress: an async function that is called with
            :class:`~trio_supermachine.Progress` values, one at a time; for each layer the bytes
            that were downloaded, ten times in a second at most.
        :raises ReferenceInvalid: the reference does not parse.
        :raises ImageNotFound: there is no such image, or not for this platform, or it is not here
            and ``pull`` forbids to ask.
        :raises RegistryError: its registry refused or failed.
        :raises ImageCorrupt: it is damaged, lies about a digest, or tries to leave its root.
        :raises BakeFailed: its guest did not get as far as its capture; its message says how to
            bake it otherwise.
        :raises EngineUnavailable: no engine can run a guest here.
        :raises AssetNotFound: a tool is missing; the message names its package.
        :raises NotSupported: the image is of a kind not known here, or for a platform that no
            guest here can have; said before a layer is downloaded.
        :raises DiskFull: there is no room for it.
        :raises ConfigError: another argument makes no sense.
        """
        from .builder import OciImageBuilder  # which makes images

        builder = OciImageBuilder(reference=ref, pull=pull, platform=platform, engine=engine)
        return await builder.build(progress)

    @staticmethod
    def builder(ref: str) -> OciImageBuilder:
        """Say how the image that ``ref`` names is to be baked; :meth:`OciImageBuilder.build`
        does it.

        :raises ReferenceInvalid: the reference does not parse.
        """
        from .builder import OciImageBuilder  # which makes images

        return OciImageBuilder(reference=ref)

    @staticmethod
    async def from_snapshot(path: StrPath) -> Image:
        """The image whose VMs are restored from a snapshot, baked or made by
        :meth:`Vm.snapshot`.

        The snapshot is verified: its memory in full once per host, then by its file's identity.
        Cancelling ends the work.

        :param path: the snapshot's directory, or the ``restore.snap`` in it.
        :raises SnapshotInvalid: a file is missing, damaged, or not what was captured.
        :raises SnapshotIncompatible: another version or engine made it.
        """
        return image_of(await open_snapshot(path))

    def start(self, config: VmConfig | None = None) -> AbstractAsyncContextManager[Vm]:
        """The same as :meth:`Vm.start` with this image."""
        return Vm.start(self, config)

    def acquire(self, config: VmConfig | None = None) -> AbstractAsyncContextManager[PooledVm]:
        """A VM of this image for the length of an ``async with`` block, without a pool.

        It is restored on entry and ended on exit. :meth:`pool` keeps VMs warm across calls.
        """
        from ..pool import acquire  # pool.py is a layer above

        return acquire(self, config)

    def pool(self) -> PoolBuilder:
        """A :class:`PoolBuilder` for VMs of this image."""
        from ..pool import pool_of  # pool.py is a layer above

        return pool_of(self)


def image_of(snapshot: Snapshot) -> Image:
    """The image that a snapshot was made of. :raises SnapshotIncompatible: by an engine that this
    version does not have.
    """
    metadata = snapshot.metadata
    if metadata.engine not in get_args(EngineName):
        raise SnapshotIncompatible(
            str(snapshot.directory),
            f"the engine {metadata.engine!r} made it, which this version does not have;"
            " upgrade trio-supermachine, or make the snapshot again",
        )
    return Image(
        reference=metadata.image_reference,
        config=metadata.image_config,
        layers=snapshot.layers,
        digest=metadata.image_digest,
        engine=engine_name(metadata.engine),
        snapshot=snapshot,
        memory_mib=metadata.memory_mib,
        vcpus=metadata.vcpus,
        guest_port=metadata.guest_port,
    )


def engine_name(name: str) -> EngineName:
    """The name of an engine of this version."""
    assert name in get_args(EngineName)
    return cast(EngineName, name)
