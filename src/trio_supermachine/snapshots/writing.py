"""Writing snapshots: a directory appears whole, or not at all.

A capture goes through these steps:

1. :func:`new_snapshot` makes a temporary directory beside the snapshot's place, and so on the same
   file system.
2. The engine writes the device state and the memory there, while the guest stands still.
3. The guest runs again, and :func:`finish_full` or :func:`finish_diff` hashes the files and writes
   the metadata. A diff keeps the pages that differ from its base, and the full memory goes. Its
   base is verified once more, since days may have passed since it was opened, and a diff on
   anything else would be worthless.
4. The block of :func:`new_snapshot` ends: the files are synced to the disk, the directory is
   renamed into its place, and its parent is synced. The order matters. After a power cut the place
   has nothing or the whole snapshot.
5. The memory is recorded as verified, so that the first restore need not read it.

Until the rename, cancelling or failing removes everything. The rename is shielded, as it cannot be
taken back. If another program took the place meanwhile, the rename fails and changes nothing there.
A killed program leaves a temporary directory, which no reader takes for a snapshot.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import trio

from ..errors import SnapshotInvalid
from ..host import files as hostfiles
from .diff import pack_diff
from .files import DIFF_MEMORY, FULL_MEMORY, METADATA, STATE, Check, hash_file, reading
from .memory import digest_memory
from .metadata import BaseRef, Draft, FileRef, LayerRef, MemoryRef, Metadata
from .pages import PAGE, Run
from .verify import MAX_CHAIN, Snapshot, Verifier, load_metadata


@asynccontextmanager
async def new_snapshot(dest: str | os.PathLike[str]) -> AsyncIterator[Path]:
    """Give a temporary directory beside ``dest``, which becomes ``dest`` if the block ends well.

    When the block is left, the directory is on the disk. If the block fails or is cancelled,
    nothing is left, and ``dest`` is as it was.

    :raises FileExistsError: ``dest`` is there and not an empty directory; before the block
        runs, or after it if another program was faster.
    :raises OSError: it cannot be written, as on a full disk.
    """
    path = await trio.to_thread.run_sync(_absent, dest)
    pending = hostfiles.new_directory(path)
    directory = await trio.to_thread.run_sync(pending.__enter__)
    try:
        yield directory
        metadata = await trio.to_thread.run_sync(load_metadata, directory)
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(pending.__exit__, type(error), error, error.__traceback__)
        raise
    with trio.CancelScope(shield=True):  # a rename cannot be taken back
        await trio.to_thread.run_sync(_publish, pending, path, metadata)


async def finish_full(directory: Path, draft: Draft) -> Metadata:
    """Describe the device state and the full memory that were written to ``directory``.

    Cancellable at any time, at the cost of the capture.

    :raises SnapshotInvalid: a file is missing, or the memory is not as large as the draft says.
    :raises ValueError: the draft cannot be written.
    """
    return await trio.to_thread.run_sync(_finish_full, directory, draft)


async def finish_diff(
    directory: Path,
    draft: Draft,
    captured_runs: Iterable[Run],
    base: Snapshot,
    *,
    complete: bool = False,
) -> Metadata:
    """Describe a snapshot as :func:`finish_full` does, but keep only what differs from ``base``.

    The full memory file that the engine wrote is removed.

    :param captured_runs: the pages that were captured, as pairs of a first page and a count.
    :param complete: all other pages are zero; otherwise they are as they were in ``base``.
    :raises SnapshotInvalid: also if the base has another size of memory, or is no longer there,
        or lies on too many others.
    :raises ValueError: the draft cannot be written, a captured page is not inside the memory, or
        more runs of pages differ than a diff holds.
    """
    # Pages that are zero now may have had data in the base.
    runs = ((0, (draft.memory_mib << 20) // PAGE),) if complete else tuple(captured_runs)
    return await trio.to_thread.run_sync(_finish_diff, directory, draft, runs, base)


async def layer_refs(paths: Iterable[Path]) -> tuple[LayerRef, ...]:
    """Describe the files of layers; each is read once on this host.

    :raises SnapshotInvalid: one is missing or cannot be read.
    """
    return await trio.to_thread.run_sync(_layer_refs, tuple(paths))


def _absent(dest: str | os.PathLike[str]) -> Path:
    """Give the absolute path of a new snapshot. :raises FileExistsError: something is there."""
    path = Path(os.path.abspath(dest))
    what, remedy = "something else is there", "remove it, or give another directory"
    try:
        if not path.is_symlink():
            names = os.listdir(path)
            if not names:
                return path
            what = "the directory is not empty"
            if METADATA in names:
                remedy = (
                    "remove it, give another directory, or restore it by Image.from_snapshot(...)"
                )
    except FileNotFoundError:
        return path
    except NotADirectoryError:
        if not os.path.lexists(path):  # one of the parents is no directory
            raise
    raise FileExistsError(errno.EEXIST, f"{what}: {remedy}", str(path))


def _publish(pending: AbstractContextManager[Path], path: Path, metadata: Metadata) -> None:
    try:
        pending.__exit__(None, None, None)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _absent(path)
        raise
    Verifier(_never).trust_memory(path, metadata)


def _finish_full(directory: Path, draft: Draft) -> Metadata:
    check = trio.from_thread.check_cancelled
    size = draft.memory_mib << 20
    path = directory / FULL_MEMORY
    with reading(path) as fd:
        found = os.fstat(fd).st_size
        if found != size:
            reason = f"the engine wrote {found} bytes of memory, not {size}; capture again"
            raise SnapshotInvalid(str(path), reason)
        memory = digest_memory(fd, size, check)
    state = _hash(directory / STATE, check)
    return _describe(
        directory, Metadata.of(draft, kind="full", state=state, memory=memory, base=None)
    )


def _finish_diff(directory: Path, draft: Draft, runs: tuple[Run, ...], base: Snapshot) -> Metadata:
    check = trio.from_thread.check_cancelled
    if draft.memory_mib != base.metadata.memory_mib:
        reason = f"its guest has {base.metadata.memory_mib} MiB of memory, not {draft.memory_mib}"
        raise SnapshotInvalid(str(base.directory), f"{reason}; make a full snapshot")
    if base.depth + 1 > MAX_CHAIN:
        reason = f"it lies on {base.depth} others, as many as there may be; make a full snapshot"
        raise SnapshotInvalid(str(base.directory), reason)
    full, path = directory / FULL_MEMORY, directory / DIFF_MEMORY
    # The guest may have run for days since its base was opened.
    if Verifier(check).snapshot(base.directory).identity != base.identity:
        raise SnapshotInvalid(str(base.directory), "it is another now; make a full snapshot")
    try:
        pages = pack_diff(full, runs, base.memory, path, check)
    except EOFError as error:
        raise SnapshotInvalid(str(base.directory), f"{error}; make a full snapshot") from error
    full.unlink()
    found = _hash(path, check)
    memory = MemoryRef(sha256=found.sha256, size=found.size, data=pages * PAGE)
    # The temporary directory is beside its final place, so the relative path will hold there.
    way = os.path.relpath(os.path.realpath(base.directory), os.path.realpath(directory))
    ref = BaseRef(identity=base.identity, path=base.directory, relative=way)
    state = _hash(directory / STATE, check)
    return _describe(
        directory, Metadata.of(draft, kind="diff", state=state, memory=memory, base=ref)
    )


def _describe(directory: Path, metadata: Metadata) -> Metadata:
    with (directory / METADATA).open("xb") as file:
        file.write(metadata.to_bytes())
    return metadata


def _hash(path: Path, check: Check) -> FileRef:
    with reading(path) as fd:
        return hash_file(fd, check)


def _layer_refs(paths: tuple[Path, ...]) -> tuple[LayerRef, ...]:
    verifier = Verifier(trio.from_thread.check_cancelled)
    return tuple(verifier.layer(Path(os.path.abspath(path))) for path in paths)


def _never() -> None:
    """End nothing: this work is short."""
