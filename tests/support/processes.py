"""What this process holds: files, children, threads, machines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
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


def children_of(pid: int) -> Iterator[int]:
    """The children that a process's threads have; they may be gone by now."""
    for task in _listed(Path(f"/proc/{pid}/task")):
        try:
            yield from map(int, (task / "children").read_text().split())
        except OSError:
            continue  # the thread has ended, or the kernel does not tell


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def child_processes() -> dict[int, str]:
    """The process's living children and their names."""
    if Path("/proc/thread-self/children").exists():
        candidates = iter(children_of(os.getpid()))
    else:  # a kernel without CONFIG_PROC_CHILDREN
        candidates = (int(name) for name in os.listdir("/proc") if name.isdigit())
    found = {}
    for pid in candidates:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        name, _, rest = stat.partition(" (")[2].rpartition(") ")
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found[pid] = name
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
