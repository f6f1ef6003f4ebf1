"""What tests want to know of guests, and how long they wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from trio_supermachine import Vm

#: Seconds after which a test gives up, and says what came so far.
PATIENCE = 120

#: By how many seconds a guest's clock may be late: it is set by the agent, and a guest of a busy
#: host comes to that when it gets a processor.
CLOCK = 5

#: How many processors VMs have, where a test does not say.
VCPUS = int(os.environ.get("TRIO_SUPERMACHINE_TEST_VCPUS", "1"))


async def guest_processes(vm: Vm, name: str) -> list[str]:
    """The command lines of the guest's living processes that contain ``name``."""
    script = (
        "for d in /proc/[0-9]*; do [ -r $d/cmdline ] && "
        "tr '\\0' ' ' <$d/cmdline 2>/dev/null && echo; done; true"
    )
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
    lines = done.stdout.decode().splitlines()
    return [line for line in lines if name in line and "cmdline" not in line]


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Receive until what has come ends with ``end``."""
    return await _read(stream, lambda got: got.endswith(end))


async def read_past(stream: trio.abc.ReceiveStream, text: bytes) -> bytes:
    """Receive until ``text`` has come."""
    return await _read(stream, lambda got: text in got)


async def _read(stream: trio.abc.ReceiveStream, enough: Callable[[bytes], bool]) -> bytes:
    got = b""
    with trio.move_on_after(PATIENCE) as scope:
        while not enough(got):
            chunk = await stream.receive_some()
            assert chunk, got
            got += chunk
    assert not scope.cancelled_caught, got
    return got
