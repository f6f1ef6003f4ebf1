"""The metadata of a snapshot: ``metadata.json``, as a value and as bytes.

The encoding is canonical: one value has one encoding, and a file with any other bytes is
refused. The file carries its own SHA-256 as ``checksum``, which is the snapshot's *identity*. Since
it names the digests of all other files, and the identity of the base, an identity stands for every
byte.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from .._version import __version__
from ..errors import SnapshotIncompatible, SnapshotInvalid
from ..oci import MalformedError
from ..oci.config import ImageConfig
from ._fields import decode, digest, encode, integer, mapping_of_text, path, short_text, text

#: The version of the format that this library writes, and the newest that it reads.
FORMAT = 1
MAX_METADATA = 1 << 20  # bytes
MAX_LAYERS = 256
#: The remedy for a damaged snapshot, for messages.
REMEDY = "restore it from a copy, or make the snapshot again"

Kind = Literal["full", "diff"]
_MAX_FILE = 1 << 50  # bytes


@attrs.frozen(kw_only=True)
class FileRef:
    """A file by its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str = attrs.field(validator=digest)
    size: int = attrs.field(validator=integer(0, _MAX_FILE))


@attrs.frozen(kw_only=True)
class LayerRef:
    """A squashfs layer: its path at the capture, its SHA-256 and its size in bytes."""

    path: Path = attrs.field(validator=path)
    sha256: str = attrs.field(validator=digest)
    size: int = attrs.field(validator=integer(0, _MAX_FILE))


@attrs.frozen(kw_only=True)
class MemoryRef:
    """A memory file.

    :ivar sha256: the digest of a full file's content (see :func:`~.memory.digest_memory`), or of a
        diff's file.
    :ivar size: the file's length in bytes.
    :ivar data: the number of bytes of the guest's memory in it.
    """

    sha256: str = attrs.field(validator=digest)
    size: int = attrs.field(validator=integer(0, _MAX_FILE))
    data: int = attrs.field(validator=integer(0, _MAX_FILE))


@attrs.frozen(kw_only=True)
class BaseRef:
    """The snapshot that a diff was made on: its identity and its path at the capture.

    :ivar relative: the path to it from the diff's own directory, for when both were moved.
    """

    identity: str = attrs.field(validator=digest)
    path: Path = attrs.field(validator=path)
    relative: str = attrs.field(validator=text)


@attrs.frozen(kw_only=True)
class Draft:
    """The part of the metadata that is known before the files are written.

    :ivar engine: the engine's name.
    :ivar host: the engine's facts about the host with which a restore must agree.
    :ivar kernel: the SHA-256 of the kernel.
    :ivar initramfs: the SHA-256 of the initramfs.
    :ivar image_config: the image's configuration.
    :ivar layers: the image's squashfs files, lowest first.
    :ivar guest_port: the TCP port that the workload listens on, if that is known.
    :ivar fingerprint: the fingerprint of everything that a bake was made of, if this is one.
    :ivar workload_started: whether the image's workload had been started before the capture.
    :ivar created_at: the time of the capture, in seconds since 1970.
    """

    engine: str = attrs.field(validator=short_text)
    host: Mapping[str, str] = attrs.field(validator=mapping_of_text, factory=dict, hash=False)
    kernel: str = attrs.field(validator=digest)
    initramfs: str = attrs.field(validator=digest)
    kernel_release: str = attrs.field(validator=short_text, default="")
    memory_mib: int = attrs.field(validator=integer(1, 1 << 24))
    vcpus: int = attrs.field(validator=integer(1, 4096))
    hostname: str = attrs.field(validator=short_text, default="")
    image_reference: str = attrs.field(validator=text)
    image_digest: str = attrs.field(validator=short_text)
    image_config: ImageConfig = attrs.field(
        validator=attrs.validators.instance_of(ImageConfig), factory=ImageConfig
    )
    layers: tuple[LayerRef, ...] = attrs.field(
        validator=[
            attrs.validators.max_len(MAX_LAYERS),
            attrs.validators.deep_iterable(
                attrs.validators.instance_of(LayerRef), attrs.validators.instance_of(tuple)
            ),
        ],
        default=(),
    )
    guest_port: int | None = attrs.field(
        validator=attrs.validators.optional(integer(1, 65535)), default=None
    )
    fingerprint: str | None = attrs.field(
        validator=attrs.validators.optional(short_text), default=None
    )
    workload_started: bool = attrs.field(validator=attrs.validators.instance_of(bool), default=True)
    created_by: str = attrs.field(validator=short_text, default=f"trio-supermachine {__version__}")
    created_at: int = attrs.field(validator=integer(0, 1 << 40), factory=lambda: int(time.time()))


