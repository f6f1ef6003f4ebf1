"""A real guest's programs stand still when frozen; in a copy they go on in a machine of its own."""

from __future__ import annotations

import re
import time
import uuid

import pytest
import trio
import trio.testing

from trio_supermachine import Vm
from trio_supermachine.agent import greeting, wire
from trio_supermachine.agent.client import AgentClient

from ..support.guests import CLOCK, read_until

pytestmark = [pytest.mark.vm, pytest.mark.small_kernel]

COUNT = "n=0; while :; do n=$((n+1)); echo $n >/tmp/next; mv /tmp/next /tmp/count; done"


async def call(vm: Vm, request: bytes) -> int:
    return wire.decode_u64((await vm._running.client.call(request)).payload)


async def sh(vm: Vm, script: str, *, user: str | None = None) -> str:
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True, user=user)
    return done.stdout.decode()


async def count(vm: Vm) -> int:
    """How far a program has come; files are the agent's own work."""
    while True:
        try:
            return int(await vm.read_file("/tmp/count"))
        except FileNotFoundError:
            await trio.lowlevel.checkpoint()


async def wait_past(vm: Vm, number: int) -> None:
    while await count(vm) <= number:
        await trio.lowlevel.checkpoint()


async def test_frozen_programs_stand_still_and_then_go_on(vm: Vm) -> None:
    async with vm.exec(["sh", "-c", f"setsid sh -c '{COUNT}'"]) as child:
        await wait_past(vm, 0)
        await call(vm, wire.freeze())
        await call(vm, wire.freeze())
        assert b"frozen 1" in await vm.read_file("/sys/fs/cgroup/guest/cgroup.events")
        there = await count(vm)
        # What the guest does itself takes longer than a round of the program.
        await vm.write_file("/tmp/other", bytes(1 << 20))
        assert await count(vm) == there
        await call(vm, wire.thaw())
        await call(vm, wire.thaw())
        await wait_past(vm, there)
        child.kill()


async def test_programs_in_cgroups_of_their_own_are_frozen_too(vm: Vm) -> None:
    """Container engines make cgroups beside the one that they were started in."""
    await sh(vm, "mkdir -p /sys/fs/cgroup/engine/box /sys/fs/cgroup/own /sys/fs/cgroup/empty")
    await sh(vm, "echo 1 >/sys/fs/cgroup/own/cgroup.freeze")
    async with vm.exec(
        ["sh", "-c", f"echo $$ >/sys/fs/cgroup/engine/box/cgroup.procs; {COUNT}"]
    ) as child:
        await wait_past(vm, 0)
        await call(vm, wire.freeze())
        assert b"frozen 1" in await vm.read_file("/sys/fs/cgroup/engine/box/cgroup.events")
        there = await count(vm)
        await call(vm, wire.thaw())
        await wait_past(vm, there)
        child.kill()
    # What the guest had frozen itself stays so.
    assert await sh(vm, "cat /sys/fs/cgroup/*/cgroup.freeze") == "0\n0\n0\n1\n"


async def test_a_frozen_program_can_be_killed(vm: Vm) -> None:
    async with vm.exec(["sleep", "1000"]) as child:
        await call(vm, wire.freeze())
        child.kill()
        assert await child.wait() == -9
    await call(vm, wire.thaw())


async def test_what_is_started_in_a_frozen_guest_starts_after_the_thaw(vm: Vm) -> None:
    await call(vm, wire.freeze())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sh, vm, "touch /tmp/started")
        nursery.start_soon(sh, vm, "true")
        await trio.testing.wait_all_tasks_blocked()
        await call(vm, wire.frame(wire.FrameType.PING))
        with pytest.raises(FileNotFoundError):
            await vm.read_file("/tmp/started")
        await call(vm, wire.thaw())
    assert await vm.read_file("/tmp/started") == b""


async def test_what_waits_for_the_thaw_starts_in_order_unless_it_is_cancelled(vm: Vm) -> None:
    pids = []

    async def start(name: str) -> None:
        async with vm.exec(["touch", f"/tmp/{name}"]) as child:
            pids.append((child.pid, name))
            await child.wait()

    await call(vm, wire.freeze())
    async with trio.open_nursery() as nursery:
        for name in ("first", "second"):
            nursery.start_soon(start, name)
            await trio.testing.wait_all_tasks_blocked()
            await call(vm, wire.frame(wire.FrameType.PING))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as cancelled:
                cancelled.start_soon(start, "cancelled")
                await trio.testing.wait_all_tasks_blocked()
                await call(vm, wire.frame(wire.FrameType.PING))
                scope.cancel()
        nursery.start_soon(start, "third")
        await trio.testing.wait_all_tasks_blocked()
        await call(vm, wire.frame(wire.FrameType.PING))
        assert not pids
        await call(vm, wire.thaw())
    assert [name for _, name in sorted(pids)] == ["first", "second", "third"]
    with pytest.raises(FileNotFoundError):
        await vm.read_file("/tmp/cancelled")


