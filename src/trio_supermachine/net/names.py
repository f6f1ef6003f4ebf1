"""Memory of the addresses that a guest was told for names, by which names rule connections.

A policy lists names, but a guest connects to addresses. When the resolver tells the guest an
address, :class:`ToldNames` keeps it together with the name, and whether the policy lists the name.
A connection is decided by that. The name is not looked up again, so nobody can answer the second
question differently. An address that the guest has from elsewhere has no name here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, final

import attrs

from .addresses import Address

#: Seconds that an address is kept beyond its TTL.
GRACE: Final = 60.0
#: Addresses that are kept for one VM.
MAX_ADDRESSES: Final = 4096


@attrs.define
class _Told:
    name: str
    listed: bool
    lifetime: float
    expires: float


@final
class ToldNames:
    """The addresses that a guest was told, each with its name; without I/O.

    An address is kept for its TTL and :data:`GRACE`, counted anew whenever it is told or used. Of
    more than ``limit`` the one that was unused for the longest goes first. Times are seconds of
    any one clock.
    """

    def __init__(self, limit: int = MAX_ADDRESSES) -> None:
        self._limit = limit
        self._told: OrderedDict[Address, _Told] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told)

    def tell(self, address: Address, name: str, *, listed: bool, ttl: float, now: float) -> None:
        """Note that the guest is told ``address`` for ``name``.

        :param listed: the policy lists the name. An address that several names share stays
            listed as long as it is kept.
        """
        lifetime = ttl + GRACE
        old = self._find(address, now)
        listed = listed or (old is not None and old.listed)
        self._told[address] = _Told(name, listed, lifetime, now + lifetime)
        self._told.move_to_end(address)
        if len(self._told) > self._limit:
            self._told.popitem(last=False)

    def name(self, address: Address, now: float) -> str | None:
        """Give the name that ``address`` was last told for."""
        told = self._find(address, now)
        return None if told is None else told.name

    def listed(self, address: Address, now: float) -> bool:
        """Say whether ``address`` was told for a name that the policy lists."""
        told = self._find(address, now)
        return told is not None and told.listed

    def use(self, address: Address, now: float) -> None:
        """Note that a connection goes to ``address``, which is kept for longer now."""
        told = self._find(address, now)
        if told is not None:
            told.expires = now + told.lifetime
            self._told.move_to_end(address)

    def _find(self, address: Address, now: float) -> _Told | None:
        told = self._told.get(address)
        if told is not None and told.expires <= now:
            del self._told[address]
            return None
        return told
