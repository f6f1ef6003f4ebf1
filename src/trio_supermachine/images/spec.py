"""Images as values: programs to run, files to run them from, and defaults for their VMs."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import cast, get_args

import attrs

from ..config.defaults import EngineName
from ..errors import SnapshotIncompatible
from ..oci.config import ImageConfig
from ..snapshots import Snapshot


@attrs.frozen(eq=False, kw_only=True, repr=False)
class ImageSpec:
    """An image that is ready to run.

    :ivar reference: the reference as it was given.
    :ivar config: the image's configuration: environment, command, user and so on.
    :ivar layers: read-only squashfs files, lowest first.
    :ivar digest: the digest of the image's manifest. For a docker archive it is the digest of the
        configuration, and for what is no OCI image a digest of what it was made of.
    :ivar engine: the engine that VMs of it run on unless told otherwise.
    :ivar snapshot: the snapshot that its VMs are restored from; ``None`` for an image that boots.
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


def image_of(snapshot: Snapshot) -> ImageSpec:
    """Give the image that a snapshot was made of.

    :raises SnapshotIncompatible: an engine made it that this version does not have.
    """
    metadata = snapshot.metadata
    if metadata.engine not in get_args(EngineName):
        raise SnapshotIncompatible(
            str(snapshot.directory),
            f"the engine {metadata.engine!r} made it, which this version does not have;"
            " upgrade trio-supermachine, or make the snapshot again",
        )
    return ImageSpec(
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
    """Give the name of an engine of this version its type."""
    assert name in get_args(EngineName)
    return cast(EngineName, name)


def require_image(image: object) -> None:
    """Check what a caller gave as an image. :raises TypeError: it is none."""
    if isinstance(image, ImageSpec):
        return
    if isinstance(image, Awaitable):
        close = getattr(image, "close", None)
        if close is not None:
            close()  # so that Python does not warn of it, too
        raise TypeError("this image is still to be awaited: write 'await Image.from_oci(...)'")
    if isinstance(image, str):
        raise TypeError(
            f"{image!r} names an image: write 'Vm.start(await Image.from_oci({image!r}))'"
        )
    raise TypeError(f"a VM is started from an Image, not {image!r}")
