"""What a guest sees of an image is what ``umoci unpack`` makes of it, file by file."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs
import pytest

from trio_supermachine import Vm, VmConfig
from trio_supermachine.api import unbaked_image
from trio_supermachine.host import files as hostfiles
from trio_supermachine.oci.platform import Platform

from ..support import GUEST_PROGRAMS, nasty_layers
from ..support.guests import VCPUS
from ..support.image_files import Layout

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
    source = GUEST_PROGRAMS / "lister.c"
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


async def in_guest(reference: str, lister: bytes) -> Tree:
    """What a guest sees of an image."""
    image = attrs.evolve(await unbaked_image(reference), vcpus=VCPUS)
    async with Vm.start(image, VmConfig(memory_mib=512)) as vm:
        await vm.write_file("/run/lister", lister, mode=0o755)  # which is no part of the image
        done = await vm.run_process(["/run/lister", "/"], capture_stdout=True)
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
    layout = Layout(tmp_path / "layout")
    tars = nasty_layers.image_layers("cases")
    manifest = layout.manifest(tars, architecture=ARCHITECTURE, **layout.tagged("t"))
    reference = layout.write(manifest)
    theirs = unpacked(layout.path, "t", tmp_path / "bundle", lister)
    cases = {k: v for k, v in theirs.items() if k.startswith("./cases/")}
    ours = await in_guest(reference, lister)
    same({k: v for k, v in ours.items() if k.startswith("./cases/")}, cases)
    assert len(cases) > 200


async def test_an_image_of_buildah_umoci_and_skopeo_is_in_a_guest_what_umoci_unpacks(
    home: Path, tmp_path: Path, lister: bytes
) -> None:
    layout = tmp_path / "layout"
    build_with_buildah(tmp_path, layout)
    change_with_umoci(tmp_path, layout)
    archive = f"oci-archive:{tmp_path}/image.tar:t"
    run("skopeo", "copy", "-q", "--insecure-policy", f"oci:{layout}:t", archive)
    theirs = unpacked(layout, "t", tmp_path / "bundle", lister)
    ours = await in_guest(archive, lister)
    image = {k: v for k, v in theirs.items() if k.startswith("./image")}
    same({k: v for k, v in ours.items() if k.startswith("./image")}, image)
    assert {"./image/kept/a", "./image/new", "./image/zones/UTC"} <= image.keys()
    assert not {"./image/gone", "./image/kept/b"} & image.keys()


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def build_with_buildah(scratch: Path, layout: Path) -> None:
    """An image with the tag ``t``, of two layers: the second removes files of the first."""
    tree = scratch / "tree"
    (tree / "kept").mkdir(parents=True)
    (tree / "gone/deep").mkdir(parents=True)
    for name in ("kept/a", "kept/b", "gone/deep/c"):
        (tree / name).write_text(name)
    os.link(tree / "kept/a", tree / "linked")
    os.setxattr(tree / "kept/a", "user.test", b"value")
    os.mknod(tree / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.chown(tree / "kept", 1000, 1001)
    (tree / "kept").chmod(0o2775)
    store: list[str | Path] = ["--root", scratch / "storage", "--runroot", scratch / "running"]
    store += ["--storage-driver", "vfs"]
    env = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    buildah = partial(run, "buildah", *store, env=env)
    buildah("from", "--name", "first", "scratch")
    buildah("copy", "first", str(tree), "/image")
    buildah("copy", "first", "/usr/share/zoneinfo", "/image/zones")
    buildah("commit", "-q", "first", "base")
    buildah("from", "--name", "second", "--pull-never", "localhost/base")
    root = Path(buildah("mount", "second").strip())
    shutil.rmtree(root / "image/gone")
    (root / "image/kept/b").unlink()
    (root / "image/new").symlink_to("kept/a")
    buildah("commit", "-q", "second", f"oci:{layout}:t")
    buildah("rm", "-a")


def change_with_umoci(scratch: Path, layout: Path) -> None:
    """One more layer on top of the image ``t``."""
    bundle = scratch / "changed"
    run("umoci", "unpack", "--image", f"{layout}:t", bundle)
    image = bundle / "rootfs/image"
    (image / "zones/Europe").rename(image / "zones/Elsewhere")
    shutil.rmtree(image / "zones/Africa")
    (image / "zones/Africa").write_text("a file now")
    shutil.rmtree(image / "zones/Asia")
    (image / "zones/Asia").symlink_to("Elsewhere")
    (image / "kept/a").chmod(0o4711)
    run("umoci", "repack", "--image", f"{layout}:t", bundle)
