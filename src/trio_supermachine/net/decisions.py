"""Decides what a guest may reach, by its :class:`EgressPolicy`; without I/O.

The egress path asks three questions, in the order in which a program usually gets anywhere:

1. :func:`decide_name`: may the guest look this name up? It keeps data from leaving inside names.
   (:func:`decide_reverse` asks the same about an address whose name is wanted.)
2. :func:`decide_answer`: may the guest be told this address for the name? The owner of a name
   chooses where it leads, and might lead a program of the guest to the host or to a metadata
   service.
3. :func:`decide`: may the guest connect, or send, to this port of this address?

A guest may use any address without asking for a name, so the third question alone decides about
connections. ``listed`` is all that it takes from the first two: whether the guest was told this
address for a name that the policy lists.

``own`` tells whether the host itself has an address, which may change while a VM runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .addresses import HOST_NAME, Address, contains, is_host, is_metadata, is_never, is_public
from .policy import EgressPolicy, PolicyKind


class Decision(NamedTuple):
    """Answer of a policy: whether something is allowed, and why or why not, for people."""

    allowed: bool
    reason: str


def decide_name(policy: EgressPolicy, name: str) -> Decision:
    """Decide whether the guest may look ``name`` up: lower case, without a dot at its end."""
    if name == HOST_NAME:
        if _names_host(policy):
            return Decision(True, "the policy names it")
        return Decision(False, "the policy does not name it")
    match policy.kind:
        case PolicyKind.DENY_ALL:
            return Decision(False, "the policy denies everything")
        case PolicyKind.ALLOW if policy.hosts or policy.cidrs:
            if lists_name(policy, name):
                return Decision(True, "the policy allows this name")
            return Decision(False, "the policy does not list this name")
        case PolicyKind.DENY if not policy.ports and lists_name(policy, name):
            return Decision(False, "the policy denies this name")
    return Decision(True, "any name")


def decide_answer(
    policy: EgressPolicy, address: Address, *, own: Callable[[Address], bool]
) -> Decision:
    """Decide whether the guest may be told ``address`` for a name that it may look up.

    :param own: tells whether the host itself has an address.
    """
    if is_never(address):
        return Decision(False, "a name must not lead to this address")
    if is_metadata(address):
        return Decision(False, "a name must not lead to a metadata or link-local address")
    match policy.kind:
        case PolicyKind.DENY_ALL:
            return Decision(False, "the policy denies everything")
        case PolicyKind.DENY_PRIVATE:
            return _public(address, own)
        case PolicyKind.ALLOW if not contains(policy.cidrs, address):
            return _public(address, own)
        case PolicyKind.DENY if not policy.ports and contains(policy.cidrs, address):
            return Decision(False, "the policy denies this network")
    return Decision(True, "the policy allows it")


def decide(
    policy: EgressPolicy,
    address: Address,
    port: int,
    *,
    listed: bool,
    own: Callable[[Address], bool],
) -> Decision:
    """Decide whether the guest may connect, or send, to ``port`` of ``address``.

    :param listed: the guest was told ``address`` for a name of which :func:`lists_name` is true.
    :param own: tells whether the host itself has an address.
    """
    if is_host(address):
        if _names_host(policy) and _has_port(policy, port):
            return Decision(True, f"the policy names {HOST_NAME}")
        return Decision(False, f"the policy does not name {HOST_NAME} with this port")
    if is_never(address):
        return Decision(False, "nothing is sent to this address")
    match policy.kind:
        case PolicyKind.ALLOW_ALL:
            return Decision(True, "the policy allows everything")
        case PolicyKind.DENY_ALL:
            return Decision(False, "the policy denies everything")
        case PolicyKind.DENY_PRIVATE:
            return _public(address, own)
        case PolicyKind.ALLOW:
            return _decide_allow(policy, address, port, listed, own)
        case PolicyKind.DENY:
            return _decide_deny(policy, address, port, listed)


def decide_reverse(
    policy: EgressPolicy, address: Address, *, listed: bool, own: Callable[[Address], bool]
) -> Decision:
    """Decide whether the guest may ask for the name of ``address``; see :func:`decide`."""
    if policy.kind is PolicyKind.ALLOW and (policy.hosts or policy.cidrs):
        if listed or contains(policy.cidrs, address):
            return Decision(True, "the policy allows this address")
        return Decision(False, "the policy lists neither this address nor its name")
    return decide_answer(policy, address, own=own)


def lists_name(policy: EgressPolicy, name: str) -> bool:
    """Say whether the policy's hosts have this name, or one above it as ``*.``."""
    if name in policy.hosts:
        return True
    return any(h.startswith("*.") and name.endswith(h[1:]) for h in policy.hosts)


def _names_host(policy: EgressPolicy) -> bool:
    return policy.kind is PolicyKind.ALLOW and HOST_NAME in policy.hosts


def _has_port(policy: EgressPolicy, port: int) -> bool:
    return not policy.ports or port in policy.ports


def _decide_allow(
    policy: EgressPolicy,
    address: Address,
    port: int,
    listed: bool,
    own: Callable[[Address], bool],
) -> Decision:
    if not _has_port(policy, port):
        return Decision(False, "the policy does not list this port")
    if contains(policy.cidrs, address):
        return Decision(True, "the policy allows this network")
    if (policy.hosts or policy.cidrs) and not listed:
        return Decision(False, "the policy lists neither this address nor its name")
    public = _public(address, own)
    return Decision(True, "the policy allows its name") if public.allowed and listed else public


def _decide_deny(policy: EgressPolicy, address: Address, port: int, listed: bool) -> Decision:
    ruled = listed or contains(policy.cidrs, address)
    if not policy.hosts and not policy.cidrs:
        ruled = bool(policy.ports)
    if ruled and _has_port(policy, port):
        return Decision(False, "the policy denies it")
    return Decision(True, "the policy does not deny it")


def _public(address: Address, own: Callable[[Address], bool]) -> Decision:
    if not is_public(address):
        return Decision(False, "a private address")
    if own(address):
        return Decision(False, "an address of the host itself")
    return Decision(True, "a public address")
