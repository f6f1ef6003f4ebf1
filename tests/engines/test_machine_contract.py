"""A real engine keeps the contract of machines: the claims are those of the fake one.

The machines are restored, which is quicker than a boot; the contract makes no difference.
"""

from __future__ import annotations

import time

import pytest

from trio_supermachine import Image, VmConfig
from trio_supermachine.agent.greeting import Restore
from trio_supermachine.hv.base import Engine, MachineSpec
from trio_supermachine.vm.plan import Plan, plan_start
from trio_supermachine.vsock.stream import VsockStream

from ..pure.test_fake_machine import MachineContract

pytestmark = pytest.mark.vm


class TestRealMachine(MachineContract):
    cancelled_steps = (1, 2, 3, 5, 8, 13, 21)

    async def greet(self, stream: VsockStream) -> None:
        await stream.send_all(Restore(seed=bytes(32)).encode(time.time_ns()))
        assert await stream.receive_some()

    @pytest.fixture
    async def plan(self, baked: Image) -> Plan:
        return await plan_start(baked, VmConfig(require_restore=True))

    @pytest.fixture
    def engine(self, plan: Plan) -> Engine:
        return plan.engine

    @pytest.fixture
    def spec(self, plan: Plan) -> MachineSpec:
        return plan.spec
