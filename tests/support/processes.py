"""What this process holds: files, children, threads, machines."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def open_files() -> dict[int, str]:
    """The process's file descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed the directory
    return found


def child_processes() -> dict[int, str]:
    """The process's living children and their names."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(" (")[2].rpartition(") ")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found[int(stat.parent.name)] = name
    return found


def engines() -> set[int]:
    """The processes of QEMU that run VMs of this process."""
    return {pid for pid, name in child_processes().items() if "qemu" in name}


def machines() -> int:
    """How many VMs this process runs, on any engine."""
    return len(engines()) + list(open_files().values()).count("anon_inode:kvm-vm")


def own_threads() -> set[threading.Thread]:
    """Threads, without the worker threads that Trio keeps for a while for the next call."""
    return {t for t in threading.enumerate() if not t.name.startswith("Trio thread")}
