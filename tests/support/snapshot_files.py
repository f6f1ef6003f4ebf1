"""Real snapshot directories, without a guest: their device state and memory are made up."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import trio

from trio_supermachine.oci.config import ImageConfig
from trio_supermachine.snapshots import (
    Draft,
    MemoryImage,
    Snapshot,
    finish_diff,
    finish_full,
    layer_refs,
    new_snapshot,
    open_snapshot,
)
from trio_supermachine.snapshots.pages import PAGE, Run

MIB = 1 << 20
PAGES = MIB // PAGE  # of the smallest guest, which these have


def draft(**changes: Any) -> Draft:
    """A description of a guest with 1 MiB of memory."""
    known: dict[str, Any] = {
        "engine": "qemu",
        "host": {"version": "7.2", "cpu": "max"},
        "kernel": hashlib.sha256(b"kernel").hexdigest(),
        "initramfs": hashlib.sha256(b"initramfs").hexdigest(),
        "kernel_release": "6.1.0",
        "memory_mib": 1,
        "vcpus": 1,
        "hostname": "supermachine",
        "image_reference": "builtin:busybox",
        "image_digest": "sha256:" + hashlib.sha256(b"image").hexdigest(),
        "image_config": ImageConfig(env=("A=b",), cmd=("sh",), exposed_ports=("80/tcp",)),
        "created_at": 1_700_000_000,
    }
    return Draft(**known | changes)


def page(content: int | bytes) -> bytes:
    """A page that is recognised by its content."""
    data = content.to_bytes(8, "little") if isinstance(content, int) else content
    return (data * PAGE)[:PAGE]


def write_sparse(path: Path, memory: bytes) -> None:
    """Write memory as an engine does: pages that are zero become holes."""
    with path.open("wb") as file:
        file.truncate(len(memory))
        for offset in range(0, len(memory), PAGE):
            data = memory[offset : offset + PAGE]
            if any(data):
                file.seek(offset)
                file.write(data)


async def write_full(
    dest: Path, memory: bytes, *, state: bytes = b"device state", layers: tuple[Path, ...] = ()
) -> Snapshot:
    """Make a full snapshot."""
    async with new_snapshot(dest) as directory:
        (directory / "restore.snap").write_bytes(state)
        write_sparse(directory / "memory.bin", memory)
        await finish_full(directory, draft(layers=await layer_refs(layers)))
    return await open_snapshot(dest)


async def write_diff(
    dest: Path,
    base: Snapshot,
    memory: bytes,
    runs: tuple[Run, ...] | None = None,
    *,
    state: bytes = b"device state, later",
) -> Snapshot:
    """Make a diff of which only ``runs`` were captured, or everything that is not zero."""
    async with new_snapshot(dest) as directory:
        (directory / "restore.snap").write_bytes(state)
        captured = bytearray(len(memory))
        for start, count in ((0, PAGES),) if runs is None else runs:
            place = slice(start * PAGE, (start + count) * PAGE)
            captured[place] = memory[place]
        write_sparse(directory / "memory.bin", bytes(captured))
        await finish_diff(directory, draft(), runs or (), base, complete=runs is None)
    return await open_snapshot(dest)


def read_memory(image: MemoryImage) -> bytes:
    """What a restored guest would find in its memory."""
    with image.reader() as reader:
        return reader.read(0, image.size // PAGE)


async def until_settled(path: Path) -> None:
    """Wait until a file is old enough for its time stamps to tell later changes."""
    age = time.time_ns() - os.stat(path).st_ctime_ns
    await trio.sleep(max(0, 50_000_000 - age) / 1e9)
