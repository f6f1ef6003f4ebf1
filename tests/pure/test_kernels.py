"""Kernels: unpacking, modules, the initramfs, and the store that keeps them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine._util.progress import Progress
from trio_supermachine.errors import AssetNotFound
from trio_supermachine.guest import init_binary
from trio_supermachine.host.assets import AssetPaths, find_kernel, find_qemu
from trio_supermachine.host.files import home
from trio_supermachine.kernels import fetch_stock_kernel, list_kernels, prepare_kernel
from trio_supermachine.kernels.image import has_pvh_entry, read_kernel
from trio_supermachine.kernels.initramfs import build_initramfs
from trio_supermachine.kernels.modules import NEEDED, Module, pick_modules
from trio_supermachine.kernels.stock import newest_first
from trio_supermachine.kernels.versions import version_key


def elf(release: str = "6.9.1-test", *, pvh: bool = True, machine: int = 62) -> bytes:
    """A kernel as small as the reader looks at."""
    kind = 18 if pvh else 7
    note = struct.pack("<III", 4, 8, kind) + b"Xen\0" + bytes(8)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + program + note + f"Linux version {release} (someone)".encode()


def bzimage(payload: bytes, release: str = "6.9.1-test") -> bytes:
    """A bzImage around a compressed ELF image, as Documentation/arch/x86/boot.rst has it."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x20E, 0x100)
    setup[0x300 : 0x300 + 64] = f"{release} (someone) #1".encode().ljust(64, b"\0")
    struct.pack_into("<II", setup, 0x248, 16, len(payload))
    return bytes(setup) + bytes(16) + payload + bytes(32)


def with_size(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ) + with_size(data),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + with_size(data),
    "bzip2": lambda data: bz2.compress(data) + with_size(data),
    "zstd": lambda data: (
        zstandard.ZstdCompressor(write_content_size=False).compress(data) + with_size(data)
    ),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_elf_image_comes_out_of_a_bzimage(compression: str) -> None:
    image = read_kernel(bzimage(COMPRESSIONS[compression](elf())), "k")
    assert image.form == "elf"
    assert image.data == elf()
    assert image.release == "6.9.1-test"


@pytest.mark.parametrize(
    "payload",
    [
        b"\x02\x21\x4c\x18 lz4",
        gzip.compress(elf(pvh=False), mtime=0),
        gzip.compress(elf(), mtime=0)[:40],
        b"",
    ],
)
def test_what_cannot_be_taken_out_is_booted_as_it_is(payload: bytes) -> None:
    data = bzimage(payload)
    image = read_kernel(data, "k")
    assert (image.form, image.data, image.release) == ("bzimage", data, "6.9.1-test")


def test_an_elf_kernel_is_taken_as_it_is() -> None:
    assert read_kernel(elf(), "k").data == elf()


@pytest.mark.parametrize("data", [b"", b"text", elf(pvh=False), elf(machine=183), bytes(4096)])
def test_what_is_no_kernel_is_refused(data: bytes) -> None:
    with pytest.raises(AssetNotFound, match="my-file") as caught:
        read_kernel(data, "my-file")
    assert caught.value.asset == "kernel"


@given(st.binary(max_size=300), st.integers(0, 200))
def test_damaged_kernels_are_refused_or_read_but_never_break_the_reader(
    noise: bytes, where: int
) -> None:
    for whole in (elf(), bzimage(gzip.compress(elf()))):
        data = whole[:where] + noise + whole[where + len(noise) :]
        has_pvh_entry(data)
        try:
            read_kernel(data, "k")
        except AssetNotFound:
            pass


def module(name: str, depends: str = "") -> bytes:
    return f"\x7fELF...\0name={name}\0depends={depends}\0retpoline=Y\0".encode()


