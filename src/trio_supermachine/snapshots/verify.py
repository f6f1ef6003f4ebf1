"""The verification of a snapshot: find its files and those of its bases, and check them all.

A snapshot is a directory. A diff names its base, so that several make a *chain*, at most 33 long,
down to a full one. A snapshot that was verified can be restored without another look at its bytes,
so nothing gets past here that an engine should not load. This is the order:

1. *The chain.* Each ``metadata.json`` is read, from the newest to the full one. It must match its
   own checksum (:mod:`.metadata`). A base is searched where it was at the capture, then at the same
   place relative to the diff, in case both were moved; what is found must have the identity that
   the diff names. Since a diff's identity covers that of its base, no base can be exchanged, and
   no chain can run in a circle.
2. *State and memory*, from the full snapshot upwards. The device state is small, and its digest is
   computed each time. The memory's digest is computed once, see below. The table of a diff is
   checked on top of its digest, since offsets into the file are made of it.
3. *Layers*, where they were at the capture, or at the same place in this data directory.

Reading all memory at each restore would take longer than the restore. So memory and layers are read
in full once, and then known by path, device, inode, size and time stamps (``host/verified``). The
identity of an open file is taken before it is read and compared afterwards, so that a file that
changes meanwhile is never recorded as verified. The user of this program can forge time stamps and
records, and nothing here protects against that. :func:`~.directory.verify_snapshot` reads
everything, whatever is recorded.

Any file may be hostile: a FIFO, a link, a device, too long, a header that lies. :mod:`.files` opens
regular files only, every size is compared before content is read, and whatever is wrong becomes
:exc:`SnapshotInvalid`, which names the file and a remedy.
"""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from ..errors import SnapshotInvalid
from ..host import files as hostfiles
from ..host.verified import VerifiedFiles, identity
from .diff import read_patch
from .files import (
    DIFF_MEMORY,
    FULL_MEMORY,
    METADATA,
    STATE,
    Check,
    hash_file,
    read_exactly,
    reading,
    require_size,
)
from .memory import MemoryImage, PagePatch, digest_memory
from .metadata import MAX_METADATA, REMEDY, BaseRef, FileRef, LayerRef, MemoryRef, Metadata

#: The most diffs that may lie on a full snapshot.
MAX_CHAIN = 32
_MEMORY, _FILE = "memory", "file"


@attrs.frozen(eq=False, kw_only=True)
class Snapshot:
    """A snapshot whose files were found and verified.

    :ivar directory: its directory.
    :ivar identity: a digest of all its bytes, and of those of its bases.
    :ivar state: the file with the device state.
    :ivar memory: the guest's memory, bases included.
    :ivar layers: the files of the image's layers, lowest first.
    :ivar depth: the number of snapshots that it lies on; 0 for a full one.
    """

    directory: Path
    metadata: Metadata
    identity: str
    state: Path
    memory: MemoryImage
    layers: tuple[Path, ...]
    depth: int


def snapshot_directory(path: str | os.PathLike[str]) -> Path:
    """Give the directory of a snapshot that a user names by it, or by the device state in it.

    :raises SnapshotInvalid: there is no such thing.
    """
    place = Path(os.path.abspath(path))
    if os.path.isdir(place):
        return place
    if place.name == STATE and os.path.lexists(place):
        return place.parent
    what = "it is not a snapshot" if os.path.lexists(place) else "it does not exist"
    raise SnapshotInvalid(str(place), f"{what}; give the directory of a snapshot or its {STATE}")


def load_metadata(directory: Path) -> Metadata:
    """Read a snapshot's metadata, and nothing else.

    :raises SnapshotInvalid: it is missing or damaged.
    """
    path = directory / METADATA
    if not os.path.lexists(path):
        reason = f"it has no {METADATA}, so it is not a snapshot; give a snapshot's directory"
        raise SnapshotInvalid(str(directory), reason)
    with reading(path) as fd:
        size = min(os.fstat(fd).st_size, MAX_METADATA + 1)
        data = read_exactly(fd, size, 0)
    return Metadata.parse(data, str(path))


def place_of(path: Path) -> str:
    """Give the key of a file's record."""
    return os.path.abspath(path)


