"""Layers as overlayfs sees them, against what umoci makes of the same image."""
# ruff: noqa: ASYNC221 (nothing else is to run meanwhile)

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.oci.platform import Platform

from ..support.image_files import Layout, make_tar, member, tree, unpack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")
DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
OPAQUE, ORIGIN = "trusted.overlay.opaque", "trusted.overlay.origin"

BASE = [
    member("./", DIR),
    member("etc/", DIR),
    member("etc/old", data=b"old"),
    member("etc/kept", data=b"kept"),
    member("tmp", DIR, mode=0o1777),
    member("owned", DIR, mode=0o2750, uid=1000, gid=100),
    member("owned/su", data=b"#!", mode=0o4755, uid=70000, gid=3_000_000),
    member("full", DIR),
    member("full/a", data=b"a"),
    member("full/b", data=b"b"),
    member("goes", DIR),
    member("goes/deep", data=b"x"),
    member("one", data=b"linked"),
    member("two", LNK, linkname="one"),
    member("etc/three", LNK, linkname="two"),
    member("sym", SYM, linkname="/etc/../../kept"),
    member("dev", DIR),
    member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o660, gid=6),
    member("pipe", tarfile.FIFOTYPE, mode=0o600),
    member("n" * 255, data=b"long"),
    member("/".join(["d" * 100] * 12) + "/end", data=b"deep"),
    member("sym-long", SYM, linkname="t/" * 400 + "x"),
    member("grüße-日本-🎉", data=b"unicode"),
    member("new\nline \\ tab\t", data=b"odd"),
    member("empty"),
    member("block", data=bytes(512)),
    member("big", data=os.urandom(3 << 20)),
    member(
        "capable",
        data=b"x",
        pax_headers={"SCHILY.xattr.user.name": "value"},
    ),
    member("twice", data=b"first"),
    member("twice", data=b"second", mode=0o600),
    member("was-dir", DIR),
    member("was-dir", data=b"now a file"),
]
UPPER = [
    member("etc/.wh.old"),
    member("full/.wh..wh..opq"),
    member("full/c", data=b"c"),
    member(".wh.goes"),
    member("goes", DIR, mode=0o700),
    member("goes/new", data=b"n"),
    member("owned/more", data=b"implied parent"),
    member("tmp/x", data=b"in a sticky directory"),
    member(".wh.two"),
    member("sym", data=b"a file now"),
    member(".wh.never-was"),
]


def overlay(layers: list[Path], dest: Path) -> Path:
    """Merge unpacked layers as overlayfs does."""
    dest.mkdir()
    links: dict[tuple[int, int], Path] = {}
    for layer in layers:
        for path in sorted([layer, *layer.rglob("*")]):
            to = dest / path.relative_to(layer)
            status = path.lstat()
            opaque = _take_marks(path)
            here = stat.S_ISDIR(status.st_mode)
            if os.path.lexists(to) and path != layer:
                if not to.is_dir() or to.is_symlink():
                    to.unlink()
                elif not here or opaque:
                    shutil.rmtree(to)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                continue
            first = links.setdefault((status.st_dev, status.st_ino), to)
            if not here and first != to:
                os.link(first, to, follow_symlinks=False)
                continue
            if here:
                to.mkdir(exist_ok=True)
            elif path.is_symlink():
                to.symlink_to(os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                shutil.copyfile(path, to)
            else:
                os.mknod(to, status.st_mode, status.st_rdev)
            os.chown(to, status.st_uid, status.st_gid, follow_symlinks=False)
            if not path.is_symlink():
                os.chmod(to, status.st_mode & 0o7777)
            for name in os.listxattr(path, follow_symlinks=False):
                value = os.getxattr(path, name, follow_symlinks=False)
                os.setxattr(to, name, value, follow_symlinks=False)
    return dest


def _take_marks(path: Path) -> bool:
    """Remove overlayfs's marks; whether the directory is opaque."""
    marks = {OPAQUE, ORIGIN} & set(os.listxattr(path, follow_symlinks=False))
    for mark in marks:
        os.removexattr(path, mark, follow_symlinks=False)
    return OPAQUE in marks


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
async def test_nasty_layers_are_what_umoci_makes_of_them(
    format: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    layout = Layout(tmp_path / "layout")
    tars = [make_tar(members, format) for members in (BASE, UPPER)]
    architecture = Platform.parse(None).architecture
    manifest = layout.manifest(tars, architecture=architecture, **layout.tagged("t"))
    image = await prepare_image(layout.write(manifest))
    bundle = tmp_path / "bundle"
    command = ["umoci", "unpack", "--image", f"{layout.path}:t", str(bundle)]
    subprocess.run(command, check=True, capture_output=True)
    parts = [unpack(layer, tmp_path / f"part{n}") for n, layer in enumerate(image.layers)]
    ours, theirs = tree(overlay(parts, tmp_path / "merged")), tree(bundle / "rootfs")
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if v != theirs[k]} == {
        k: theirs[k] for k, v in ours.items() if v != theirs[k]
    }


async def test_whiteouts_are_what_overlayfs_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    layout = Layout(tmp_path / "layout")
    architecture = Platform.parse(None).architecture
    tars = [make_tar(BASE), make_tar(UPPER)]
    image = await prepare_image(layout.write(layout.manifest(tars, architecture=architecture)))
    upper = unpack(image.layers[1], tmp_path / "upper")
    gone = (upper / "etc/old").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(upper / "full", OPAQUE) == b"y"
    assert os.getxattr(upper / "goes", OPAQUE) == b"y"
    assert not list(upper.rglob(".wh.*"))
    # Directories that the layer only implies keep what the layer below says of them.
    assert (upper / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert (upper / "owned").stat().st_uid == 1000


async def test_a_whiteout_below_what_is_no_directory_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    layout = Layout(tmp_path / "layout")
    upper = [
        member("full", data=b"was a directory"),
        member("full/.wh.a"),
        member("owned", SYM, linkname="etc"),
        member("owned/.wh.old"),
        member("goes/.wh.deep"),
        member("goes", SYM, linkname="etc"),
    ]
    architecture = Platform.parse(None).architecture
    tars = [make_tar(BASE), make_tar(upper)]
    image = await prepare_image(layout.write(layout.manifest(tars, architecture=architecture)))
    found = unpack(image.layers[1], tmp_path / "upper")
    assert sorted(os.listdir(found)) == ["full", "goes", "owned"]
    assert os.readlink(found / "owned") == os.readlink(found / "goes") == "etc"


async def test_marks_of_overlayfs_in_a_layer_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    layout = Layout(tmp_path / "layout")
    attribute = {"SCHILY.xattr." + OPAQUE: "y", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}
    members = [
        member("d", DIR, pax_headers=attribute),
        member("etc", tarfile.CHRTYPE, devmajor=0, devminor=0),
    ]
    architecture = Platform.parse(None).architecture
    tars = [make_tar(members)]
    image = await prepare_image(layout.write(layout.manifest(tars, architecture=architecture)))
    root = unpack(image.layers[0], tmp_path / "root")
    assert os.listdir(root) == ["d"]
    assert os.listxattr(root / "d") == []