def test_modules_come_after_what_they_need_and_builtins_are_left_out(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel/drivers"
    kernel.mkdir(parents=True)
    (kernel / "a-b.ko.xz").write_bytes(lzma.compress(module("a_b", "c,d_e,built_in")))
    (kernel / "c.ko.gz").write_bytes(gzip.compress(module("c", "d_e")))
    (kernel / "d-e.ko").write_bytes(module("d_e"))
    zstd = zstandard.ZstdCompressor().compress(module("f"))
    (kernel / "f.ko.zst").write_bytes(zstd)
    (tmp_path / "modules.builtin").write_text("kernel/lib/built-in.ko\nkernel/g.ko\n")
    picked = pick_modules(tmp_path, ("g", "a_b", "f", "c"))
    assert [one.name for one in picked] == ["d_e", "c", "a_b", "f"]
    assert picked[2].data == module("a_b", "c,d_e,built_in")
    with pytest.raises(AssetNotFound, match="missing_one"):
        pick_modules(tmp_path, ("missing_one",))


def test_the_initramfs_unpacks_to_what_was_put_in(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("needs cpio")
    archive = build_initramfs(b"INIT!", [Module("m", b"12345"), Module("n", b"")])
    command = ["cpio", "--quiet", "-itv"]
    listed = subprocess.run(command, input=archive, capture_output=True, check=True)
    assert b"crw-------" in listed.stdout
    extract = ["cpio", "--quiet", "-id", "init", "modules/*"]
    subprocess.run(extract, cwd=tmp_path, input=archive, check=True)
    assert (tmp_path / "init").read_bytes() == b"INIT!"
    assert os.access(tmp_path / "init", os.X_OK)
    assert (tmp_path / "modules/m.ko").read_bytes() == b"12345"
    assert (tmp_path / "modules/order").read_text() == "m.ko\nn.ko\n"
    assert build_initramfs(b"INIT!", [Module("m", b"12345"), Module("n", b"")]) == archive


def test_the_newest_stock_kernel_is_preferred_and_old_ones_are_not_taken() -> None:
    names = [
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.9.7+deb12-cloud-amd64",
        "linux-image-6.12.9+deb12-cloud-amd64-unsigned",
        "linux-image-6.12.107+deb12-cloud-amd64-unsigned",
        "linux-image-6.12.107+deb12-cloud-amd64",
        "linux-image-6.12.200+deb12-amd64",
        "linux-image-6.12-cloud-amd64",
        "linux-image-6.12.201+deb12-cloud-amd64-dbg",
    ]
    assert newest_first(names) == [names[4], names[3], names[2]]


@given(st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=2, max_size=5))
def test_releases_sort_by_their_numbers(numbers: list[tuple[int, ...]]) -> None:
    releases = [f"{a}.{b}.{c}+deb12-cloud" for a, b, c in sorted(numbers)]
    assert sorted(releases, key=version_key) == releases


# The store.


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRIO_SUPERMACHINE_KERNEL", raising=False)
    monkeypatch.delenv("TRIO_SUPERMACHINE_OFFLINE", raising=False)
    return tmp_path / "home"


def strays(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name.startswith(".tmp-")]


async def test_a_named_kernel_is_prepared_once_and_again_when_it_changes(
    empty_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my kernel"
    path.write_bytes(bzimage(gzip.compress(elf())))
    assets = AssetPaths(kernel=path)
    first = await prepare_kernel(assets)
    assert first.kernel.read_bytes() == elf()
    assert (first.release, first.arch) == ("6.9.1-test", "x86_64")
    assert init_binary("x86_64").read_bytes() in first.initramfs.read_bytes()
    stamps = first.kernel.stat().st_mtime_ns, first.initramfs.stat().st_mtime_ns
    assert await prepare_kernel(assets) == first
    assert (first.kernel.stat().st_mtime_ns, first.initramfs.stat().st_mtime_ns) == stamps
    path.write_bytes(bzimage(gzip.compress(elf("6.10.0-other")), "6.10.0-other"))
    second = await prepare_kernel(assets)
    assert second.kernel != first.kernel
    assert second.release == "6.10.0-other"
    assert [kernel.release for kernel in await list_kernels()] == ["6.10.0-other", "6.9.1-test"]
    assert not any(kernel.stock for kernel in await list_kernels())
    assert not strays(empty_home)


async def test_modules_beside_a_named_kernel_are_taken_along(
    empty_home: Path, tmp_path: Path
) -> None:
    boot = tmp_path / "tree/boot"
    modules = tmp_path / "tree/lib/modules/6.9.1-test"
    boot.mkdir(parents=True)
    modules.mkdir(parents=True)
    (boot / "vmlinuz").write_bytes(elf())
    for name in NEEDED:
        (modules / f"{name}.ko").write_bytes(module(name))
    prepared = await prepare_kernel(AssetPaths(kernel=boot / "vmlinuz"))
    archive = prepared.initramfs.read_bytes()
    assert all(module(name) in archive for name in NEEDED)


async def test_a_kernel_that_was_kept_without_a_module_needed_now_is_prepared_anew(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "tree/boot"
    modules = tmp_path / "tree/lib/modules/6.9.1-test"
    boot.mkdir(parents=True)
    modules.mkdir(parents=True)
    (boot / "vmlinuz").write_bytes(elf())
    for name in NEEDED:
        (modules / f"{name}.ko").write_bytes(module(name))
    with monkeypatch.context() as patch:
        for where in ("store", "modules"):
            patch.setattr(f"trio_supermachine.kernels.{where}.NEEDED", NEEDED[:-1])
        patch.setattr("trio_supermachine.kernels.modules.pick_modules.__defaults__", (NEEDED[:-1],))
        await prepare_kernel(AssetPaths(kernel=boot / "vmlinuz"))
    assert await list_kernels() == []
    prepared = await prepare_kernel(AssetPaths(kernel=boot / "vmlinuz"))
    assert module(NEEDED[-1]) in prepared.initramfs.read_bytes()


async def test_the_environment_names_a_kernel_too(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "k"
    path.write_bytes(elf())
    monkeypatch.setenv("TRIO_SUPERMACHINE_KERNEL", str(path))
    assert (await prepare_kernel()).release == "6.9.1-test"
    other = tmp_path / "other"
    other.write_bytes(elf("6.9.2"))
    assert (await prepare_kernel(AssetPaths(kernel=other))).release == "6.9.2"
    monkeypatch.setenv("TRIO_SUPERMACHINE_KERNEL", str(tmp_path / "missing"))
    with pytest.raises(AssetNotFound, match="TRIO_SUPERMACHINE_KERNEL"):
        await prepare_kernel()


async def test_a_named_initramfs_is_used_as_it_is(empty_home: Path, tmp_path: Path) -> None:
    kernel, initramfs = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(elf())
    initramfs.write_bytes(b"mine")
    assets = AssetPaths(kernel=kernel, initramfs=initramfs)
    assert (await prepare_kernel(assets)).initramfs == initramfs


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


async def test_the_digests_are_those_of_the_files_as_they_are_now(
    empty_home: Path, tmp_path: Path
) -> None:
    kernel, initramfs = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(bzimage(gzip.compress(elf())))
    made = await prepare_kernel(AssetPaths(kernel=kernel))
    assert made.kernel_digest == sha256(made.kernel)
    assert made.initramfs_digest == sha256(made.initramfs)
    assets = AssetPaths(kernel=kernel, initramfs=initramfs)
    for content in (b"mine", b"mine, changed"):
        initramfs.write_bytes(content)
        named = await prepare_kernel(assets)
        assert named.kernel_digest == made.kernel_digest
        assert named.initramfs_digest == sha256(initramfs)


async def test_of_the_initramfs_files_of_older_versions_the_newest_stays(
    empty_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "k"
    path.write_bytes(elf())
    first = await prepare_kernel(AssetPaths(kernel=path))
    directory = first.initramfs.parent
    first.initramfs.rename(directory / "initramfs-1-newer.cpio")
    for age, name in enumerate(["initramfs-1-old.cpio", "initramfs-1-older.cpio"], 1):
        (directory / name).write_bytes(b"old")
        os.utime(directory / name, (1000 - age, 1000 - age))
    (directory / ".tmp-killed").write_bytes(b"half")
    assert await prepare_kernel(AssetPaths(kernel=path)) == first
    left = {file.name for file in directory.glob("*initramfs*")}
    assert left == {first.initramfs.name, "initramfs-1-newer.cpio"}
    assert not strays(empty_home)


async def test_what_another_version_left_is_replaced(empty_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(elf())
    first = await prepare_kernel(AssetPaths(kernel=path))
    (first.kernel.parent / "kernel.json").write_text('{"format": 0}')
    first.kernel.write_bytes(b"old")
    assert (await prepare_kernel(AssetPaths(kernel=path))).kernel.read_bytes() == elf()


async def test_a_file_that_is_no_kernel_leaves_nothing_in_the_store(
    empty_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "k"
    path.write_bytes(b"no")
    with pytest.raises(AssetNotFound):
        await prepare_kernel(AssetPaths(kernel=path))
    assert await list_kernels() == []
    assert not strays(empty_home)


async def test_offline_names_the_way_out(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", "1")
    with pytest.raises(AssetNotFound, match="TRIO_SUPERMACHINE_KERNEL=PATH"):
        await prepare_kernel()


async def test_a_host_without_apt_is_told_what_to_do(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetNotFound, match="no apt-get"):
        await prepare_kernel()


_FETCHES = """
import signal, trio
from trio_supermachine.kernels import prepare_kernel
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    trio.run(prepare_kernel)
except BaseException as exc:
    print(repr(exc))
"""


async def test_ctrl_c_during_a_download_is_a_bare_keyboard_interrupt(
    empty_home: Path, tmp_path: Path
) -> None:
    tools, began = tmp_path / "tools", tmp_path / "began"
    name = "linux-image-6.12.1-cloud-amd64"
    scripts = {
        "apt-cache": f'case "$1" in pkgnames) echo {name} ;; show) echo Package: {name} ;; esac',
        "apt-get": f"echo >{began}; exec sleep 1000",
        "dpkg-deb": "exit 1",
    }
    tools.mkdir()
    for tool, script in scripts.items():
        (tools / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tools / tool).chmod(0o755)
    os.mkfifo(began)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", _FETCHES]
    with trio.fail_after(60):
        async with (
            trio.lowlevel.FdStream(os.open(began, os.O_RDWR)) as pipe,
            trio.open_nursery() as nursery,
        ):

            async def interrupt() -> None:
                await pipe.receive_some(1)
                process.send_signal(signal.SIGINT)

            process = await nursery.start(
                partial(
                    trio.run_process, command, env=environment, stdout=subprocess.PIPE, check=False
                )
            )
            nursery.start_soon(interrupt)
            async with process.stdout as output:
                said = b"".join([chunk async for chunk in output])
    assert said == b"KeyboardInterrupt()\n"
    assert process.returncode == 0
    assert not strays(empty_home)


async def test_the_stock_kernel_is_downloaded_once_and_boots_by_pvh(
    empty_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt-get")
    told: list[Progress] = []

    async def progress(step: Progress) -> None:
        told.append(step)

    with trio.CancelScope() as scope:

        async def cancel(step: Progress) -> None:
            scope.cancel()

        await prepare_kernel(progress=cancel)
    assert scope.cancelled_caught
    assert await list_kernels() == []
    assert not strays(empty_home)

    results = []

    async def prepare() -> None:
        results.append(await prepare_kernel(progress=progress))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(prepare)
        nursery.start_soon(prepare)
    assert results[0] == results[1]
    assert has_pvh_entry(results[0].kernel.read_bytes())
    assert {step.phase for step in told} == {"download"}
    assert [step.done == step.total for step in told] == [False, True]
    (kernel,) = await list_kernels()
    assert kernel.stock
    assert kernel.modules[0] == "virtio_blk"
    assert await fetch_stock_kernel() == kernel
    assert capfd.readouterr().err == ""
    assert not strays(empty_home)
    assert kernel.directory.is_relative_to(home())


def test_explicit_places_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_argument, by_variable = tmp_path / "a", tmp_path / "b"
    for path in (by_argument, by_variable):
        path.touch()
    monkeypatch.setenv("TRIO_SUPERMACHINE_QEMU", str(by_variable))
    assert find_qemu() == by_variable
    assert find_qemu(AssetPaths(qemu=by_argument)) == by_argument
    monkeypatch.delenv("TRIO_SUPERMACHINE_KERNEL", raising=False)
    assert find_kernel() is None
    with pytest.raises(AssetNotFound, match=r"AssetPaths\.kernel"):
        find_kernel(AssetPaths(kernel=tmp_path / "missing"))
