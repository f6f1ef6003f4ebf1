"""The block device (virtio 1.2 §5.2): a file or block device of the host as a disk.

Data moves between the file and guest memory by ``preadv`` and ``pwritev``, without a copy in
between. The device reads at once what the page cache has. All other requests of a batch go to one
worker thread, so that a slow disk holds up nothing but itself. A batch is bounded in requests and
bytes, as a cancellation waits for it.

A hostile driver chooses every field of a request. Each is copied out of guest memory and checked
before it is used; the data itself goes to and from views that are inside guest memory.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar, Final, final

import attrs
import trio

from .diskfile import discard, read_all, write_all, write_zeroes
from .virtio import ID_BLOCK, Queue, VirtioDevice
from .virtqueue import Chain, QueueFault

SECTOR: Final = 512

F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

_QUEUE_SIZE: Final = 256
#: Segments of data that a chain may have, beside its header and its status.
_SEG_MAX: Final = _QUEUE_SIZE - 2
#: 2 GiB, as on QEMU: a discard is only a hint.
_MAX_DISCARD_SECTORS: Final = 0x3F_FFFF
#: 32 MiB, which the device itself writes on a file system without holes.
_MAX_ZERO_SECTORS: Final = 0x1_0000
#: Bytes of one read or write. Linux asks for 1280 KiB at most, unless its root says otherwise.
_MAX_TRANSFER: Final = 32 << 20
#: Bytes up to which a read may be done in the Trio thread.
_MAX_INLINE: Final = 1 << 20

# Requests of one batch, and bytes that a cancellation may have to wait for.
_TURN: Final = 64
_TURN_BYTES: Final = 32 << 20

_HEADER: Final = struct.Struct("<I4xQ")
_SEGMENT: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_ID_SIZE: Final = 20

# §5.2.4: capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
# max_write_zeroes_seg, write_zeroes_may_unmap.
_CONFIG: Final = struct.Struct("<QII4xI8xB1xHIIIIIB3x")


class RequestType(IntEnum):
    """Type of a request (§5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    """Status of a request that has ended (§5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


@attrs.define(eq=False)
class _Request:
    """A request whose fields were copied out of guest memory and checked."""

    chain: Chain
    status: memoryview
    kind: int = -1
    offset: int = 0
    size: int = 0
    data: Sequence[memoryview] = ()
    unmap: bool = False
    written: int = 0


@final
class BlkDevice(VirtioDevice):
    """A virtio-blk disk with one queue.

    A guest sees the disk that QEMU's virtio-blk would show, except that

    - there are no GEOMETRY, TOPOLOGY and CONFIG_WCE: the cache is write-back for a driver that can
      flush, and write-through for one that cannot;
    - a read-only disk has no DISCARD and WRITE_ZEROES;
    - one WRITE_ZEROES is of 32 MiB at most;
    - an incomplete last sector is no part of the disk.

    :param fd: the open disk, which the caller closes when :meth:`run` has ended for good. Its
        size is that of this moment.
    :param readonly: refuse requests that would change it.
    :param serial: the disk's serial number; 20 bytes of it count.
    :raises OSError: ``fd`` has no size.
    """

    device_id: ClassVar[int] = ID_BLOCK
    queue_sizes: tuple[int, ...] = (_QUEUE_SIZE,)

    def __init__(self, fd: int, *, readonly: bool, serial: str = "") -> None:
        self._fd = fd
        self._readonly = readonly
        self._serial = serial.encode()[:_ID_SIZE].ljust(_ID_SIZE, b"\0")
        self._sectors = os.lseek(fd, 0, os.SEEK_END) // SECTOR
        self._nowait = True
        self._limiter = trio.CapacityLimiter(1)
        self.features: int = F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        self.features |= F_RO if readonly else F_DISCARD | F_WRITE_ZEROES
        limits = (
            (0, 0, 0, 0, 0, 0)
            if readonly
            else (_MAX_DISCARD_SECTORS, 1, 1, _MAX_ZERO_SECTORS, 1, 1)
        )
        self._config = _CONFIG.pack(self._sectors, 0, _SEG_MAX, SECTOR, 1, 1, *limits)

    def read_config(self, offset: int, length: int) -> bytes:
        return self._config[offset : offset + length].ljust(length, b"\0")

    async def run(self, queues: Sequence[Queue]) -> None:
        """Serve requests until cancelled, and finish those that the worker thread has begun."""
        (queue,) = queues
        while True:
            await queue.wait()
            while True:
                slow: list[_Request] = []
                if not self._begin(queue, slow):
                    break
                queue.interrupt()
                if slow:
                    with trio.CancelScope(shield=True):
                        ended = await trio.to_thread.run_sync(
                            self._finish, slow, limiter=self._limiter
                        )
                    for request, status in zip(slow, ended, strict=True):
                        _end(queue, request, status)
                    queue.interrupt()
                await trio.lowlevel.checkpoint()

    # --- in the Trio thread ---

    def _begin(self, queue: Queue, slow: list[_Request]) -> bool:
        """Take a batch and tell whether there was one.

        Requests that can be are ended at once; the others go to ``slow``.
        """
        waiting = 0
        for count in range(_TURN):
            if waiting >= _TURN_BYTES or (chain := queue.pop()) is None:
                return count > 0
            if not chain.writable:
                raise QueueFault("a request with no place for its status")
            request = _Request(chain, chain.writable[-1][-1:])
            status = self._parse(request)
            if status is None and request.kind == RequestType.IN:
                status = self._read_cached(request)
            if status is None:
                slow.append(request)
                waiting += request.size
            else:
                _end(queue, request, status)
        return True

    def _parse(self, request: _Request) -> Status | None:
        """Fill the request in; give its status if that ends it."""
        header, data = _split(request.chain.readable, _HEADER.size)
        if len(header) < _HEADER.size:
            return Status.IOERR
        kind, sector = _HEADER.unpack(header)
        request.kind = kind
        match kind:
            case RequestType.IN:
                return self._parse_transfer(request, sector, _without_status(request.chain))
            case RequestType.OUT:
                if self._readonly:
                    return Status.IOERR
                return self._parse_transfer(request, sector, data)
            case RequestType.FLUSH:
                return Status.OK if self._readonly else None
            case RequestType.GET_ID:
                return self._get_id(request)
            case RequestType.DISCARD | RequestType.WRITE_ZEROES:
                return Status.IOERR if self._readonly else self._parse_segment(request, data)
            case _:
                return Status.UNSUPP

    def _parse_transfer(
        self, request: _Request, sector: int, data: Sequence[memoryview]
    ) -> Status | None:
        size = sum(map(len, data))
        if not 0 < size <= _MAX_TRANSFER or size % SECTOR:
            return Status.IOERR
        if sector + size // SECTOR > self._sectors:
            return Status.IOERR
        request.offset, request.size, request.data = sector * SECTOR, size, data
        return None

    def _parse_segment(self, request: _Request, data: Sequence[memoryview]) -> Status | None:
        raw, more = _split(data, _SEGMENT.size)
        if len(raw) < _SEGMENT.size or more:  # one segment is what the configuration allows
            return Status.IOERR
        sector, sectors, flags = _SEGMENT.unpack(raw)
        zeroes = request.kind == RequestType.WRITE_ZEROES
        if flags & ~(_UNMAP if zeroes else 0):
            return Status.UNSUPP
        if not 0 < sectors <= (_MAX_ZERO_SECTORS if zeroes else _MAX_DISCARD_SECTORS):
            return Status.IOERR
        if sector + sectors > self._sectors:
            return Status.IOERR
        request.offset, request.size = sector * SECTOR, sectors * SECTOR
        request.unmap = bool(flags & _UNMAP)
        return None

    def _get_id(self, request: _Request) -> Status:
        at = 0
        for view in _without_status(request.chain):
            part = self._serial[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        request.written = at
        return Status.OK if at else Status.IOERR

    def _read_cached(self, request: _Request) -> Status | None:
        """Read from the page cache; ``None`` if the disk has to be waited for."""
        if not self._nowait or request.size > _MAX_INLINE:
            return None
        try:
            got = os.preadv(self._fd, request.data, request.offset, os.RWF_NOWAIT)
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                self._nowait = False
            return None
        if got < request.size:
            return None
        request.written = got
        return Status.OK

    # --- in a worker thread ---

    def _finish(self, requests: Sequence[_Request]) -> list[Status]:
        return [self._do(request) for request in requests]

    def _do(self, request: _Request) -> Status:
        fd, offset, size = self._fd, request.offset, request.size
        try:
            match request.kind:
                case RequestType.IN:
                    read_all(fd, request.data, offset)
                    request.written = size
                    return Status.OK
                case RequestType.OUT:
                    write_all(fd, request.data, offset)
                case RequestType.DISCARD:
                    discard(fd, offset, size)
                    return Status.OK
                case RequestType.WRITE_ZEROES:
                    write_zeroes(fd, offset, size, unmap=request.unmap)
            if request.kind == RequestType.FLUSH or not self.driver_features & F_FLUSH:
                os.fdatasync(fd)
        except OSError:
            return Status.IOERR
        return Status.OK


def _end(queue: Queue, request: _Request, status: Status) -> None:
    request.status[0] = status
    queue.push(request.chain, request.written + 1)


def _split(views: Sequence[memoryview], size: int) -> tuple[bytes, Sequence[memoryview]]:
    """Copy the first ``size`` bytes, or all if there are fewer; give the rest, too."""
    if views and len(views[0]) == size:
        return bytes(views[0]), views[1:]
    head = b""
    for index, view in enumerate(views):
        missing = size - len(head)
        head += view[:missing]
        if missing < len(view):
            return head, [view[missing:], *views[index + 1 :]]
        if missing == len(view):
            return head, views[index + 1 :]
    return head, ()


def _without_status(chain: Chain) -> Sequence[memoryview]:
    """Give the part of a request that the device writes data to: all but the last byte."""
    *data, last = chain.writable
    if len(last) > 1:
        data.append(last[:-1])
    return data
