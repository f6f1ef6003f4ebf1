"""Guest files: whole, in streams, and atomically."""

from __future__ import annotations

import os
from typing import Any

import pytest

from trio_supermachine import FileTooLarge, Vm

pytestmark = [pytest.mark.vm, pytest.mark.lab]


async def test_what_is_written_is_read(vm: Vm) -> None:
    data = os.urandom(1_000_000)
    await vm.write_file("/tmp/data", data, mode=0o751)
    assert await vm.read_file("/tmp/data") == data
    done = await vm.run_process(["stat", "-c", "%a %s %U", "/tmp/data"], capture_stdout=True)
    assert done.stdout == b"751 1000000 root\n"
    await vm.write_file("/tmp/empty", b"")
    assert await vm.read_file("/tmp/empty") == b""


async def test_names_of_any_bytes(vm: Vm) -> None:
    for name in ("/tmp/ä ö\n'", b"/tmp/\xff\xfe"):
        await vm.write_file(name, b"x")
        assert await vm.read_file(name) == b"x"


async def test_failures_are_the_guests_errno(vm: Vm) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await vm.read_file("/no/such")
    assert caught.value.filename == "/no/such"
    with pytest.raises(IsADirectoryError):
        await vm.read_file("/tmp")
    with pytest.raises(FileNotFoundError):
        await vm.write_file("/no/such", b"")
    with pytest.raises(OSError):  # noqa: PT011 - read-only file system, or no permission
        await vm.write_file("/proc/new", b"")
    with pytest.raises(ValueError, match="null"):
        await vm.read_file("/tmp/\0")


async def test_text_is_to_be_encoded_by_the_caller(vm: Vm) -> None:
    text: Any = "text"
    with pytest.raises(TypeError, match=r"^data must be bytes, not str: write text\.encode\(\)$"):
        await vm.write_file("/tmp/text", text)
    with pytest.raises(FileNotFoundError):
        await vm.read_file("/tmp/text")


async def test_a_cap_is_an_error_never_a_truncation(vm: Vm) -> None:
    await vm.write_file("/tmp/data", b"x" * 100)
    assert len(await vm.read_file_with_max_bytes("/tmp/data", 100)) == 100
    with pytest.raises(FileTooLarge) as caught:
        await vm.read_file_with_max_bytes("/tmp/data", 99)
    assert (caught.value.max_bytes, caught.value.size) == (99, 100)
    async with vm.open_write("/tmp/large") as sink:
        for _ in range(33):
            await sink.send_all(bytes(1 << 20))
    with pytest.raises(FileTooLarge):
        await vm.read_file("/tmp/large")


async def test_streams_of_files(vm: Vm) -> None:
    async with vm.open_write("/tmp/big") as sink:
        for _ in range(64):
            await sink.send_all(bytes(range(256)) * 1024)
    async with vm.open_read("/tmp/big") as source:
        assert await source.receive_some(3) == b"\0\1\2"
        assert 3 + sum([len(chunk) async for chunk in source]) == 64 * 256 * 1024


async def test_a_failed_write_leaves_the_old_file_and_nothing_else(vm: Vm) -> None:
    await vm.run_process(["mkdir", "/tmp/d"])
    await vm.write_file("/tmp/d/file", b"old")
    with pytest.raises(KeyError):
        async with vm.open_write("/tmp/d/file") as sink:
            await sink.send_all(b"new")
            raise KeyError
    assert await vm.read_file("/tmp/d/file") == b"old"
    done = await vm.run_process(["ls", "-A", "/tmp/d"], capture_stdout=True)
    assert done.stdout == b"file\n"


async def test_a_full_disk_is_reported(vm: Vm) -> None:
    await vm.run_process(["sh", "-c", "mkdir /tmp/s && mount -t tmpfs -o size=64k none /tmp/s"])
    with pytest.raises(OSError, match="No space left"):
        await vm.write_file("/tmp/s/file", b"x" * 10_000_000)
    done = await vm.run_process(["ls", "-A", "/tmp/s"], capture_stdout=True)
    assert done.stdout == b""
