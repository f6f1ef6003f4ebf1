"""The calls of a VM that read and write the guest's files."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from ..agent import wire
from ..errors import FileTooLarge
from ..programs.request import StrOrBytesPath, check_mode, guest_path
from .running import RunningVm

#: The default of :meth:`Vm.read_file`, in bytes.
READ_FILE_CAP: Final = 32 << 20


class GuestFiles:
    """The calls of :class:`Vm` that read and write the guest's files."""

    _running: RunningVm

    async def write_file(
        self, path: StrOrBytesPath, data: bytes | bytearray | memoryview, *, mode: int = 0o644
    ) -> None:
        r"""Write a guest file atomically: a temporary sibling is renamed to ``path``.

        Cancelled or failed, it leaves the old file as it was.

        :param path: absolute, or relative to the image's working directory.
        :param data: the whole content.
        :param mode: the file's mode.
        :raises OSError: the guest's error, with its errno.
        :raises ValueError: ``mode`` is no mode, or the path is empty or holds NUL.
        :raises VmExited: the VM has ended.

        Example::

            await vm.write_file("/etc/motd", b"hello\n", mode=0o644)
        """
        if isinstance(data, str):
            raise TypeError("data must be bytes, not str: write text.encode()")
        with memoryview(data).cast("B") as view:
            if len(view) <= wire.MAX_DATA:
                check_mode(mode)
                await self._running.client.write_small(guest_path(path), mode, view)
                return
            async with self.open_write(path, mode=mode) as stream:
                await stream.send_all(view)

    async def read_file(self, path: StrOrBytesPath) -> bytes:
        """Read a guest file of up to 32 MiB. Cancelled, it leaves nothing open in the guest.

        :param path: absolute, or relative to the image's working directory.
        :raises FileTooLarge: it is larger.
        :raises OSError: the guest's error, such as :exc:`FileNotFoundError`.
        :raises ValueError: the path is empty or holds NUL.
        :raises VmExited: the VM has ended.

        Example::

            assert b"root" in await vm.read_file("/etc/passwd")
        """
        return await self.read_file_with_max_bytes(path, READ_FILE_CAP)

    async def read_file_with_max_bytes(self, path: StrOrBytesPath, max_bytes: int) -> bytes:
        """Read a guest file of up to ``max_bytes`` bytes; the guest enforces the bound.

        :param path: absolute, or relative to the image's working directory.
        :param max_bytes: the most bytes that it may have.
        :raises FileTooLarge: it is larger.
        :raises OSError: the guest's error.
        :raises ValueError: ``max_bytes`` is out of range, or the path is empty or holds NUL.
        :raises VmExited: the VM has ended.
        """
        if not 0 <= max_bytes < wire.NO_CAP:
            raise ValueError("max_bytes is out of range")
        path = guest_path(path)
        data = bytearray()
        async with await self._running.client.open_read(path, max_bytes) as stream:
            async for chunk in stream:
                data += chunk
                if len(data) > max_bytes:  # the guest is not trusted with the host's memory
                    raise FileTooLarge(os.fsdecode(path), max_bytes)
        return bytes(data)

    @asynccontextmanager
    async def open_read(self, path: StrOrBytesPath) -> AsyncIterator[trio.abc.ReceiveStream]:
        """Read a guest file of any size in constant memory: ``async with`` gives a stream.

        The block, however it is left, closes the file.

        :param path: absolute, or relative to the image's working directory.
        :raises OSError: the guest's error, on entry.
        :raises ValueError: on entry: the path is empty or holds NUL.
        :raises VmExited: the VM has ended, on entry or while receiving.

        Example::

            async with vm.open_read("/etc/passwd") as stream:
                async for chunk in stream:
                    print(len(chunk))
        """
        async with await self._running.client.open_read(guest_path(path)) as stream:
            yield stream

    @asynccontextmanager
    async def open_write(
        self, path: StrOrBytesPath, *, mode: int = 0o644
    ) -> AsyncIterator[trio.abc.SendStream]:
        """Write a guest file of any size in constant memory: ``async with`` gives a stream.

        The file is renamed to ``path`` when the block ends well, and discarded when it does not,
        as when it is cancelled.

        :param path: absolute, or relative to the image's working directory.
        :param mode: the file's mode.
        :raises OSError: the guest's error: on entry, while sending, or at the end.
        :raises ValueError: on entry: ``mode`` is no mode, or the path is empty or holds NUL.
        :raises VmExited: the VM has ended.

        Example::

            async with vm.open_write("/tmp/large") as stream:
                for _ in range(16):
                    await stream.send_all(bytes(65536))
        """
        check_mode(mode)
        async with await self._running.client.open_write(guest_path(path), mode) as stream:
            yield stream
            await stream.publish()
