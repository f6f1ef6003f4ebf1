"""The state of :mod:`.state` as bytes, without I/O.

A header (magic, version, number of vCPUs), then fields in a fixed order, each a 32-bit length and
that many bytes; all numbers are little-endian. The fields that KVM defines are its structures. A
state may come from anybody: all of it is checked, to the last byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from .api import IRQCHIP_SIZE, IRQCHIPS, PIT_SIZE, VCPU_PARTS, CpuidEntry
from .state import VcpuState, VmState

_MAGIC: Final = b"TSM-KVM\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sHH")
_LENGTH: Final = struct.Struct("<I")
_CLOCK: Final = struct.Struct("<Q")
_TSC_KHZ: Final = struct.Struct("<I")
_CPUID: Final = struct.Struct("<7I")
_MSR: Final = struct.Struct("<IQ")
_INDEX: Final = struct.Struct("<I")

_MAX_VCPUS: Final = 255
_MAX_CPUID: Final = 256
_MAX_MSRS: Final = 4096
_XSAVE_SIZES: Final = range(4096, 1 << 16)


def encode_state(vcpus: Sequence[VcpuState], vm: VmState) -> bytes:
    """Encode the state of a machine, of 1 to 255 vCPUs, for :func:`decode_state`."""
    fields = [*vm.irqchips, vm.pit, _CLOCK.pack(vm.clock)]
    for vcpu in vcpus:
        fields += [
            b"".join(_CPUID.pack(*attrs.astuple(entry)) for entry in vcpu.cpuid),
            _TSC_KHZ.pack(vcpu.tsc_khz),
            b"".join(_MSR.pack(*msr) for msr in vcpu.msrs),
            b"".join(_INDEX.pack(index) for index in vcpu.unread),
            vcpu.xsave,
            *(getattr(vcpu, name) for name in VCPU_PARTS),
        ]
    parts = [_HEADER.pack(_MAGIC, _VERSION, len(vcpus))]
    for field in fields:
        parts += (_LENGTH.pack(len(field)), field)
    return b"".join(parts)


def decode_state(data: bytes) -> tuple[tuple[VcpuState, ...], VmState]:
    """Decode what :func:`encode_state` gave.

    :raises ValueError: it is no state, or of another version; the message says where it is wrong.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"KVM state: {len(data)} bytes are too few")
    magic, version, count = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("KVM state: not one")
    if version != _VERSION:
        raise ValueError(f"KVM state: version {version}, and this is for version {_VERSION}")
    if not 1 <= count <= _MAX_VCPUS:
        raise ValueError(f"KVM state: {count} vCPUs")
    fields = _Fields(data, _HEADER.size)
    vm = VmState(
        irqchips=tuple(fields.exactly("irqchip", IRQCHIP_SIZE) for _ in IRQCHIPS),
        pit=fields.exactly("pit", PIT_SIZE),
        clock=_CLOCK.unpack(fields.exactly("clock", _CLOCK.size))[0],
    )
    vcpus = tuple(_decode_vcpu(fields) for _ in range(count))
    fields.end()
    return vcpus, vm


def _decode_vcpu(fields: _Fields) -> VcpuState:
    return VcpuState(
        cpuid=tuple(CpuidEntry(*entry) for entry in fields.table("cpuid", _CPUID, _MAX_CPUID)),
        tsc_khz=_TSC_KHZ.unpack(fields.exactly("tsc_khz", _TSC_KHZ.size))[0],
        msrs=tuple((index, value) for index, value in fields.table("msrs", _MSR, _MAX_MSRS)),
        unread=tuple(index for (index,) in fields.table("unread", _INDEX, _MAX_MSRS)),
        xsave=fields.one_of("xsave", _XSAVE_SIZES),
        **{name: fields.exactly(name, size) for name, size in VCPU_PARTS.items()},
    )


class _Fields:
    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def one_of(self, name: str, sizes: range) -> bytes:
        start = self._at + _LENGTH.size
        if start > len(self._data):
            raise ValueError(f"KVM state: it ends where {name} begins")
        (size,) = _LENGTH.unpack_from(self._data, self._at)
        if size not in sizes:
            raise ValueError(f"KVM state: {name} of {size} bytes")
        self._at = start + size
        if self._at > len(self._data):
            raise ValueError(f"KVM state: it ends within {name}")
        return self._data[start : self._at]

    def exactly(self, name: str, size: int) -> bytes:
        return self.one_of(name, range(size, size + 1))

    def table(self, name: str, row: struct.Struct, most: int) -> list[tuple[int, ...]]:
        sizes = range(0, row.size * most + 1, row.size)
        return list(row.iter_unpack(self.one_of(name, sizes)))

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"KVM state: {len(self._data) - self._at} bytes too many")
