"""Conversion of a layer to squashfs, beside plain ``sqfstar`` on the same tar stream."""
# ruff: noqa: ASYNC240 (nothing else is to run meanwhile)

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import trio

from trio_supermachine.oci.decompress import Blob
from trio_supermachine.oci.layer import DirectoryInfo
from trio_supermachine.oci.squashfs import convert

MIB = 1 << 20
SHAPES = {"4000 files of 4 KiB": (4000, 4096), "64 files of 1 MiB": (64, MIB)}
LZ4 = ("-comp", "lz4", "-no-progress", "-quiet")


def make(count: int, size: int) -> bytes:
    """A tar of files that compress by about a half."""
    source = random.Random(1)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"d{number % 100}/f{number}")
            info.size = size
            archive.addfile(info, io.BytesIO(source.randbytes(size // 2) + bytes(size - size // 2)))
    return out.getvalue()


def plain(tar: Path, dest: Path) -> float:
    """Seconds that ``sqfstar`` takes by itself, decompression included."""
    start = time.perf_counter()
    with subprocess.Popen(["zcat", "-f", tar], stdout=subprocess.PIPE) as cat:
        subprocess.run(
            ["sqfstar", *LZ4, dest], stdin=cat.stdout, stdout=subprocess.DEVNULL, check=True
        )
    return time.perf_counter() - start


async def ours(tar: Path, dest: Path) -> float:
    """Seconds of our conversion: hashed twice, checked, whiteouts translated."""
    start = time.perf_counter()
    blob = Blob(tar, 0, tar.stat().st_size)
    await convert(blob, dest, limit=1 << 40, resolve=lambda _: DirectoryInfo())
    return time.perf_counter() - start


async def main() -> None:
    print(f"{'layer':<28}{'MiB':>6}{'sqfstar s':>12}{'ours s':>9}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as name:
        for shape, (count, size) in SHAPES.items():
            data = make(count, size)
            for kind, content in (("tar", data), ("gzip", gzip.compress(data, 6))):
                tar = Path(name, "layer")
                tar.write_bytes(content)
                theirs, own = [], []
                for number in range(3):
                    dest = Path(name, f"out{number}")
                    theirs.append(plain(tar, dest))
                    os.unlink(dest)
                    own.append(await ours(tar, dest))
                    os.unlink(dest)
                a, b = min(theirs), min(own)
                label = f"{shape}, {kind}"
                print(f"{label:<28}{len(data) / MIB:>6.0f}{a:>12.2f}{b:>9.2f}{b / a:>8.2f}")


if __name__ == "__main__":
    trio.run(main)
