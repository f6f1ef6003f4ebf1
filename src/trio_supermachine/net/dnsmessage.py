"""Questions of a guest and answers to it, as DNS messages (RFC 1035); without I/O.

The parser and the builder are dnspython's. Bytes of a guest go through :func:`read` alone, which
bounds them before it parses them, and gives a question, a refusal, or nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

import attrs
import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset
from dns.rcode import Rcode

from .addresses import Address, unmapped
from .policy import is_host_name

#: Bytes of a query. No sensible one is longer, and the bound keeps parsing short.
MAX_QUERY: Final = 1232
#: The largest answer in a datagram, as DNS Flag Day 2020 recommends, and without EDNS.
MAX_DATAGRAM: Final = 1232
_MIN_DATAGRAM: Final = 512
MAX_MESSAGE: Final = 65535

IN: Final = dns.rdataclass.IN
A: Final = dns.rdatatype.A
AAAA: Final = dns.rdatatype.AAAA
PTR: Final = dns.rdatatype.PTR

_HEADER: Final = struct.Struct("!HHHHHH")
_REPLY: Final = 0x8000
_OPCODE: Final = 0x7800
_OPCODE_AND_RD: Final = 0x7900
_MAX_ADDITIONAL: Final = 2  # EDNS, and a signature


@attrs.frozen
class Question:
    """A question of a guest.

    :ivar text: the name in lower case without a dot at its end; ``None`` if no host can have it.
    """

    message: dns.message.Message
    name: dns.name.Name
    kind: dns.rdatatype.RdataType
    text: str | None

    @property
    def reverse(self) -> Address | None:
        """The address whose name is asked for, if one is."""
        if self.kind != PTR:
            return None
        try:
            return unmapped(ip_address(dns.reversename.to_address(self.name)))
        except (dns.exception.DNSException, ValueError):
            return None


def read(wire: bytes) -> Question | bytes | None:
    """Read a query. If it is no question, return bytes to refuse it, or ``None`` to ignore it."""
    if len(wire) < _HEADER.size or _HEADER.unpack_from(wire)[1] & _REPLY:
        return None
    _, flags, questions, *others, additional = _HEADER.unpack_from(wire)
    if len(wire) > MAX_QUERY:
        return _refusal(wire, dns.rcode.FORMERR)
    if flags & _OPCODE:
        return _refusal(wire, dns.rcode.NOTIMP)
    # A few dozen records with long names would take a third of a second to parse.
    if questions != 1 or any(others) or additional > _MAX_ADDITIONAL:
        return _refusal(wire, dns.rcode.FORMERR)
    try:
        message = dns.message.from_wire(wire)
    except Exception:  # whatever it is, it comes from these bytes
        return _refusal(wire, dns.rcode.FORMERR)
    if len(message.question) != 1 or message.edns > 0:
        return _refusal(wire, dns.rcode.FORMERR)
    asked = message.question[0]
    if asked.rdclass != IN or dns.rdatatype.is_metatype(asked.rdtype):
        return _refusal(wire, dns.rcode.REFUSED)
    return Question(message, asked.name, asked.rdtype, _host_text(asked.name))


def _refusal(wire: bytes, rcode: Rcode) -> bytes:
    number, flags, *_ = _HEADER.unpack_from(wire)
    return _HEADER.pack(number, _REPLY | (flags & _OPCODE_AND_RD) | rcode, 0, 0, 0, 0)


def _host_text(name: dns.name.Name) -> str | None:
    # A label may hold any byte, even a dot, so each is looked at by itself.
    if not name.is_absolute() or any(b"." in label for label in name.labels):
        return None
    try:
        text = b".".join(name.labels[:-1]).decode("ascii").lower()
    except UnicodeDecodeError:
        return None
    return text if is_host_name(text) else None


def reply(
    question: Question, rcode: Rcode = dns.rcode.NOERROR, why: str = ""
) -> dns.message.Message:
    """Make an answer without records.

    :param why: the text of an extended error (RFC 8914), which clients with EDNS get.
    """
    message = dns.message.make_response(
        question.message, recursion_available=True, our_payload=MAX_DATAGRAM
    )
    message.set_rcode(rcode)
    if why and question.message.edns >= 0:
        option = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, why)
        message.use_edns(0, 0, MAX_DATAGRAM, options=[option])
    return message


def add_records(message: dns.message.Message, values: Iterable[object], ttl: int) -> None:
    """Add records of the type that was asked for to an answer.

    :raises ValueError: a value is none of that type.
    """
    asked = message.question[0]
    texts = [str(value) for value in values]
    if not texts:
        return
    try:
        records = dns.rrset.from_text_list(asked.name, ttl, IN, asked.rdtype, texts)
    except (dns.exception.DNSException, UnicodeError) as exc:
        raise ValueError(f"{texts} cannot be an answer") from exc
    message.answer.append(records)


def add_answer(message: dns.message.Message, answer: dns.message.Message) -> None:
    """Add a name server's answer, but no addresses, and nothing that was not asked for."""
    message.set_rcode(answer.rcode())
    message.answer += [rrset for rrset in answer.answer if rrset.rdtype not in (A, AAAA)]
    message.authority += [rrset for rrset in answer.authority if rrset.rdtype == dns.rdatatype.SOA]


def pack(message: dns.message.Message, question: Question, *, datagram: bool) -> bytes:
    """Encode an answer. Where its records do not fit, leave them out and mark it as truncated."""
    limit = MAX_MESSAGE
    if datagram:
        wanted = question.message.payload if question.message.edns >= 0 else 0
        limit = min(max(wanted, _MIN_DATAGRAM), MAX_DATAGRAM)
    try:
        return message.to_wire(max_size=limit, want_shuffle=False)
    except dns.exception.TooBig:
        short = reply(question, message.rcode())
        short.flags |= dns.flags.TC
    except dns.exception.DNSException:  # dnspython can read some records, but not write them
        short = reply(question, dns.rcode.SERVFAIL)
    return short.to_wire()
