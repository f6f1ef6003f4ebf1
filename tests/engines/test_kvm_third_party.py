"""Other people's checks of a machine, run inside of one: fio and stress-ng verify what they do.

Takes some minutes on a slow host, and, the first time, another two to make a Debian.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from trio_supermachine.host import files as hostfiles
from trio_supermachine.host.locks import locked
from trio_supermachine.hv.base import Disk, Machine

from ..support.debian_image import run
from ..support.kvm_guest import remains
from ..support.qemu_guest import scripted

try:
    from trio_supermachine.hv.kvm.engine import KvmEngine
except ImportError:
    pytest.skip("the package was built without the KVM binding", allow_module_level=True)

pytestmark = [pytest.mark.kvm, pytest.mark.several_vcpus]

MEMORY_MIB = 389
PATIENCE = 600

FIO = "fio --filename=/dev/vdb --verify=crc32c --verify_fatal=1 --do_verify=1"
# A million timer signals a second, as is its default, would be all that a slow host does.
STRESS = (
    "stress-ng --verify --timeout 60 --cpu 1 --vm 1 --vm-bytes 64m --switch 1 --timer 1"
    " --timer-freq 1000 --fork 1"
    " --futex 1 --pipe 1 --memcpy 1 --hdd 1 --hdd-bytes 16m --temp-path /tmp"
)


@pytest.fixture(scope="session")
def debian_disk() -> Path:
    """A Debian with fio and stress-ng as a squashfs, made by mmdebstrap and kept for later runs."""
    return trio.run(_prepare)


async def _prepare() -> Path:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap")
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    kept = hostfiles.home() / "test-images"
    disk = kept / f"{codename}-fio-stress-ng.squashfs"
    async with locked(kept / ".lock"):
        if not await trio.Path(disk).exists():
            tar = kept / f".{disk.name}.tar"
            made = kept / f".{disk.name}.new"
            packages = "--include=fio,stress-ng"
            await run(["mmdebstrap", "--variant=apt", packages, codename, str(tar)])
            await run(["sh", "-c", f"sqfstar {made} <{tar}"])
            await trio.Path(tar).unlink()
            await trio.Path(made).rename(disk)
    return disk


@asynccontextmanager
async def debian(directory: Path, disk: Path, script: str) -> AsyncIterator[Machine]:
    """A machine of two vCPUs that runs ``script`` in the Debian, with a writable ``/dev/vdb``."""
    data = directory / "data"
    with data.open("wb") as file:
        file.truncate(48 << 20)
    mount = (
        "mount -t squashfs /dev/vda /mnt || exit 9; mount --bind /dev /mnt/dev;"
        "mount -t proc proc /mnt/proc; mount -t sysfs sys /mnt/sys;"
        "mount -t tmpfs tmp /mnt/tmp; mount -t tmpfs tmp /mnt/run"
    )
    init = f"mkdir /mnt; {mount}\nchroot /mnt sh -c '{script}'; echo rc=$?; poweroff -f"
    spec = attrs.evolve(
        await scripted(directory, init),
        memory_mib=MEMORY_MIB,
        vcpus=2,
        disks=(Disk(path=disk), Disk(path=data, readonly=False)),
    )
    with trio.fail_after(PATIENCE):
        async with KvmEngine().open(spec) as machine:
            yield machine
    assert remains(MEMORY_MIB) == []


async def test_fio_finds_on_the_disk_what_it_wrote(tmp_path: Path, debian_disk: Path) -> None:
    script = (
        f"{FIO} --name=a --rw=randrw --bsrange=512-128k --size=8m --ioengine=libaio --iodepth=16"
        f" --direct=1 && {FIO} --name=b --rw=randwrite --bs=4k --size=2m --offset=32m"
        " --ioengine=psync --fsync=16"
    )
    async with debian(tmp_path, debian_disk, script) as machine:
        assert (await machine.wait_exit()).reason == "shutdown"
        said = machine.console.tail(1 << 20).decode(errors="replace")
    assert "rc=0" in said, said


async def test_stress_ng_verifies_processors_memory_and_time(
    tmp_path: Path, debian_disk: Path
) -> None:
    async with debian(tmp_path, debian_disk, STRESS) as machine:
        assert (await machine.wait_exit()).reason == "shutdown"
        said = machine.console.tail(1 << 20).decode(errors="replace")
    assert "rc=0" in said, said
    assert "fail:" not in said, said
