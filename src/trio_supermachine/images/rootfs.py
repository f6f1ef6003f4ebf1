"""A directory of the host as an image's only layer."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import trio

from ..oci import MalformedError, tar
from ..oci.layer import MAX_ENTRIES, Sink, sanitise
from ..oci.layer_info import DirectoryInfo
from ..oci.tar import Entry

_CHUNK = 1 << 18
_TYPES = {
    stat.S_IFREG: tar.FILE,
    stat.S_IFDIR: tar.DIRECTORY,
    stat.S_IFLNK: tar.SYMLINK,
    stat.S_IFCHR: tar.CHAR,
    stat.S_IFBLK: tar.BLOCKDEV,
    stat.S_IFIFO: tar.FIFO,
}


class HostTree:
    """The tree below a directory, with the file systems that are mounted in it.

    Sockets are left out. The methods run in worker threads of Trio's.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """Compute a digest of the tree: names, and the facts of ``lstat`` with its time stamps."""
        digest = hashlib.sha256(b"1")
        for path, status in self._walk():
            fields = (
                status.st_dev,
                status.st_ino,
                status.st_mode,
                status.st_nlink,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                # The size of a directory depends on its file system.
                0 if stat.S_ISDIR(status.st_mode) else status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
            )
            digest.update(b"%d %b %b" % (len(path), path, repr(fields).encode()))
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def write(self, sink: Sink) -> None:
        """Write the tree as a tar stream, after :meth:`fingerprint`.

        :raises MalformedError: the tree has changed since.
        """
        known = self._fingerprint
        links: dict[tuple[int, int], bytes] = {}
        for path, status in self._walk():
            entry = self._entry(path, status)
            if not path:
                sink.begin(DirectoryInfo(entry.mode, entry.uid, entry.gid, entry.mtime))
                continue
            identity = (status.st_dev, status.st_ino)
            if entry.type != tar.DIRECTORY and status.st_nlink > 1:
                if (first := links.get(identity)) is not None:
                    sink.write(tar.header(Entry(path, tar.LINK, entry.mode, linkname=first)))
                    continue
                links[identity] = path
            sink.write(tar.header(entry))
            if entry.type == tar.FILE:
                self._copy(path, entry.size, sink)
        sink.write(bytes(2 * tar.BLOCK))
        if self.fingerprint() != known:
            raise MalformedError("the directory changed while it was read")

    def _walk(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """Walk over paths relative to the root, which is empty; directories come before content."""
        stack = [b""]
        count = 0
        while stack:
            trio.from_thread.check_cancelled()
            path = stack.pop()
            status = os.lstat(os.path.join(self._root, path) if path else self._root + b"/")
            if stat.S_IFMT(status.st_mode) not in _TYPES:
                continue
            count += 1
            if count > MAX_ENTRIES:
                raise MalformedError(f"the directory has more than {MAX_ENTRIES} entries")
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                names = sorted(os.listdir(os.path.join(self._root, path)), reverse=True)
                stack.extend(os.path.join(path, name) for name in names)

    def _entry(self, path: bytes, status: os.stat_result) -> Entry:
        place = os.path.join(self._root, path)
        type_ = _TYPES[stat.S_IFMT(status.st_mode)]
        entry = Entry(
            path,
            type_,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_size if type_ == tar.FILE else 0,
            int(status.st_mtime),
            os.readlink(place) if type_ == tar.SYMLINK else b"",
            (os.major(status.st_rdev), os.minor(status.st_rdev)),
            _xattrs(place),
        )
        sanitise(entry)
        return entry

    def _copy(self, path: bytes, size: int, sink: Sink) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        left = size
        with os.fdopen(os.open(os.path.join(self._root, path), flags), "rb", buffering=0) as file:
            while left:
                trio.from_thread.check_cancelled()
                data = file.read(min(left, _CHUNK))
                if not data:
                    raise MalformedError("the directory changed while it was read")
                left -= len(data)
                sink.write(data)
        sink.write(bytes(-size % tar.BLOCK))


def _xattrs(place: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(place, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        raise
    # squashfs has no room for others, such as access control lists (system.*).
    return {
        os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
        for name in names
        if name.startswith(("user.", "trusted.", "security."))
    }
