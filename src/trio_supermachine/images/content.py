"""The content store: what was pulled or loaded, as it was distributed.

It is an OCI image layout below ``content`` in the data directory, shared by all programs:

- ``blobs/sha256/HEX``: layers as they are stored in the registry, manifests and configurations;
- ``index.json``: which name stands for which digest (a *record*), and since when;
- ``partial/HEX``: downloads that are under way or were broken off; the next goes on from there;
- ``leases/``: a file for each program at work, with the digests that it needs.

Blobs are published by a rename when their digest has been checked. ``lock`` is held for moments:
to write the index, a lease or a document, and by whoever removes what no record and no lease needs.
Layers that are run are squashfs files of :mod:`.store`, which do not need these blobs any more.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from ..errors import SupermachineError
from ..host import files as hostfiles
from ..host import locks
from ..host.locks import exclusive, in_use, try_exclusive, unused
from ..oci import MalformedError
from ..oci.blobs import MAX_DOCUMENT, Directory, as_digest, sha256
from ..oci.decompress import Blob
from ..oci.documents import INDEXES, MANIFESTS, MAX_MANIFESTS, Descriptor
from .arrival import Arrival, BlobWriter, full_disk
from .records import Record, named_in, read_records, write_index

_LAYOUT: Final = '{"imageLayoutVersion": "1.0.0"}'


@attrs.frozen(kw_only=True)
class Collected:
    """The blobs that were removed, or would be, and their size in bytes on the disk."""

    digests: tuple[str, ...]
    size: int


class Lease:
    """Keeps blobs from being removed until it ends; :meth:`ContentStore.lease` makes one."""

    def __init__(self, store: ContentStore, path: Path) -> None:
        self._store = store
        self._path = path

    async def keep(self, *digests: str) -> None:
        """Keep these too, whether they are there already or to come."""
        async with self._store.locked():
            with full_disk(self._path), self._path.open("a") as file:
                file.writelines(f"{digest}\n" for digest in digests)


class ContentStore:
    """The content store below a data directory.

    :param root: that directory; ``None`` is the library's own.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (hostfiles.home() if root is None else root) / "content"
        self._files = Directory(self.root)

    def find(self, name: str) -> Blob | None:
        """Where a file of the layout is: this makes it :class:`~..oci.blobs.Files`."""
        return self._files.find(name)

    def path(self, digest: str) -> Path:
        """Where a blob is, or will be."""
        return self.root / "blobs" / as_digest(digest, "a blob's digest").replace(":", "/")

    def has(self, descriptor: Descriptor) -> bool:
        """Whether a blob is there in its full size."""
        try:
            return self.path(descriptor.digest).stat().st_size == descriptor.size
        except FileNotFoundError:
            return False

    # Records

    def records(self) -> tuple[Record, ...]:
        """All records, by name."""
        path = self.root / "index.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return ()
        try:
            found = read_records(data)
        except MalformedError as error:
            raise SupermachineError(
                f"{path} is damaged ({error}); remove it and pull the images again, which"
                " downloads nothing that is there"
            ) from error
        return tuple(sorted(found, key=lambda record: record.name))

    def record(self, name: str) -> Record | None:
        """What a name stands for, if it is known."""
        return next((record for record in self.records() if record.name == name), None)

    async def set_record(self, name: str, top: Descriptor) -> None:
        """Let a name stand for what is in the store now."""
        new = Record(name=name, top=top, resolved_at=time.time())
        async with self.locked():
            others = [record for record in self.records() if record.name != name]
            if len(others) >= MAX_MANIFESTS:
                raise SupermachineError(
                    f"{self.root} has {MAX_MANIFESTS} images; remove some with trio-supermachine"
                    " rmi"
                )
            await trio.to_thread.run_sync(self._write_index, [*others, new])

    async def remove_records(self, names: Iterable[str]) -> None:
        """Forget names; :meth:`collect` then removes what nothing else needs."""
        gone = set(names)
        async with self.locked():
            kept = [record for record in self.records() if record.name not in gone]
            await trio.to_thread.run_sync(self._write_index, kept)

    def _write_index(self, records: Iterable[Record]) -> None:
        layout, index = self.root / "oci-layout", self.root / "index.json"
        with full_disk(index):
            if not layout.exists():
                with hostfiles.new_file(layout) as new:
                    new.write_text(_LAYOUT)
            with hostfiles.new_file(index) as new:
                new.write_text(write_index(records))

    # Blobs

    async def put(self, data: bytes) -> str:
        """Put a document into the store, unless it is there; its digest."""
        digest = sha256(data)
        async with self.locked():
            await trio.to_thread.run_sync(self._put, self.path(digest), data)
        return digest

    def _put(self, path: Path, data: bytes) -> None:
        try:
            if path.read_bytes() == data:
                return
        except FileNotFoundError:
            pass
        with full_disk(path), hostfiles.new_file(path) as new:
            new.write_bytes(data)

    @asynccontextmanager
    async def receiving(
        self, digest: str, size: int, arrival: Arrival
    ) -> AsyncIterator[BlobWriter | None]:
        """Be the one, of all programs, who writes a blob; ``None`` if it is there already.

        The blob is published at the end of the block, if it is whole by then. When the block
        fails, or is cancelled, what was written stays for the next one, unless it is wrong or
        the disk is full.

        :raises MalformedError: the blob has another digest or size.
        :raises DiskFull: there is no room for it.
        """
        hexadecimal = digest.partition(":")[2]
        final, partial = self.path(digest), self.root / "partial" / hexadecimal
        async with exclusive(self._lock_of(hexadecimal)):
            if final.exists() and final.stat().st_size == size:
                arrival.begin(os.open(final, os.O_RDONLY | os.O_CLOEXEC), size)
                yield None
                return
            partial.parent.mkdir(parents=True, exist_ok=True)
            with full_disk(partial):
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(partial, flags, 0o644)
                # The arrival closes it: readers may need it after this block.
                arrival.begin(fd, 0)
                writer = BlobWriter(fd, partial, digest, size, arrival)
                try:
                    await writer.resume()
                    yield writer
                    await writer.flush()
                    writer.check()
                    await trio.to_thread.run_sync(_publish, fd, partial, final)
                except (OSError, MalformedError):
                    partial.unlink(missing_ok=True)
                    raise
                except BaseException:
                    if arrival.discarded:
                        partial.unlink(missing_ok=True)
                    else:
                        with suppress(OSError):
                            writer.write_pending()
                    raise

    def _lock_of(self, hexadecimal: str) -> Path:
        return self.root / "locks" / hexadecimal

    async def verify(self, digest: str) -> bool:
        """Whether a blob has its digest; one that has not is removed."""
        return await trio.to_thread.run_sync(self._verify, digest)

    def _verify(self, digest: str) -> bool:
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                hashed = _digest_of(file.fileno())
        except FileNotFoundError:
            return False
        if hashed != digest:
            path.unlink(missing_ok=True)
        return hashed == digest

    # What is kept

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the lock on the index and the leases."""
        async with locks.locked(self.root / "lock"):
            yield

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """Keep blobs from being removed during the block."""
        path = self.root / "leases" / secrets.token_hex(8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            async with self.locked():
                with full_disk(path):
                    path.touch(exist_ok=False)
                stack.callback(path.unlink, missing_ok=True)
                stack.enter_context(in_use(path))
            yield Lease(self, path)

    async def collect(self, *, dry_run: bool = False, without: Collection[str] = ()) -> Collected:
        """Remove blobs and broken-off downloads that no record and no lease needs.

        What a pull in progress has or is about to have stays. Cancelled, it has removed a part.

        :param dry_run: only tell what would be removed.
        :param without: names of records that are to keep nothing.
        """
        if not self.root.is_dir():
            await trio.lowlevel.checkpoint()
            return Collected(digests=(), size=0)
        async with self.locked():
            return await trio.to_thread.run_sync(self._collect, dry_run, without)

    def _collect(self, dry_run: bool, without: Collection[str]) -> Collected:
        needed = self._leased()
        for record in self.records():
            if record.name not in without:
                needed |= self.below(record.top).keys()
        gone, size = [], 0
        for path in sorted([*self.root.glob("blobs/sha256/*"), *self.root.glob("partial/*")]):
            trio.from_thread.check_cancelled()
            digest = f"sha256:{path.name}"
            if digest in needed or path.name.startswith("."):
                continue
            try:
                allocated = path.stat().st_blocks * 512
                if not dry_run:
                    path.unlink()
            except FileNotFoundError:
                continue
            gone.append(digest)
            size += allocated
        if not dry_run:
            self._tidy()
        return Collected(digests=tuple(gone), size=size)

    def _leased(self) -> set[str]:
        needed: set[str] = set()
        for path in self.root.glob("leases/*"):
            with unused(path) as abandoned:
                if abandoned:
                    path.unlink(missing_ok=True)
                    continue
            try:
                needed.update(path.read_text().split())
            except FileNotFoundError:
                pass  # it ended just now
        return needed

    def _tidy(self) -> None:
        """Remove what killed programs left of files and locks."""
        for lock in self.root.glob("locks/*"):
            with try_exclusive(lock):
                pass  # its file goes with it
        for directory in (self.root, self.root / "blobs/sha256"):
            hostfiles.sweep(directory)

    def below(self, top: Descriptor) -> Mapping[str, int]:
        """The digests of all that ``top`` needs and that is here, itself too, with their sizes."""
        found: dict[str, int] = {}
        waiting = [(top.digest, top.media_type in (*INDEXES, *MANIFESTS))]
        while waiting:
            digest, document = waiting.pop()
            try:
                size = self.path(digest).stat().st_size
            except FileNotFoundError:
                continue
            if digest in found:
                continue
            found[digest] = size
            if document and size <= MAX_DOCUMENT:
                below = named_in(self.path(digest).read_bytes())
                waiting += [(named.digest, named.document) for named in below]
        return found


def _digest_of(fd: int) -> str:
    """The digest of an open file, read in a worker thread of Trio's."""
    hashed = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, 1 << 20, offset):
        trio.from_thread.check_cancelled()
        hashed.update(data)
        offset += len(data)
    return "sha256:" + hashed.hexdigest()


def _publish(fd: int, partial: Path, final: Path) -> None:
    os.fsync(fd)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(final)
    for directory in (final.parent, partial.parent):
        hostfiles.fsync(directory)