class Verifier:
    """The verification of snapshots, in a thread.

    :param check: called between pieces of work; it may raise to end the work.
    :param thorough: read everything in full, whatever is known.
    """

    def __init__(self, check: Check, *, thorough: bool = False) -> None:
        self._check = check
        self._thorough = thorough
        self._known = VerifiedFiles()

    def snapshot(self, directory: Path) -> Snapshot:
        """Verify a snapshot with its bases and layers.

        :raises SnapshotInvalid: something is missing or damaged.
        """
        chain = self._chain(directory)
        root = chain[-1].directory / FULL_MEMORY
        patches = []
        for link in reversed(chain):
            self._state(link.directory / STATE, link.metadata.state)
            if link.metadata.kind == "full":
                self._full(root, link.metadata.memory)
            else:
                patches.append(self._diff(link.directory / DIFF_MEMORY, link.metadata))
        metadata = chain[0].metadata
        return Snapshot(
            directory=directory,
            metadata=metadata,
            identity=metadata.identity,
            state=directory / STATE,
            memory=MemoryImage(root, metadata.memory_size, tuple(patches)),
            layers=tuple(self._layer(ref) for ref in metadata.layers),
            depth=len(chain) - 1,
        )

    def layer(self, path: Path) -> LayerRef:
        """Describe a layer's file."""
        with reading(path, follow=True) as fd:
            before = identity(os.fstat(fd))
            known = None if self._thorough else self._known.recall(place_of(path), before)
            if known is not None and len(known) == 2 and known[0] == _FILE:
                return LayerRef(path=path, sha256=known[1], size=before[2])
            found = hash_file(fd, self._check)
            self._remember(path, fd, before, _FILE, found.sha256)
        return LayerRef(path=path, sha256=found.sha256, size=found.size)

    def trust_memory(self, directory: Path, metadata: Metadata) -> None:
        """Record that this snapshot's memory is as its metadata says, as it was just written."""
        full = metadata.kind == "full"
        path = directory / (FULL_MEMORY if full else DIFF_MEMORY)
        found = identity(os.stat(path))
        kind = _MEMORY if full else _FILE
        self._known.remember(place_of(path), found, kind, metadata.memory.sha256)

    def _chain(self, directory: Path) -> list[_Link]:
        """Read the metadata of a snapshot and of those below it, down to a full one."""
        chain = [_Link(directory, load_metadata(directory))]
        while (base := chain[-1].metadata.base) is not None:
            if len(chain) > MAX_CHAIN:
                reason = f"it is a chain of more than {MAX_CHAIN}; make a full snapshot"
                raise SnapshotInvalid(str(directory), reason)
            above = chain[-1]
            below = _find_base(above.directory, base)
            if below.metadata.memory_mib != above.metadata.memory_mib:
                reason = f"its base has another size of memory; {REMEDY}"
                raise SnapshotInvalid(str(above.directory), reason)
            chain.append(below)
        return chain

    def _state(self, path: Path, expected: FileRef) -> None:
        with reading(path) as fd:
            require_size(path, fd, expected.size)
            if hash_file(fd, self._check) != expected:
                raise _damaged(path)

    def _full(self, path: Path, expected: MemoryRef) -> None:
        with reading(path) as fd:
            require_size(path, fd, expected.size)
            before = identity(os.fstat(fd))
            if self._is_known(path, before, _MEMORY, expected.sha256):
                return
            if digest_memory(fd, expected.size, self._check) != expected:
                raise _damaged(path)
            self._remember(path, fd, before, _MEMORY, expected.sha256)

    def _diff(self, path: Path, metadata: Metadata) -> PagePatch:
        expected = metadata.memory
        with reading(path) as fd:
            require_size(path, fd, expected.size)
            self._content(path, fd, expected.sha256)
            return read_patch(path, fd, metadata.memory_size)

    def _layer(self, ref: LayerRef) -> Path:
        problem: SnapshotInvalid | None = None
        for path in _layer_places(ref.path):
            if os.path.exists(path):
                try:
                    with reading(path, follow=True) as fd:
                        require_size(path, fd, ref.size)
                        self._content(path, fd, ref.sha256)
                    return path
                except SnapshotInvalid as error:
                    problem = problem or error
        remedy = "prepare its image again, or copy the file back"
        if problem is None:
            raise SnapshotInvalid(str(ref.path), f"this layer is missing; {remedy}")
        reason = f"this layer is not the one that was captured; {remedy}"
        raise SnapshotInvalid(problem.path, reason) from problem

    def _content(self, path: Path, fd: int, sha256: str) -> None:
        before = identity(os.fstat(fd))
        if self._is_known(path, before, _FILE, sha256):
            return
        if hash_file(fd, self._check).sha256 != sha256:
            raise _damaged(path)
        self._remember(path, fd, before, _FILE, sha256)

    def _is_known(self, path: Path, found: tuple[int, ...], *facts: str) -> bool:
        return not self._thorough and self._known.recall(place_of(path), found) == [*facts]

    def _remember(self, path: Path, fd: int, before: tuple[int, ...], *facts: str) -> None:
        if identity(os.fstat(fd)) != before:
            raise SnapshotInvalid(str(path), "it changed while it was read; try again")
        self._known.remember(place_of(path), before, *facts)


@attrs.frozen
class _Link:
    directory: Path
    metadata: Metadata


def _find_base(directory: Path, base: BaseRef) -> _Link:
    """Find a diff's base: at its old place, or beside the diff if both were moved."""
    other: str | None = None
    for place in (base.path, Path(os.path.normpath(directory / base.relative))):
        if not os.path.lexists(place):
            continue
        try:
            metadata = load_metadata(place)
        except SnapshotInvalid as error:
            other = other or f"{place} is not, or is damaged ({error.reason})"
            continue
        if metadata.identity == base.identity:
            return _Link(place, metadata)
        other = other or f"{place} is another, or was changed"
    remedy = f"put the base back at {base.path}, or make a full snapshot"
    found = f"is missing; {remedy}" if other is None else f"is missing: {other}; {remedy}"
    raise SnapshotInvalid(str(directory), f"the base that this diff was made on {found}")


def _layer_places(path: Path) -> list[Path]:
    """Give the places of a layer: its old one, and the same one in this data directory."""
    places = [path]
    parts = path.parts
    if "layers" in parts[:-1]:
        index = len(parts) - 1 - parts[::-1].index("layers")
        below = parts[index + 1 :]
        if ".." not in below:
            places.append(hostfiles.home().joinpath("layers", *below))
    return places


def _damaged(path: Path) -> SnapshotInvalid:
    return SnapshotInvalid(str(path), f"its content is not what was captured; {REMEDY}")
