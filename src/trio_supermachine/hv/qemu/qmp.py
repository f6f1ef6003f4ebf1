"""A client of QEMU's machine protocol (QMP).

:class:`QmpParser` turns bytes into messages without I/O; :class:`QmpClient` puts it on one end
of a socket pair. QEMU serves hostile guests, so what it sends is not trusted either: lines
are bounded, and what is not a QMP message ends the connection.
"""

from __future__ import annotations

import json
import socket
from array import array
from collections.abc import Callable, Mapping
from typing import Any, final

import attrs
import trio

from ...errors import SupermachineError

MAX_LINE = 1 << 20
_RECEIVE = 64 * 1024

Message = dict[str, Any]


class QmpError(SupermachineError):
    """Refusal of a command by QEMU; :attr:`kind` is QMP's error class."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command!r}: {description} ({kind})")
        self.command = command
        self.kind = kind
        self.description = description


class QmpProtocolError(SupermachineError):
    """Bytes that are not QMP, or go beyond its bounds."""


@final
class QmpParser:
    """Decoder of bytes into messages."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take received bytes; give the messages that they complete.

        :raises QmpProtocolError: a line is too long, or is not a JSON object.
        """
        searched = len(self._pending)
        self._pending += data
        messages = []
        while (end := self._pending.find(b"\n", searched)) >= 0:
            if end > self._max_line:
                break
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            searched = 0
            if line.strip():
                messages.append(_message(line))
        if len(self._pending) > self._max_line:
            raise QmpProtocolError(f"a line of more than {self._max_line} bytes")
        return messages


def _message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise QmpProtocolError(f"not JSON: {line[:80]!r}") from exc
    if not isinstance(message, dict):
        raise QmpProtocolError(f"not an object: {line[:80]!r}")
    return message


@attrs.define(eq=False)
class _Pending:
    command: str
    done: trio.Event = attrs.field(factory=trio.Event)
    answer: Message | None = None


@final
class QmpClient:
    """Commands and events on ``stream``, for as long as :meth:`run` runs.

    :param on_event: called with the name and data of each event, in order. It must not block.
    """

    def __init__(
        self, stream: trio.SocketStream, on_event: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._stream = stream
        self._on_event = on_event
        self._greeted = trio.Event()
        self._ended = False
        self._next_id = 0
        self._pending: dict[int, _Pending] = {}
        self._send_lock = trio.Lock()

    async def run(self) -> None:
        """Read until QEMU closes the connection; commands in flight then fail.

        :raises QmpProtocolError: QEMU sent something else.
        """
        parser = QmpParser()
        try:
            while data := await self._stream.receive_some(_RECEIVE):
                for message in parser.feed(data):
                    self._dispatch(message)
        except trio.BrokenResourceError:
            pass  # QEMU died with our bytes unread
        finally:
            self._ended = True
            self._greeted.set()
            for pending in self._pending.values():
                pending.done.set()

    async def negotiate(self) -> None:
        """Wait for the greeting and enter command mode. QEMU's devices exist by then.

        :raises trio.BrokenResourceError: QEMU ended before.
        """
        await self._greeted.wait()
        await self.execute("qmp_capabilities")

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """Run ``command`` and give its result.

        Cancelled, it stops waiting; QEMU still carries the command out.

        :param fd: a descriptor to hand over with it.
        :raises QmpError: QEMU refused.
        :raises trio.BrokenResourceError: the connection has ended.
        """
        number, self._next_id = self._next_id, self._next_id + 1
        request: Message = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = dict(arguments)
        pending = self._pending[number] = _Pending(command)
        try:
            if not self._ended:
                await self._send(request, fd)
                await pending.done.wait()
        finally:
            del self._pending[number]
        if pending.answer is None:
            raise trio.BrokenResourceError(f"QEMU has ended; {command!r} was not answered")
        return _result(command, pending.answer)

    async def _send(self, request: Message, fd: int | None) -> None:
        line = json.dumps(request).encode() + b"\n"
        async with self._send_lock:
            # Half a command would garble the next one: once begun, sending is not cancelled. That
            # cannot take long, as the socket's buffer holds hundreds of commands.
            with trio.CancelScope(shield=True):
                if fd is not None:  # the descriptor goes with the first byte
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))
                    try:
                        await self._stream.socket.sendmsg([line[:1]], [rights])
                    except OSError as exc:
                        raise trio.BrokenResourceError("QEMU has ended") from exc
                    line = line[1:]
                await self._stream.send_all(line)

    def _dispatch(self, message: Message) -> None:
        if "event" in message:
            data = message.get("data")
            self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
        elif "QMP" in message:
            self._greeted.set()
        elif isinstance(number := message.get("id"), int) and number in self._pending:
            pending = self._pending[number]
            pending.answer = message
            pending.done.set()


def _result(command: str, message: Message) -> Any:
    if "return" in message:
        return message["return"]
    error = message.get("error")
    if not isinstance(error, dict):
        error = {}
    kind, text = str(error.get("class", "unknown")), str(error.get("desc", "no reason given"))
    raise QmpError(command, kind, text)
