"""Diagnostic messages that one environment variable switches on.

``TRIO_SUPERMACHINE_TRACE`` is read once, at import: a comma-separated list of categories, or
``all``. Each message is one line on stderr, with the time and its category.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Final

VARIABLE: Final = "TRIO_SUPERMACHINE_TRACE"

CATEGORIES: Final[dict[str, str]] = {
    "vm": "the life of a VM: configuration, start, ready, exit",
    "exec": "programs run in a guest: start, exit, signals",
    "agent": "calls to the guest's agent",
    "net": "connections through forwards, unix sockets and to the outside",
    "vsock": "connections and credit of the vsock muxer",
    "qemu": "the QEMU process: its command line and QMP",
    "kvm": "the KVM engine: ends of vCPUs, faults of drivers, registers not restored",
    "oci": "references, manifests, layers and their conversion",
    "kernel": "where the kernel and its modules come from",
}
"""The categories, each with what it shows."""

_enabled: frozenset[str] = frozenset()


def configure(setting: str) -> None:
    """Switch to the categories in ``setting``, which has the form of the environment variable."""
    global _enabled
    words = {word.strip() for word in setting.split(",")} - {""}
    _enabled = frozenset(CATEGORIES if "all" in words else words & CATEGORIES.keys())
    if unknown := sorted(words - CATEGORIES.keys() - {"all"}):
        known = ", ".join(["all", *CATEGORIES])
        print(f"{VARIABLE}: unknown {', '.join(unknown)}; known: {known}", file=sys.stderr)


def enabled(category: str) -> bool:
    """Give whether messages of ``category`` are shown; to guard costly arguments."""
    return category in _enabled


def trace(category: str, message: str, *args: object) -> None:
    """Show ``message % args`` if ``category`` is on. Otherwise the call costs next to nothing."""
    if category not in _enabled:
        return
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1e6):06d}"
    # A guest may have chosen parts of the text: it must not drive the reader's terminal.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message % args)
    sys.stderr.write(f"{clock} {category:<6} {text}\n")


configure(os.environ.get(VARIABLE, ""))
