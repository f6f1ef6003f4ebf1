"""Questions to one name server, whose answers are parsed within bounds of time."""

from __future__ import annotations

import socket
import struct
from typing import Final

import dns.flags
import dns.message
import trio

#: Bytes of an answer in a datagram, as DNS Flag Day 2020 recommends.
MAX_DATAGRAM: Final = 1232
#: Bytes of any answer. The owner of a domain can fill 64 KiB with names of 127 labels, which
#: dnspython parses in half a minute. An answer within this bound and the next takes 1 s at most.
MAX_ANSWER: Final = 8192
#: Records of any answer.
MAX_RECORDS: Final = 128

_LENGTH: Final = struct.Struct("!H")
_HEADER: Final = struct.Struct("!HHHHHH")


async def ask(
    query: dns.message.Message, server: str, port: int, parsing: trio.CapacityLimiter
) -> dns.message.Message:
    """Ask over UDP, and over TCP if the answer does not fit. A cancel scope is the timeout.

    A datagram that does not answer ``query`` is ignored, since anybody may have sent it. Each
    record of the answer is a set of its own.

    :param parsing: limits the answers that are parsed at once, each in a thread.
    :raises OSError: the server cannot be reached.
    :raises ValueError: it says nonsense, or too much, on TCP.
    :raises trio.BrokenResourceError: it resets the connection.
    """
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    wire = query.to_wire()
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        await sock.connect((server, port))
        await sock.send(wire)
        while True:
            data = await sock.recv(MAX_DATAGRAM)
            if _is_truncated(data, query):
                break
            answer = await _read(data, query, parsing)
            if answer is not None:
                return answer
    with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
        await sock.connect((server, port))
        stream = trio.SocketStream(sock)
        await stream.send_all(_LENGTH.pack(len(wire)) + wire)
        (length,) = _LENGTH.unpack(await _receive_exactly(stream, _LENGTH.size))
        if length > MAX_ANSWER:
            raise ValueError(f"an answer of {length} bytes")
        answer = await _read(await _receive_exactly(stream, length), query, parsing)
        if answer is None:
            raise ValueError("what came is no answer")
        return answer


def _is_truncated(data: bytes, query: dns.message.Message) -> bool:
    if len(data) < _HEADER.size:
        return False
    number, flags, *_ = _HEADER.unpack_from(data)
    wanted = dns.flags.QR | dns.flags.TC
    return bool(number == query.id and flags & wanted == wanted)


async def _read(
    data: bytes, query: dns.message.Message, parsing: trio.CapacityLimiter
) -> dns.message.Message | None:
    if len(data) < _HEADER.size:
        return None
    number, _, _, *records = _HEADER.unpack_from(data)
    if number != query.id or sum(records) > MAX_RECORDS:
        return None

    def parse() -> dns.message.Message:
        # Sets of several records would have each compared with all others.
        return dns.message.from_wire(data, one_rr_per_rrset=True)

    try:
        message = await trio.to_thread.run_sync(parse, abandon_on_cancel=True, limiter=parsing)
    except Exception:  # whatever it is, it comes from these bytes
        return None
    return message if query.is_response(message) else None


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise ValueError("the answer breaks off")
        data += more
    return data
