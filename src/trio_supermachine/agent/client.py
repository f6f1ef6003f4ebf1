"""The host's side of the agent protocol: the lifeline, one-shot calls, and file streams.

The *lifeline* is the connection that ties a guest to its host. :class:`AgentClient` listens for it
before the machine runs, so that the guest, which dials as soon as it has booted or goes on as a
copy, finds it. One greeting (:mod:`.greeting`) makes the guest what it is to be, and from then on
neither side says anything on it. The host's end is closed with the client: a guest that can still
do anything then powers off, whatever else goes wrong. A client takes one lifeline and then stops
listening. A guest that comes a second time, as no sane one does, is refused.

Everything else is a connection of its own to the agent's port, and its first frame says what for.
The request travels with the vsock REQUEST itself, so that a call costs one round trip, and the host
never waits for the agent to accept. An agent that refuses shows as a connection that ends early.

While a VM is paused, requests are *held*: :meth:`AgentClient.ask` waits before it sends anything,
so that a call that is given up before the resume does nothing in the guest. Nothing else is held:
CONNECT, and what is sent on connections that are open, waits in the machine. At a machine's end
held requests are released, and fail.

A broken connection means either that the machine has ended, or that this one call has failed. The
two arrive in any order, so :meth:`AgentClient.failure` waits up to 1 s for the machine's end, and
gives :exc:`VmExited` or else :exc:`ExecEof`. What a guest answers is checked frame by frame: one
that does not fit is a broken connection, too, and an ERROR becomes the :exc:`OSError` of its errno.
"""

from __future__ import annotations

import contextlib
import errno as errno_names
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar, final

import attrs
import trio

from .._util.run import require_trio
from ..errors import ExecEof, FileTooLarge, NotSupported, VmExited
from ..hv.base import Machine, MachineExit
from ..vsock.stream import VsockStream
from . import wire
from .greeting import Hello, HelloKind, Restore, Setup
from .wire import Frame, FrameType, GuestError, Protocol, WireError

_RECEIVE: Final = 65536
T = TypeVar("T")

_A_CALL: Final = "a call to the guest's agent"
_EXIT_GRACE: Final = 1.0  # seconds to learn that a broken connection was the machine's end


@attrs.define
class FrameStream:
    """Frames over one connection to the agent.

    :ivar exactly: take nothing of what follows a frame, and give DATA in whole frames.
    """

    stream: VsockStream
    exactly: bool = False
    _decoder: wire.FrameDecoder = attrs.field(
        default=attrs.Factory(
            lambda self: wire.FrameDecoder(datagrams=self.exactly), takes_self=True
        ),
        init=False,
    )

    async def send(self, data: bytes) -> None:
        """Send frames."""
        await self.stream.send_all(data)

    def leave(self, *, complete: bool) -> None:
        """Close the connection, by a reset unless it is complete.

        :param complete: the guest has said all, and closes too.
        """
        if complete:
            self.stream.leave()
        else:
            self.stream.abort()

    async def receive(self) -> Frame | None:
        """Wait for the next frame; ``None`` is the end. A cancellation loses nothing.

        :raises WireError: the guest broke the protocol, or the connection ends within a frame.
        """
        while True:
            for frame in self._decoder.frames():
                return frame
            size = self._decoder.wanted if self.exactly else _RECEIVE
            data = await self.stream.receive_some(size)
            if not data:
                if self._decoder.partial:
                    raise WireError("connection ended within a frame")
                return None
            self._decoder.feed(data)


