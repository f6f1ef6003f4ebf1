"""The calls of a restore on KVM one by one, and what Python adds to them.

A machine is made with all its hardware, loaded with the state of one that stood before its first
instruction, and closed: ``Board``, what the engine does in a thread before vCPUs run. Runs on any
/dev/kvm, also where no Linux would. A round does so as it is, and then once more with each call to
the kernel timed. What is between the calls is Python's, and the timing itself: less than a
microsecond for each.

The first table has the whole, the others the calls by how long they took.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from common import MIB, scratch, start
from table import Rows

from trio_supermachine.hv.base import Disk, MachineSpec, Restore
from trio_supermachine.hv.kvm import ioctl, vcpu_handle
from trio_supermachine.hv.kvm._kvm import lib
from trio_supermachine.hv.kvm.board import Board
from trio_supermachine.kernels import prepare_kernel

MEMORY_MIB = 256
#: (vCPUs, disks)
SHAPES = ((1, 1), (2, 1), (4, 1), (1, 10))


#: KVM's ioctls by their numbers; all are of its type, 0xAE.
NAMES: dict[int, str] = {
    value: name
    for name in dir(lib)
    if name.startswith("KVM_")
    and isinstance(value := getattr(lib, name), int)
    and value >> 8 & 0xFF == 0xAE
}


@attrs.define
class Calls:
    """How often each system call was made, and the seconds it took in all."""

    times: dict[str, tuple[int, float]] = attrs.field(factory=dict)
    total: float = 0.0
    _made: dict[int, str] = attrs.field(factory=dict)

    def timed(self, function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """The same function; without a name, that of the ioctl, which is its second argument."""
        clock = time.perf_counter

        def call(*arguments: Any, **options: Any) -> Any:
            begin = clock()
            result = function(*arguments, **options)
            elapsed = clock() - begin
            key = name or NAMES[arguments[1]]
            if key in ("KVM_CREATE_VM", "KVM_CREATE_VCPU", "eventfd"):
                self._made[result] = key
            elif key == "close":
                key = f"close, after {self._made.pop(arguments[0], 'open')}"
            count, before = self.times.get(key, (0, 0.0))
            self.times[key] = count + 1, before + elapsed
            self.total += elapsed
            return result

        return call


class _Library:
    """The binding with its calls timed."""

    def __init__(self, calls: Calls) -> None:
        self.__dict__.update({name: getattr(lib, name) for name in dir(lib)})
        for name in ("kvm_pointer", "kvm_value"):
            self.__dict__[name] = calls.timed(getattr(lib, name))
        for name in ("vcpu_map", "vcpu_unmap"):
            self.__dict__[name] = calls.timed(getattr(lib, name), name)


@contextmanager
def watched(calls: Calls) -> Iterator[None]:
    """Have all calls to the kernel of the block's machines timed."""

    class Mapping(mmap.mmap):
        __new__ = staticmethod(calls.timed(mmap.mmap.__new__, "mmap"))
        madvise = calls.timed(mmap.mmap.madvise, "madvise")
        close = calls.timed(mmap.mmap.close, "munmap")

    library: Any = _Library(calls)
    places: list[tuple[Any, str, Any]] = [
        (ioctl, "lib", library),
        (vcpu_handle, "lib", library),
        (mmap, "mmap", Mapping),
    ]
    for name in ("open", "close", "eventfd", "pread", "read"):
        places.append((os, name, calls.timed(getattr(os, name), name)))
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def board(spec: MachineSpec) -> Board:
    return Board(spec, console=lambda _: None, power=lambda _: None)


def once(spec: MachineSpec) -> tuple[float, float]:
    """Seconds of making one and of closing it."""
    begin = time.perf_counter()
    made = board(spec)
    middle = time.perf_counter()
    made.close()
    return middle - begin, time.perf_counter() - middle


def measure(spec: MachineSpec, rounds: int, label: str, rows: Rows) -> Calls:
    """The calls of all rounds."""
    calls = Calls()
    for number in range(rounds + 3):
        opened, closed = once(spec)
        one = Calls() if number < 3 else calls  # the first rounds fill caches
        before = one.total
        with watched(one):
            whole = sum(once(spec))
        if one is calls:
            kernel = calls.total - before
            rows.compare(f"{label}: between the calls of both", f"{label}: calls of both")
            rows.add(f"{label}: restore", opened * 1e3)
            rows.add(f"{label}: close", closed * 1e3)
            rows.add(f"{label}: calls of both", kernel * 1e3)
            rows.add(f"{label}: between the calls of both", (whole - kernel) * 1e3)
    return calls


def by_call(label: str, calls: Calls, rounds: int) -> Rows:
    """How often each call is made in a restore and close, and how long that takes in all."""
    rows = Rows("kvm", label)
    for name, (count, elapsed) in sorted(calls.times.items(), key=lambda one: -one[1][1]):
        rows.add(f"{name}, {count / rounds:g} times", elapsed * 1e6 / rounds, "us")
    return rows


async def main(rounds: int) -> AsyncIterator[Rows]:
    kernel = await prepare_kernel()
    rows = Rows("kvm", f"{rounds} rounds")
    tables = []
    with scratch() as place:
        (place / "disk").write_bytes(bytes(MIB))
        with (place / "memory").open("wb") as file:
            file.truncate(MEMORY_MIB * MIB)
        for vcpus, disks in SHAPES:
            label = f"{vcpus} vCPU{'s' * (vcpus > 1)}, {disks} disk{'s' * (disks > 1)}"
            spec = MachineSpec(
                kernel=kernel.kernel,
                initramfs=kernel.initramfs,
                disks=(Disk(path=place / "disk"),) * disks,
                vcpus=vcpus,
                memory_mib=MEMORY_MIB,
            )
            first = board(spec)
            (place / "state").write_bytes(first.save())
            first.close()
            restore = Restore(identity="", state=place / "state", memory=place / "memory")
            spec = attrs.evolve(spec, kernel=None, initramfs=None, restore=restore)
            tables.append(by_call(label, measure(spec, rounds, label, rows), rounds))
    rows.notes.append("target of what is between the calls: a ratio below 1")
    yield rows
    for table in tables:
        yield table


if __name__ == "__main__":
    start(main, __doc__, kvm="device", rounds=(100, 1))