@attrs.frozen(kw_only=True)
class Metadata(Draft):
    """The content of ``metadata.json``.

    Making a value that could not be read again raises :exc:`ValueError` or :exc:`TypeError`.
    """

    kind: Kind = attrs.field(validator=attrs.validators.in_(("full", "diff")))
    state: FileRef
    memory: MemoryRef
    base: BaseRef | None = None

    def __attrs_post_init__(self) -> None:
        if (self.kind == "diff") != (self.base is not None):
            raise ValueError("a diff has a base, and nothing else has one")
        if self.kind == "full" and self.memory.size != self.memory_size:
            raise ValueError("the memory file is not as large as the memory")

    @classmethod
    def of(
        cls, draft: Draft, *, kind: Kind, state: FileRef, memory: MemoryRef, base: BaseRef | None
    ) -> Metadata:
        """Complete a draft."""
        known = {field.name: getattr(draft, field.name) for field in attrs.fields(Draft)}
        return cls(**known, kind=kind, state=state, memory=memory, base=base)

    @property
    def memory_size(self) -> int:
        """The guest's memory in bytes."""
        return self.memory_mib << 20

    @property
    def identity(self) -> str:
        """The SHA-256 of everything that the snapshot is made of, in hexadecimal."""
        return _checksum(self._document())

    def to_bytes(self) -> bytes:
        """Encode the content of ``metadata.json``.

        :raises ValueError: it would be larger than a reader takes.
        """
        document = self._document()
        document["checksum"] = _checksum(document)
        data = _dump(document)
        if len(data) > MAX_METADATA:
            raise ValueError(
                f"the image's configuration is too large for a snapshot ({len(data)} bytes)"
            )
        return data

    @classmethod
    def parse(cls, data: bytes, name: str) -> Metadata:
        """Read the content of ``metadata.json``, which is not trusted.

        :param name: the file's name in errors.
        :raises SnapshotIncompatible: a newer library wrote it.
        :raises SnapshotInvalid: it is damaged, or no such file.
        """
        try:
            document = _load(data)
        except (ValueError, RecursionError):
            reason = f"it is not the metadata of a snapshot, or damaged; {REMEDY}"
            raise SnapshotInvalid(name, reason) from None
        version = document.pop("format", None)
        if type(version) is int and version > FORMAT:
            raise SnapshotIncompatible(
                name,
                f"its format is {version}, newer than this library's ({FORMAT});"
                " upgrade trio-supermachine, or make the snapshot again",
            )
        document.pop("checksum", None)
        try:
            document["image_config"] = ImageConfig.from_json(document.get("image_config"))
            document.setdefault("workload_started", True)
            metadata = decode(cls, document)
            if metadata.to_bytes() != data:
                raise ValueError("it does not match its own checksum")
        except (MalformedError, ValueError, TypeError, RecursionError) as error:
            raise SnapshotInvalid(name, f"it is damaged: {error}; {REMEDY}") from None
        return metadata

    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = encode(self)
        document["format"] = FORMAT
        document["image_config"] = self.image_config.to_json()
        if self.workload_started:  # the usual value is left out, as older versions have it
            del document["workload_started"]
        return document


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_METADATA:
        raise ValueError("too large")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(document)).hexdigest()
