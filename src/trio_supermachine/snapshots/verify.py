"""Finding the files of a snapshot and its bases, and making sure that they are sound.

Metadata and device state are read in full each time. Memory and layers are large: each is read
in full once, and then known by its path, inode, size and time stamps.
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

#: How many snapshots may lie one on another.
MAX_CHAIN = 32
_MEMORY, _FILE = "memory", "file"


@attrs.frozen(eq=False, kw_only=True)
class Snapshot:
    """A snapshot whose files were found and verified.

    :ivar directory: where it is.
    :ivar identity: stands for all its bytes, and those of its bases.
    :ivar state: the file with the device state.
    :ivar memory: the guest's memory, bases included.
    :ivar layers: where the image's layers are, lowest first.
    :ivar depth: how many snapshots it is made on; 0 for a full one.
    """

    directory: Path
    metadata: Metadata
    identity: str
    state: Path
    memory: MemoryImage
    layers: tuple[Path, ...]
    depth: int


def snapshot_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of the snapshot that a user names by it, or by the device state in it.

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
    """What a file's record is kept under."""
    return os.path.abspath(path)


class Verifier:
    """Verifies snapshots, in a thread.

    :param check: is called between pieces of work, and may raise to end it.
    :param thorough: whether to read everything in full, whatever is known.
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
        """Note that this snapshot's memory is as its metadata says: it was just written so."""
        full = metadata.kind == "full"
        path = directory / (FULL_MEMORY if full else DIFF_MEMORY)
        found = identity(os.stat(path))
        kind = _MEMORY if full else _FILE
        self._known.remember(place_of(path), found, kind, metadata.memory.sha256)

    def _chain(self, directory: Path) -> list[_Link]:
        """The snapshot and those below it, down to a full one."""
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
    """A diff's base: where it was, or where it is if both were moved."""
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
    """Where a layer may be: where it was, or at the same place in this data directory."""
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