@final
class AgentClient:
    """The host's side of the agent protocol for one :class:`~.hv.base.Machine`.

    It listens for the lifeline from the moment that it is made; :meth:`aclose` ends it.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lifeline_listener = machine.listen(wire.LIFELINE_PORT)
        self._lifeline: FrameStream | None = None
        self._held: trio.Event | None = None

    @property
    def machine(self) -> Machine:
        """The machine whose guest it talks to."""
        return self._machine

    async def aclose(self) -> None:
        """Close the lifeline, upon which the guest powers off, if it still can."""
        await trio.aclose_forcefully(self._lifeline_listener)
        if self._lifeline is not None:
            await trio.aclose_forcefully(self._lifeline.stream)

    async def set_up(self, setup: Setup) -> Hello:
        """Wait until the guest has booted, tell it what to be, and wait until it is that.

        :raises VmExited: the machine ended first.
        :raises OSError: the guest could not do something; the message says what.
        """
        return await self._greeted(
            HelloKind.BOOT,
            (wire.VERSION,),
            lambda realtime_ns, _: setup.encode(realtime_ns),
            "setting up the guest",
        )

    async def restored(self, restore: Restore) -> Hello:
        """Wait until the restored guest dials, tell it what to be, and wait until it is that.

        None of its programs runs before.

        :raises VmExited: the machine ended first.
        :raises OSError: the guest could not do something; the message says what.
        """

        def encode(realtime_ns: int, version: int) -> bytes:
            if restore.ends_programs and version < wire.VERSION:
                message = (
                    "the snapshot's guest is of an older version, which cannot leave its workload"
                    " out; bake the image or take the snapshot again"
                )
                raise NotSupported("workload=False", message)
            return restore.encode(realtime_ns, version)

        versions = (*wire.OLDER_VERSIONS, wire.VERSION)
        what = "waking the restored guest"
        return await self._greeted(HelloKind.RESTORE, versions, encode, what)

    async def _greeted(
        self,
        kind: HelloKind,
        versions: Sequence[int],
        encode: Callable[[int, int], bytes],
        what: str,
    ) -> Hello:
        try:
            stream = await self._lifeline_listener.accept()
            await self._lifeline_listener.aclose()
            self._lifeline = FrameStream(stream)
            frame = await self._expect(self._lifeline, FrameType.HELLO)
            hello = Hello.decode(frame.payload)
            if hello.version not in versions:
                raise WireError(f"the guest speaks version {hello.version}, not {wire.VERSION}")
            if hello.kind != kind:
                raise WireError(f"a greeting for {hello.kind.name}, not for {kind.name}")
            await self._lifeline.send(encode(time.time_ns(), hello.version))
            await self._expect(self._lifeline, FrameType.READY)
        except (trio.BrokenResourceError, trio.ClosedResourceError, WireError) as exc:
            await self.raise_failure(exc, what)
        return hello

    async def dial(self) -> VsockStream:
        """Connect to the agent, and say nothing. Not held while requests are."""
        return await self._machine.dial(wire.AGENT_PORT)

    async def ask(self, request: bytes) -> VsockStream:
        """Connect to the agent, and send ``request`` along.

        Wait while requests are held, but not for the guest: a refusal is the stream's early end.
        """
        require_trio()
        while self._held is not None:
            await self._held.wait()
        return await self._machine.dial(wire.AGENT_PORT, request)

    @property
    def holding(self) -> bool:
        """Whether requests are held."""
        return self._held is not None

    def hold(self) -> None:
        """Hold requests until :meth:`release`. Idempotent."""
        if self._held is None:
            self._held = trio.Event()

    def release(self) -> None:
        """Let held requests go. Idempotent."""
        if self._held is not None:
            self._held.set()
            self._held = None

    async def call(self, request: bytes, *, path: str | bytes | None = None) -> Frame:
        """Make a one-shot request and give its answer.

        :raises OSError: the guest's answer was an error; its ``filename`` is ``path``.
        :raises VmExited: the machine is gone.
        """
        try:
            connection = FrameStream(await self.ask(request))
            frame: Frame | None = None
            try:
                frame = await connection.receive()
            finally:
                connection.leave(complete=frame is not None)
            refused = frame is not None and frame.type == FrameType.ERROR
            error = GuestError.decode(frame.payload) if frame is not None and refused else None
        except (trio.BrokenResourceError, WireError) as exc:
            await self.raise_failure(exc, _A_CALL)
        if frame is None:
            await self.raise_failure(None, _A_CALL)
        if error is not None:
            raise guest_os_error(error, path)
        return frame

    async def call_for(self, request: bytes, read: Callable[[bytes], T]) -> T:
        """Make a one-shot request, and read a value from the payload of its answer.

        Errors are those of :meth:`call`.

        :raises ExecEof: the payload is none that ``read`` understands.
        """
        answer = await self.call(request)
        try:
            return read(answer.payload)
        except WireError as exc:
            await self.raise_failure(exc, _A_CALL)

    async def connect(self, port: int = 0) -> tuple[VsockStream, int]:
        """Connect to a TCP port in the guest, and give the stream and the port.

        The stream ends as :meth:`~.VsockStream.end_like_tcp` says. Cancelled, nothing is left of
        it.

        :param port: the port; 0 is the one that was listened on first.
        :raises ConnectionRefusedError: nothing listens there, or the guest has no room.
        :raises VmExited: the machine is gone.
        """
        connection, port = await self._connect(Protocol.TCP, port)
        return connection.stream, port

    async def connect_udp(self, port: int) -> FrameStream:
        """Connect to a UDP port in the guest. Each DATA frame is a datagram from here on.

        :raises ConnectionRefusedError: no socket is bound there, or the guest has no room.
        :raises VmExited: the machine is gone.
        """
        connection, _ = await self._connect(Protocol.UDP, port)
        return connection

    async def _connect(self, protocol: Protocol, port: int) -> tuple[FrameStream, int]:
        request = wire.connect(protocol, port)
        what = f"connecting to port {port} of the guest"
        try:
            stream = await self.dial()
        except trio.BrokenResourceError as exc:
            await self.raise_failure(exc, what)
        connection = FrameStream(stream, exactly=True)
        try:
            if protocol is Protocol.TCP:
                stream.end_like_tcp()
            if stream.sendable():  # else the guest has gone: receiving tells
                stream.send_nowait(request)
            try:
                answer = await self._expect(connection, FrameType.OK)
                return connection, wire.decode_u64(answer.payload) & 0xFFFF
            except (trio.BrokenResourceError, WireError) as exc:
                await self.raise_failure(exc, what)
        except BaseException:
            connection.leave(complete=False)
            raise

    async def _expect(self, connection: FrameStream, type_: FrameType) -> Frame:
        frame = await connection.receive()
        if frame is None:
            raise WireError("connection ended")
        if frame.type == FrameType.ERROR:
            raise guest_os_error(GuestError.decode(frame.payload), None)
        if frame.type != type_:
            raise WireError(f"frame {frame.type} instead of {type_.name}")
        return frame

    async def failure(
        self, cause: Exception | None, what: str, *, setup: bool = False
    ) -> Exception:
        """Find out what a broken connection means: the end of the machine, or of ``what`` alone.

        :param cause: how it broke, if that is known.
        :param what: the call, for people.
        :param setup: nothing had been started in the guest yet.
        """
        if isinstance(cause, VmExited):
            return cause
        with trio.move_on_after(_EXIT_GRACE):
            return exited(await self._machine.wait_exit(), self._machine)
        reason = f"{what} failed: " + (str(cause) if cause else "the connection ended early")
        return ExecEof(reason, is_setup_failure=setup)

    async def raise_failure(self, cause: Exception | None, what: str) -> NoReturn:
        """Raise what :meth:`failure` gives."""
        raise await self.failure(cause, what) from cause

    async def open_read(self, path: str | bytes, max_bytes: int = wire.NO_CAP) -> FileReceiveStream:
        """Open a guest file for reading.

        :raises OSError: with the guest's errno.
        :raises FileTooLarge: it is larger than ``max_bytes``.
        """
        connection, answer = await self._open_file(wire.read_file(path, max_bytes), path, max_bytes)
        return FileReceiveStream(self, connection, path, max_bytes, wire.decode_u64(answer.payload))

    async def open_write(self, path: str | bytes, mode: int) -> FileSendStream:
        """Open a temporary sibling of a guest file, for :meth:`FileSendStream.publish` to rename.

        :raises OSError: with the guest's errno.
        """
        connection, _ = await self._open_file(wire.write_file(path, mode), path)
        return FileSendStream(self, connection, path)

    async def write_small(self, path: str | bytes, mode: int, data: bytes | memoryview) -> None:
        """Write a guest file of up to :data:`.wire.MAX_DATA` bytes, in one round trip.

        It is renamed into place, as by :meth:`open_write` and :meth:`FileSendStream.publish`.

        :raises OSError: with the guest's errno.
        """
        request = b"".join(
            (
                wire.write_file(path, mode),
                *wire.data_frames(wire.StreamId.FILE, data),
                wire.end(wire.StreamId.FILE),
            )
        )
        connection, _ = await self._open_file(request, path)
        published = False
        try:
            await self.file_answer(connection, path)
            published = True
        except (trio.BrokenResourceError, WireError) as exc:
            await self.raise_failure(exc, f"writing {os.fsdecode(path)}")
        finally:
            connection.leave(complete=published)

    async def _open_file(
        self, request: bytes, path: str | bytes, max_bytes: int = 0
    ) -> tuple[FrameStream, Frame]:
        connection: FrameStream | None = None
        try:
            try:
                connection = FrameStream(await self.ask(request))
                return connection, await self.file_answer(connection, path, max_bytes)
            except (trio.BrokenResourceError, WireError) as exc:
                await self.raise_failure(exc, f"opening {os.fsdecode(path)}")
        except BaseException:
            if connection is not None:
                connection.leave(complete=False)
            raise

    async def file_answer(
        self, connection: FrameStream, path: str | bytes, max_bytes: int = 0
    ) -> Frame:
        """Wait for the guest's OK on a file connection. :raises OSError: it was an ERROR."""
        frame = await connection.receive()
        if frame is not None and frame.type == FrameType.ERROR:
            raise file_error(GuestError.decode(frame.payload), path, max_bytes)
        if frame is None or frame.type != FrameType.OK:
            raise WireError("no answer" if frame is None else f"unexpected frame {frame.type}")
        return frame


