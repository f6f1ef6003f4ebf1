"""KVM as an engine: machines that this process runs itself."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import attrs
import trio

from ..._util.nursery import open_flat_nursery
from ..base import Engine, EngineReport, Machine, MachineSpec
from .api import Kvm
from .machine import KvmMachine
from .probe import probe_kvm
from .x86.cpuid import vcpu_cpuid

#: Version of the hardware that a guest finds; change it with that.
_MACHINE: Final = "1"


@final
class KvmEngine(Engine):
    """Engine that runs machines in threads of this process, by the kernel's KVM."""

    name = "kvm"

    async def probe(self) -> EngineReport:
        found = await probe_kvm()
        return EngineReport(
            name=self.name, available=found.usable, detail=found.detail, remedy=found.remedy
        )

    async def host_facts(self) -> Mapping[str, str]:
        return {"machine": _MACHINE, "cpuid": await trio.to_thread.run_sync(_cpuid_digest)}

    def open(self, spec: MachineSpec) -> AbstractAsyncContextManager[Machine]:
        return self._open(spec)

    @asynccontextmanager
    async def _open(self, spec: MachineSpec) -> AsyncIterator[Machine]:
        machine = KvmMachine(spec)
        try:
            await machine.set_up()
            async with open_flat_nursery() as nursery:
                nursery.start_soon(machine.run)
                try:
                    yield machine
                finally:
                    machine.kill()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(machine.close)


def _cpuid_digest() -> str:
    """Compute a digest of the abilities of a guest's vCPUs on this host."""
    with Kvm.open() as kvm:
        leaves = vcpu_cpuid(kvm.supported_cpuid(), index=0, vcpus=1, tsc_deadline=True)
    text = "\n".join(repr(attrs.astuple(leaf)) for leaf in leaves)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
