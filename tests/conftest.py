"""What tests share: real VMs, and a check that each test leaves nothing behind.

``TRIO_SUPERMACHINE_TEST_ENGINE`` names the engine that VMs run on, otherwise the library chooses;
``TRIO_SUPERMACHINE_TEST_VCPUS`` is how many processors they have, where a test does not say.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, settings

from trio_supermachine import EngineUnavailable, Image, Vm
from trio_supermachine.hv.kvm.probe import probe_kvm
from trio_supermachine.hv.select import VARIABLE, choose_engine
from trio_supermachine.images.prepare import prepare_image

from .support.processes import children_of

pytest_plugins = ["tests.support.durations"]

#: Seconds after which a test gives up, and says what came so far.
PATIENCE = 120

#: By how many seconds a guest's clock may be late: it is set by the agent, and a guest of a busy
#: host comes to that when it gets a processor.
CLOCK = 5

# How long an example takes is up to what else the host does, and so no property.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

if engine := os.environ.get("TRIO_SUPERMACHINE_TEST_ENGINE"):
    os.environ[VARIABLE] = engine  # for the programs that tests start, too
VCPUS = int(os.environ.get("TRIO_SUPERMACHINE_TEST_VCPUS", "1"))


@cache
def _engine_name() -> str:
    try:
        return trio.run(choose_engine).name
    except EngineUnavailable as exc:
        return str(exc)


@cache
def _why_no_linux_on_kvm() -> str | None:
    found = trio.run(probe_kvm)
    return None if found.usable else found.detail


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm") and (reason := _why_no_linux_on_kvm()) is not None:
        pytest.skip(f"{reason}; scripts/kvm-lab has a real one")
    if item.get_closest_marker("qemu") and _engine_name() != "qemu":
        pytest.skip("about QEMU's processes; VMs run on another engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the files, let those come first that take long."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    ranks: dict[Path, int] = {}
    for item in items:
        rank = 0 if item.get_closest_marker("long") else 1 if item.get_closest_marker("vm") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session")
def engine_name() -> str:
    """The engine that VMs run on unless they are told."""
    return _engine_name()


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


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test leaves as many descriptors, children and threads as it found."""
    before = open_files(), child_processes(), own_threads()
    yield
    after = open_files(), child_processes(), own_threads()
    new_files = {fd: what for fd, what in after[0].items() if before[0].get(fd) != what}
    assert not new_files
    assert not after[1].keys() - before[1].keys(), after[1]
    assert not after[2] - before[2]


@pytest.fixture
async def busybox() -> Image:
    """The embedded image, which boots."""
    return attrs.evolve(await prepare_image("builtin:busybox"), vcpus=VCPUS)


@pytest.fixture
async def baked() -> Image:
    """The embedded image, which is restored; baked by the first test that wants it."""
    return await Image.builder("builtin:busybox").with_vcpus(VCPUS).build()


@pytest.fixture
async def vm(baked: Image) -> AsyncIterator[Vm]:
    """A VM of the embedded image, as users have it: restored."""
    async with Vm.start(baked) as vm:
        yield vm


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
