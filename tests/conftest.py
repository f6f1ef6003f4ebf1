"""What tests share: real VMs, and a check that each test leaves nothing behind.

``TRIO_SUPERMACHINE_TEST_ENGINE`` names the engine that VMs run on, otherwise the library chooses;
``TRIO_SUPERMACHINE_TEST_VCPUS`` is how many processors they have, where a test does not say.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, settings

from trio_supermachine import EngineUnavailable, Image, Vm, VmConfig
from trio_supermachine.api import unbaked_image
from trio_supermachine.hv.kvm.probe import probe_kvm
from trio_supermachine.hv.select import VARIABLE, choose_engine

from .support.guests import PATIENCE, VCPUS
from .support.processes import child_processes, open_files, own_threads

pytest_plugins = ["tests.support.durations"]

# How long an example takes is up to what else the host does, and so no property.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

if engine := os.environ.get("TRIO_SUPERMACHINE_TEST_ENGINE"):
    os.environ[VARIABLE] = engine  # for the programs that tests start, too


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


@pytest.fixture(autouse=True)
def guests_have_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host, or in the lab, guests may take longer to start than users let them by
    default, and that is no reason for a test to fail.
    """
    if request.node.get_closest_marker("vm") or request.node.get_closest_marker("kvm"):
        defaults: dict[str, object] = vars(VmConfig)["__init__"].__kwdefaults__
        monkeypatch.setitem(defaults, "start_timeout", PATIENCE)
        monkeypatch.setitem(defaults, "restore_timeout", PATIENCE)


@pytest.fixture
async def busybox() -> Image:
    """The embedded image, which boots."""
    return attrs.evolve(await unbaked_image("builtin:busybox"), vcpus=VCPUS)


@pytest.fixture
async def baked() -> Image:
    """The embedded image, which is restored; baked by the first test that wants it."""
    return await Image.builder("builtin:busybox").with_vcpus(VCPUS).build()


@pytest.fixture
async def vm(baked: Image) -> AsyncIterator[Vm]:
    """A VM of the embedded image, as users have it: restored."""
    async with Vm.start(baked) as vm:
        yield vm
