"""The name server of a guest, which answers as its policy allows.

``/etc/resolv.conf`` in the guest names 192.0.0.1, and questions to it come here. A question goes
through these steps, any of which may answer it:

1. :mod:`.dnsmessage` parses it. Nonsense is refused or ignored there; what is left has one name, of
   one class, and is short.
2. A question for the name of an address (PTR) has its own decision. Any other needs a name that
   could be a host's; the rest do not exist (``NXDOMAIN``).
3. :func:`~.decisions.decide_name` says whether the guest may ask. If not, the answer is
   ``REFUSED``, with the reason as an extended error.
4. Names below ``supermachine.internal`` are answered here: the host's loopback is all that there
   is.
5. Addresses (A, AAAA) come from the host's own ``getaddrinfo``. Each must pass
   :func:`~.decisions.decide_answer`; the others are left out. The rest is entered into
   :class:`~.names.ToldNames` *before* the answer goes out, so that a connection to it finds its
   name there.
6. Other types come from the host's name servers. Addresses in their answers are left out, since
   nothing has decided on them.

The guest chooses the questions, and the owners of names choose the answers; neither is trusted. A
question has 5 s in all, a VM 64 questions at once and 8 threads of lookups, and an answer tells 256
addresses at most. Parsing an answer of a name server happens in a thread (:mod:`.nameserver`).
"""

from __future__ import annotations

from typing import Final, Protocol, final

import dns.message
import dns.rcode
import trio

from . import dnsmessage as m
from .addresses import HOST4, HOST6, HOST_NAME, Address, is_host, is_never, is_own
from .decisions import Decision, decide_answer, decide_name, decide_reverse, lists_name
from .lookup import HostLookups, LookupFailed, NoSuchName
from .names import ToldNames
from .policy import EgressPolicy

#: Seconds that the guest may keep an answer: ``getaddrinfo`` does not tell the real TTL.
TTL: Final = 30
#: Seconds for one question.
TIMEOUT: Final = 5.0
#: Addresses that are told for one question; a hostile name server gives thousands.
MAX_TOLD: Final = 256

# Below it there are no names but the host's.
_ZONE: Final = HOST_NAME.partition(".")[2]


class Report(Protocol):
    """A function that is called with each decision about a name."""

    def __call__(self, decision: Decision, name: str) -> None: ...


@final
class Resolver:
    """The name server of one VM's guest.

    :param names: learns which addresses the guest was told.
    :param report: called with each decision.
    """

    def __init__(
        self, policy: EgressPolicy, names: ToldNames, lookups: HostLookups, report: Report
    ) -> None:
        self._policy = policy
        self._names = names
        self._lookups = lookups
        self._report = report

    async def answer(self, query: bytes, *, datagram: bool) -> bytes | None:
        """Answer a query, within :data:`TIMEOUT`; ``None`` if it deserves no answer.

        :param datagram: cut the answer to what the guest takes in a datagram.
        """
        question = m.read(query)
        if not isinstance(question, m.Question):
            await trio.lowlevel.checkpoint()
            return question
        reply = m.reply(question, dns.rcode.SERVFAIL)
        with trio.move_on_after(TIMEOUT):
            try:
                reply = await self._reply(question)
            except (LookupFailed, ValueError):
                pass
            except NoSuchName:
                reply = m.reply(question, dns.rcode.NXDOMAIN)
        return m.pack(reply, question, datagram=datagram)

    async def _reply(self, question: m.Question) -> dns.message.Message:
        address = question.reverse
        if address is not None:
            return await self._reply_reverse(question, address)
        name = question.text
        if name is None:
            await trio.lowlevel.checkpoint()
            return m.reply(question, dns.rcode.NXDOMAIN)
        decision = decide_name(self._policy, name)
        if not decision.allowed:
            await trio.lowlevel.checkpoint()
            return self._refuse(question, decision, name)
        if name == _ZONE or name.endswith("." + _ZONE):
            await trio.lowlevel.checkpoint()
            return self._reply_own(question, decision, name)
        if question.kind in (m.A, m.AAAA):
            return await self._reply_addresses(question, decision, name)
        self._report(decision, name)
        reply = m.reply(question)
        m.add_answer(reply, await self._lookups.query(question.name, question.kind))
        return reply

    def _refuse(self, question: m.Question, decision: Decision, name: str) -> dns.message.Message:
        self._report(decision, name)
        return m.reply(question, dns.rcode.REFUSED, decision.reason)

    def _reply_own(
        self, question: m.Question, decision: Decision, name: str
    ) -> dns.message.Message:
        self._report(decision, name)
        if name not in (HOST_NAME, _ZONE):
            raise NoSuchName
        reply = m.reply(question)
        if name == HOST_NAME:
            own: list[Address] = [HOST4] if question.kind == m.A else []
            own += [HOST6] if question.kind == m.AAAA else []
            self._tell(own, name)
            m.add_records(reply, own, TTL)
        return reply

    async def _reply_addresses(
        self, question: m.Question, decision: Decision, name: str
    ) -> dns.message.Message:
        version = 4 if question.kind == m.A else 6
        told: list[Address] = []
        try:
            found = await self._lookups.addresses(name)
            for address in [a for a in found if a.version == version][:MAX_TOLD]:
                fit = decide_answer(self._policy, address, own=is_own)
                if fit.allowed:
                    told.append(address)
                else:
                    decision = fit
        finally:
            # Some addresses may be refused. If the guest is told any, the name is allowed.
            if told:
                decision = decide_name(self._policy, name)
            self._report(decision, name)
        self._tell(told, name)
        reply = m.reply(question, why="" if decision.allowed else decision.reason)
        m.add_records(reply, told, TTL)
        return reply

    def _tell(self, addresses: list[Address], name: str) -> None:
        now = trio.current_time()
        listed = lists_name(self._policy, name)
        for address in addresses:
            self._names.tell(address, name, listed=listed, ttl=TTL, now=now)

    async def _reply_reverse(self, question: m.Question, address: Address) -> dns.message.Message:
        name = str(address)
        reply = m.reply(question)
        if is_host(address):
            await trio.lowlevel.checkpoint()
            decision = decide_name(self._policy, HOST_NAME)
            if not decision.allowed:
                return self._refuse(question, decision, name)
            self._report(decision, name)
            m.add_records(reply, [HOST_NAME + "."], TTL)
            return reply
        if is_never(address):
            await trio.lowlevel.checkpoint()
            raise NoSuchName
        listed = self._names.listed(address, trio.current_time())
        decision = decide_reverse(self._policy, address, listed=listed, own=is_own)
        if not decision.allowed:
            await trio.lowlevel.checkpoint()
            return self._refuse(question, decision, name)
        self._report(decision, name)
        found = await self._lookups.name_of(address)
        m.add_records(reply, [found.removesuffix(".") + "."], TTL)
        return reply