async def test_what_is_started_in_a_frozen_guest_has_its_empty_stdin_ended(vm: Vm) -> None:
    await call(vm, wire.freeze())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.run_process, ["cat"])
        await trio.testing.wait_all_tasks_blocked()
        await call(vm, wire.frame(wire.FrameType.PING))
        await call(vm, wire.thaw())


async def test_a_chain_that_is_frozen_between_its_programs_goes_on(vm: Vm) -> None:
    async with vm.exec_builder().argv(["cat"]).chain(["echo", "after"]).spawn() as child:
        await call(vm, wire.freeze())
        assert child.stdin is not None
        await child.stdin.aclose()
        await call(vm, wire.thaw())
        assert await read_until(child.stdout, b"after\n") == b"after\n"


async def renew(vm: Vm, restore: greeting.Restore) -> AgentClient:
    """End the guest's lifeline, as a restore does, and answer the next one."""
    client = AgentClient(vm._running.client.machine)
    assert vm._running.client._lifeline is not None
    await trio.aclose_forcefully(vm._running.client._lifeline.stream)
    hello = await client.restored(restore)
    assert hello.kind == greeting.HelloKind.RESTORE
    return client


IDS = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; cat /etc/hostname"


async def test_a_copy_gets_names_of_its_own_before_anything_runs(vm: Vm) -> None:
    first = (await sh(vm, IDS)).split()
    assert re.fullmatch("[0-9a-f]{32}", first[0])
    async with vm.exec(["sh", "-c", f"setsid sh -c '{COUNT}' & sleep 1000"]) as child:
        await wait_past(vm, 0)
        for hostname in ("", "second", "third"):
            await call(vm, wire.freeze())
            there = await count(vm)
            restore = greeting.Restore(seed=bytes(64), hostname=hostname, boot_id=str(uuid.uuid4()))
            client = await renew(vm, restore)
            vm._running.client = client
            await wait_past(vm, there)  # thawed by the renewal
            name = hostname or "supermachine"
            assert (await sh(vm, IDS)).split() == [restore.machine_id, restore.boot_id, name, name]
            assert name in await sh(vm, "cat /etc/hosts")
        child.kill()
    assert "cover" not in await sh(vm, "ls -A /run")


async def test_a_copys_clock_is_right(vm: Vm) -> None:
    await sh(vm, "date -s 2001-01-01")
    before = time.time()
    vm._running.client = await renew(vm, greeting.Restore(seed=bytes(32)))
    assert before - CLOCK <= int(await sh(vm, "date +%s")) <= time.time() + 1


@pytest.mark.parametrize(
    ("before", "file"),
    [
        ("rm /etc/machine-id", "/etc/machine-id"),
        ("rm /etc/machine-id; ln -s /etc/elsewhere /etc/machine-id", "/etc/machine-id"),
        ("mv /etc/machine-id /etc/real; ln -s real /etc/machine-id", "/etc/real"),
        ("mkdir -p /var/lib/dbus; echo old >/var/lib/dbus/machine-id", "/var/lib/dbus/machine-id"),
        ("mount --bind /etc /etc; mount -o remount,ro,bind /etc", "/etc/machine-id"),
    ],
)
async def test_the_machine_id_is_renewed_wherever_it_is(vm: Vm, before: str, file: str) -> None:
    await sh(vm, before)
    await call(vm, wire.freeze())
    restore = greeting.Restore(seed=bytes(32))
    vm._running.client = await renew(vm, restore)
    for path in (file, "/etc/machine-id"):
        assert (await vm.read_file(path)).decode() == restore.machine_id + "\n"


async def test_a_machine_id_that_is_no_file_is_left_alone(vm: Vm) -> None:
    await sh(vm, "ln -sf /dev/null /etc/machine-id")
    await call(vm, wire.freeze())
    vm._running.client = await renew(vm, greeting.Restore(seed=bytes(32)))
    assert await sh(vm, "cat /dev/null; test -c /dev/null && echo whole") == "whole\n"


async def test_the_trial_program_is_in_every_guest(vm: Vm) -> None:
    await vm.run_process(["/proc/1/exe", "--trial"])


async def test_in_a_copy_users_make_namespaces_with_a_proc_of_their_own(vm: Vm) -> None:
    vm._running.client = await renew(vm, greeting.Restore(seed=bytes(32)))
    inner = "unshare -U -r -p -f -m --mount-proc sh -c 'echo $$; ls /proc | grep -c ^[0-9]'"
    assert (await sh(vm, inner, user="1000")).split()[0] == "1"