@final
class FileReceiveStream(trio.abc.ReceiveStream):
    """The content of a guest file; :meth:`AgentClient.open_read` makes it.

    :ivar size: its bytes by ``stat`` as it was opened; a file that grows gives more.
    """

    def __init__(
        self,
        client: AgentClient,
        connection: FrameStream,
        path: str | bytes,
        max_bytes: int,
        size: int,
    ) -> None:
        self._client = client
        self._connection = connection
        self._path = path
        self._max_bytes = max_bytes
        self._rest = b""
        self._ended = False
        self.size = size

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be >= 1")
        if self._rest or self._ended:
            await trio.lowlevel.checkpoint()
        else:
            self._rest = await self._next_chunk()
        chunk = self._rest if max_bytes is None else self._rest[:max_bytes]
        self._rest = self._rest[len(chunk) :]
        return chunk

    async def _next_chunk(self) -> bytes:
        try:
            while (frame := await self._connection.receive()) is not None:
                if frame.type == FrameType.ERROR:
                    error = GuestError.decode(frame.payload)
                    raise file_error(error, self._path, self._max_bytes)
                if frame.type == FrameType.END:
                    self._ended = True
                    return b""
                if frame.type != FrameType.DATA:
                    raise WireError(f"unexpected frame {frame.type}")
                if frame.payload:
                    return frame.payload
            raise WireError("the connection ended early")
        except (trio.BrokenResourceError, WireError) as exc:
            await self._client.raise_failure(exc, f"reading {os.fsdecode(self._path)}")

    async def aclose(self) -> None:
        self._connection.leave(complete=self._ended)
        await trio.lowlevel.checkpoint()


