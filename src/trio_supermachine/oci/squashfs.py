"""Conversion of layer blobs to squashfs files, by ``sqfstar``, without privileges.

All work is in a worker thread of Trio's: it reads and decompresses the blob, filters its tar
stream (:mod:`.layer`) and writes that to the pipe of ``sqfstar``. The thread asks before each chunk
whether its task is cancelled, and kills the tool if so. ``sqfstar`` reads headers that this package
wrote, not those of the blob.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import attrs
import trio

from ..errors import AssetNotFound, DiskFull, SupermachineError
from . import MalformedError
from .decompress import Blob, open_layer
from .layer import Conflict, LayerFilter, Sink
from .layer_info import DirectoryInfo, LayerInfo, Resolve
from .tar import TarReader

_PIPE = 1 << 20
_STDERR_TAIL = 2000
#: LZ4 decompresses fastest by far where instructions are emulated. A fixed creation time makes the
#: file a function of its input. Inodes are not compressed, so that the root's can be mended.
_OPTIONS = ("-comp", "lz4", "-noI", "-mkfs-time", "0", "-no-progress", "-quiet", "-exit-on-error")


@attrs.frozen
class Converted:
    """The result of a conversion."""

    blob_digest: str
    diff_id: str
    info: LayerInfo


async def convert(blob: Blob, dest: Path, *, limit: int, resolve: Resolve) -> Converted:
    """Write the layer in ``blob`` to ``dest`` as squashfs. The caller compares the digests.

    Cancellation kills the tool and waits for its end. Then, and after an error, ``dest`` is of no
    use.

    :param limit: the most bytes of the layer, before and after the expansion of holes.
    :param resolve: as for :class:`~.layer.LayerFilter`.
    :raises MalformedError: the layer is damaged, or tries to leave its root.
    :raises AssetNotFound: ``sqfstar`` is not installed.
    :raises DiskFull: there is no room for the file.
    """
    tool = find_tool("sqfstar")
    return await trio.to_thread.run_sync(_convert, tool, blob, dest, limit, resolve)


async def write_squashfs(dest: Path, write: Callable[[Sink], None]) -> None:
    """Write to ``dest`` a squashfs of the tar stream that ``write`` writes, in a worker thread.

    Cancellation and errors are those of :func:`convert`.
    """
    tool = find_tool("sqfstar")

    def work() -> None:
        with SqfsTar(tool, dest) as sink:
            write(sink)
            sink.finish()

    await trio.to_thread.run_sync(work)


def find_tool(name: str) -> str:
    """Find a program of squashfs-tools.

    :raises AssetNotFound: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise AssetNotFound(
            name,
            "the program is not installed (it is in squashfs-tools 4.5 or newer)",
            remedy="apt-get install squashfs-tools",
        )
    return found


def _convert(tool: str, blob: Blob, dest: Path, limit: int, resolve: Resolve) -> Converted:
    check = trio.from_thread.check_cancelled
    filter_ = LayerFilter(limit, resolve)
    with open_layer(blob, limit, check) as (stored, layer), SqfsTar(tool, dest) as sink:
        try:
            filter_.first_pass(TarReader(layer), sink)
            again = False
        except Conflict:
            again = True
        # The digests are those of the whole stream, also of what is behind the archive's end.
        diff_id = layer.digest()
        digest = stored.digest()
        if not again:
            sink.finish()
    if again:
        with open_layer(blob, limit, check) as (stored, layer), SqfsTar(tool, dest) as sink:
            filter_.second_pass(TarReader(layer), sink)
            if (layer.digest(), stored.digest()) != (diff_id, digest):
                raise MalformedError("the layer changed while it was read")
            sink.finish()
    return Converted(digest, diff_id, filter_.info())


class SqfsTar(Sink):
    """A running ``sqfstar``, in a worker thread of Trio's.

    Leaving the block without :meth:`finish` kills it.
    """

    def __init__(self, tool: str, dest: Path) -> None:
        self._tool = tool
        self._dest = dest
        self._root_time = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (__exit__ closes it)

    def __enter__(self) -> SqfsTar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            try:
                self._pipe.close()
            except BrokenPipeError:
                pass
        self._stderr.close()

    def begin(self, root: DirectoryInfo) -> None:
        self._dest.unlink(missing_ok=True)
        self._root_time = root.mtime
        options = [
            *_OPTIONS,
            *("-root-mode", f"{root.mode:o}", "-root-time", str(root.mtime)),
            *("-root-uid", str(root.uid), "-root-gid", str(root.gid)),
        ]
        self._process = subprocess.Popen(
            [self._tool, *options, os.fspath(self._dest)],
            stdin=subprocess.PIPE,
            stdout=self._stderr,
            stderr=self._stderr,
            bufsize=_PIPE,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
        self._pipe = self._process.stdin
        assert self._pipe is not None
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            try:
                fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE)
            except PermissionError:
                pass  # the user's pipes hold too much already; a smaller pipe will do

    def write(self, data: bytes | memoryview) -> None:
        assert self._pipe is not None
        try:
            self._pipe.write(data)
        except BrokenPipeError:
            raise self._failure() from None

    def finish(self) -> None:
        """Close the stream and wait for the file to be complete."""
        assert self._process is not None
        assert self._pipe is not None
        try:
            self._pipe.close()
        except BrokenPipeError:
            raise self._failure() from None
        trio.from_thread.run(_wait, self._process)
        if self._process.returncode:
            raise self._failure()
        _set_root_time(self._dest, self._root_time)

    def _failure(self) -> SupermachineError:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_TAIL))
        said = self._stderr.read().decode("utf-8", "replace").strip()
        said = said or "no reason given"
        if any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT)):
            return DiskFull(os.fspath(self._dest))
        return SupermachineError(f"sqfstar could not write {self._dest}: {said}")


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process, cancellably."""
    await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)


_SUPERBLOCK = struct.Struct("<32xQ24xQ24x")  # the root's inode, and where inodes begin
_METADATA_BLOCK = 8192
_STORED = 0x8000  # in a metadata block's header: it is not compressed
_MTIME = 8  # the offset in an inode


def _set_root_time(path: Path, mtime: int) -> None:
    """Set the time of the root: ``sqfstar`` 4.5 ignores ``-root-time``, and writes the present."""
    with path.open("r+b") as file:
        root, table = _SUPERBLOCK.unpack(file.read(_SUPERBLOCK.size))
        block, offset = table + (root >> 16), (root & 0xFFFF) + _MTIME
        for byte in struct.pack("<I", mtime):  # the inode may go on in the next block
            file.seek(block)
            (header,) = struct.unpack("<H", file.read(2))
            if offset >= _METADATA_BLOCK:
                offset -= _METADATA_BLOCK
                block += 2 + (header & ~_STORED)
                file.seek(block)
                (header,) = struct.unpack("<H", file.read(2))
            if not header & _STORED:
                raise SupermachineError(f"sqfstar compressed the inodes of {path}")
            file.seek(block + 2 + offset)
            file.write(bytes([byte]))
            offset += 1
