"""The content store: images that were pulled or loaded, in the form in which they came.

It is an OCI image layout below ``content`` in the data directory, shared by all programs:

- ``blobs/sha256/HEX``: layers as the registry stores them, manifests and configurations;
- ``index.json``: a *record* for each name, with the digest that it stands for, and since when;
- ``partial/HEX``: downloads that are under way or were broken off;
- ``locks/HEX``: held while a blob is written, so that one program at a time downloads it;
- ``leases/``: a file for each pull or load at work, with the digests that it needs;
- ``lock``: held for moments to write the index, a lease or a document, and to collect.

A blob is published by a rename when its digest has been checked; so whatever has a name here is
what its name says, unless the disk has lost it. A download that ends early leaves its partial
file, and the next one, of any program, goes on after it.

:meth:`ContentStore.collect` removes the blobs that no record and no lease needs. It holds ``lock``,
so no lease and no record begins meanwhile. A lease names a blob *before* the blob is looked for:
so either the collector sees the lease and leaves the blob, or the program sees that the blob is
gone. A lease counts while its file is marked as used (:mod:`~trio_supermachine.host.locks`), which
ends with the program.

Guests run squashfs files that :mod:`.layers` makes of layers. These do not need the blobs any more.
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
    """Blobs that were removed, or would be, and their size in bytes on the disk."""

    digests: tuple[str, ...]
    size: int


class Lease:
    """Keeps blobs from being removed, until it ends. :meth:`ContentStore.lease` makes one."""

    def __init__(self, store: ContentStore, path: Path) -> None:
        self._store = store
        self._path = path

    async def keep(self, *digests: str) -> None:
        """Keep these blobs, too, whether they are there already or are yet to come."""
        async with self._store.locked():
            with full_disk(self._path), self._path.open("a") as file:
                file.writelines(f"{digest}\n" for digest in digests)


class ContentStore:
    """The content store below a data directory.

    :param root: that directory; ``None`` is the library's own.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root: Path = (hostfiles.home() if root is None else root) / "content"
        self._files = Directory(self.root)

    def find(self, name: str) -> Blob | None:
        """Find a file of the layout: a store is :class:`~trio_supermachine.oci.blobs.Files`."""
        return self._files.find(name)

    def path(self, digest: str) -> Path:
        """Give the path that a blob has, or will have."""
        return self.root / "blobs" / as_digest(digest, "a blob's digest").replace(":", "/")

    def has(self, descriptor: Descriptor) -> bool:
        """Give whether a blob is there in its full size."""
        try:
            return self.path(descriptor.digest).stat().st_size == descriptor.size
        except FileNotFoundError:
            return False

    # Records

    def records(self) -> tuple[Record, ...]:
        """Read all records, in the order of their names."""
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
        """Find the record of a name."""
        return next((record for record in self.records() if record.name == name), None)

    async def set_record(self, name: str, top: Descriptor) -> None:
        """Let a name stand for ``top``, which is in the store with all below it."""
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
        """Forget names. :meth:`collect` then removes the blobs that nothing else needs."""
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
        """Put a document into the store, unless it is there, and give its digest."""
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
        """Be the only writer of a blob, of all programs; ``None`` if the blob is there already.

        The blob is checked and published at the end of the block. When the block fails, or is
        cancelled, the partial file stays for the next writer, unless it is wrong or the disk is
        full.

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
                # The arrival closes the descriptor: readers may need it after this block.
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
        """Give whether a blob has its digest. Remove one that has another."""
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

    # Leases, and the removal of blobs without one

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

        The blobs of a pull in progress stay. Cancelled, this has removed a part.

        :param dry_run: only tell what would be removed.
        :param without: names of records that keep nothing.
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
                pass  # the lease ended just now
        return needed

    def _tidy(self) -> None:
        """Remove temporary files and locks that killed programs left."""
        for lock in self.root.glob("locks/*"):
            with try_exclusive(lock):
                pass  # the lock's file goes with it
        for directory in (self.root, self.root / "blobs/sha256"):
            hostfiles.sweep(directory)

    def below(self, top: Descriptor) -> Mapping[str, int]:
        """Give the digest and size of each blob that is here of ``top``, itself included."""
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
    """Compute the digest of an open file, in a worker thread of Trio's."""
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
