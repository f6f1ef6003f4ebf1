"""The memory that this process may use on its host."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_KIB_PER_MIB = 1024
_BYTES_PER_MIB = 1 << 20


def usable_memory_mib(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Give the host's memory in MiB, or a control group's lower limit; ``None`` if unknown.

    Groups of version 1 and of version 2 count: this process's own, and every group above it.

    :param proc: where ``proc`` is mounted.
    :param cgroups: where control groups are mounted.
    """
    known = [_total_mib(proc), *_limits_mib(proc, cgroups)]
    return min((mib for mib in known if mib is not None), default=None)


def _total_mib(proc: Path) -> int | None:
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        number = value.removesuffix("kB").strip()
        if name == "MemTotal" and number.isdecimal():
            return int(number) // _KIB_PER_MIB
    return None


def _limits_mib(proc: Path, cgroups: Path) -> list[int]:
    found = []
    for line in _lines(proc / "self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts, file = [cgroups, cgroups / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            mounts, file = [cgroups / "memory"], "memory.limit_in_bytes"
        else:
            continue
        # In a container the named path may be missing. The mount is then the group itself.
        path = PurePosixPath("/", group)
        names = [name.relative_to("/") for name in (path, *path.parents) if ".." not in name.parts]
        for mount in mounts:
            for name in names:
                for text in _lines(mount / name / file):
                    if text.isdecimal():
                        found.append(int(text) // _BYTES_PER_MIB)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
