"""What a guest sees of an image is what ``umoci unpack`` makes of it, file by file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import attrs
import pytest

from trio_supermachine import Vm, VmConfig, hostfiles
from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.oci.platform import Platform

from . import nasty_layers
from .conftest import VCPUS
from .debian_image import debian_layout
from .image_files import Layout, make_tar, member

__all__ = ["debian_layout"]
ARCHITECTURE = Platform.parse(None).architecture
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="umoci needs root for owners and devices")

#: Times that squashfs has no room for, and what becomes of them.
CLAMPED = {
    "./cases/numbers/gnu-old": 0,
    "./cases/numbers/pax-old": 0,
    "./cases/numbers/gnu-far": (1 << 32) - 1,
}
Tree = dict[str, tuple[object, ...]]


@pytest.fixture(scope="session")
def lister(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The program that lists files, for a guest and for the host."""
    program = tmp_path_factory.mktemp("lister") / "lister"
    source = Path(__file__).with_name("lister.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", program, source], check=True)
    return program.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, with the kernels that there are."""
    kernels = hostfiles.home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(kernels)
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


def parse(listing: bytes) -> Tree:
    """The lister's lines, with the first name of a link group in the place of its inode.

    The number of links counts those that a higher layer has hidden, and a directory's time may be
    that of its unpacking: both are left out.
    """
    found: Tree = {}
    first: dict[str, str] = {}
    for line in sorted(listing.decode().splitlines()):
        name, mode, owner, device, inode, mtime, *rest = line.split(" ")
        group = first.setdefault(inode.partition("*")[0], name)
        time = None if mode.startswith("4") else CLAMPED.get(name, int(mtime))
        found[name] = (mode, owner, device, group, time, *rest)
    return found


def unpacked(layout: Path, tag: str, bundle: Path, lister: bytes) -> Tree:
    """What umoci makes of an image."""
    command = ["umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle)]
    subprocess.run(command, check=True, capture_output=True)
    program = bundle / "lister"
    program.write_bytes(lister)
    program.chmod(0o755)
    done = subprocess.run([program, bundle / "rootfs"], check=True, capture_output=True)
    return parse(done.stdout)


async def in_guest(reference: str) -> Tree:
    """What a guest sees of an image that has the lister."""
    image = attrs.evolve(await prepare_image(reference), vcpus=VCPUS)
    async with Vm.start(image, VmConfig(memory_mib=512)) as vm:
        done = await vm.run_process(["/lister", "/"], capture_stdout=True)
    return parse(done.stdout)


def same(ours: Tree, theirs: Tree) -> None:
    assert ours
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if v != theirs[k]} == {
        k: v for k, v in theirs.items() if v != ours[k]
    }


async def test_nasty_layers_are_in_a_guest_what_umoci_unpacks(
    home: Path, tmp_path: Path, lister: bytes
) -> None:
    program = make_tar([member("lister", data=lister, mode=0o755)])
    layout = Layout(tmp_path / "layout")
    tars = [program, *nasty_layers.image_layers("cases")]
    config = {"Cmd": ["/lister", "/none"]}
    manifest = layout.manifest(tars, architecture=ARCHITECTURE, config=config, **layout.tagged("t"))
    reference = layout.write(manifest)
    theirs = unpacked(layout.path, "t", tmp_path / "bundle", lister)
    cases = {k: v for k, v in theirs.items() if k.startswith("./cases/")}
    ours = await in_guest(reference)
    same({k: v for k, v in ours.items() if k.startswith("./cases/")}, cases)
    assert len(cases) > 200