@final
class FileSendStream(trio.abc.SendStream):
    """The new content of a guest file; :meth:`AgentClient.open_write` makes it.

    :meth:`publish` renames it into place; :meth:`aclose` without that discards it.
    """

    def __init__(self, client: AgentClient, connection: FrameStream, path: str | bytes) -> None:
        self._client = client
        self._connection = connection
        self._path = path

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not data:
            await self._connection.stream.wait_send_all_might_not_block()
        try:
            for frame in wire.data_frames(wire.StreamId.FILE, data):
                await self._connection.send(frame)
        except trio.BrokenResourceError as exc:
            await self._raise_guest_error(exc)

    async def wait_send_all_might_not_block(self) -> None:
        await self._connection.stream.wait_send_all_might_not_block()

    async def publish(self) -> None:
        """Rename the file into place and close the stream. :raises OSError: it could not be."""
        try:
            await self._connection.send(wire.end(wire.StreamId.FILE))
            await self._client.file_answer(self._connection, self._path)
        except (trio.BrokenResourceError, WireError) as exc:
            await self._raise_guest_error(exc)
        self._connection.leave(complete=True)

    async def _raise_guest_error(self, cause: Exception) -> NoReturn:
        # A guest that cannot write (its disk is full) says why before it closes.
        with contextlib.suppress(trio.BrokenResourceError, WireError):
            await self._client.file_answer(self._connection, self._path)
        await self._client.raise_failure(cause, f"writing {os.fsdecode(self._path)}")

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._connection.stream)


def guest_os_error(error: GuestError, path: str | bytes | None) -> OSError:
    """Make an :class:`OSError` of a guest's ERROR, of the subclass that belongs to its errno."""
    errno = error.errno or errno_names.EIO
    message = error.message or os.strerror(errno)
    if path is not None:
        # The guest names what failed, as the error itself will: cut to 300 bytes, and made absolute
        # if it is a working directory.
        name, _, reason = message.rpartition(": ")
        given = os.fsencode(path)[:300].decode("utf-8", "surrogateescape")
        if name and (name == given or name.endswith(f"/{given}")):
            message = reason
    return OSError(errno, message, path)


def file_error(error: GuestError, path: str | bytes, max_bytes: int) -> Exception:
    """Make an exception of the ERROR of a file call, where ``EFBIG`` means the cap, if any."""
    if error.errno == errno_names.EFBIG and max_bytes:
        return FileTooLarge(os.fsdecode(path), max_bytes, error.value or None)
    return guest_os_error(error, path)


def exited(exit_: MachineExit, machine: Machine) -> VmExited:
    """Make an exception of a machine's end."""
    return VmExited(exit_.reason, exit_.detail, console=machine.console.text_tail())
