"""Conversion of a layer to squashfs, beside plain ``sqfstar`` on the same tar stream."""
# ruff: noqa: ASYNC240 (nothing else is to run meanwhile)

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from common import MIB, scratch, start
from table import Rows

from trio_supermachine.oci.decompress import Blob
from trio_supermachine.oci.layer_info import DirectoryInfo
from trio_supermachine.oci.squashfs import convert

#: A layer: what it is called, of how many files of which size.
SHAPES = (("small files", 4096, 4096), ("large files", 64, MIB))
LZ4 = ("-comp", "lz4", "-no-progress", "-quiet")
NEEDS = ("sqfstar",)


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


def by_hand(layer: Path, dest: Path) -> None:
    """``zcat`` and ``sqfstar``."""
    with subprocess.Popen(["zcat", "-f", os.fspath(layer)], stdout=subprocess.PIPE) as cat:
        command = ["sqfstar", *LZ4, os.fspath(dest)]
        subprocess.run(command, stdin=cat.stdout, stdout=subprocess.DEVNULL, check=True)


async def ours(layer: Path, dest: Path) -> None:
    """Our conversion: hashed twice, checked, whiteouts translated."""
    blob = Blob(layer, 0, layer.stat().st_size)
    await convert(blob, dest, limit=1 << 40, resolve=lambda _: DirectoryInfo())


async def main(rounds: int, percent: int) -> AsyncIterator[Rows]:
    rows = Rows(title=f"{rounds} rounds")
    with scratch() as place:
        layer, dest = place / "layer", place / "squashfs"
        for shape, count, size in SHAPES:
            data = make(count * percent // 100, size)
            for kind, content in (("tar", data), ("gzip", gzip.compress(data, 6))):
                name = f"{shape}, {len(data) / MIB:.1f} MiB, {kind}"
                rows.compare(name, by="sqfstar")
                layer.write_bytes(content)
                for _ in range(rounds):
                    with rows.timed(name, by="sqfstar"):
                        by_hand(layer, dest)
                    dest.unlink()
                    with rows.timed(name, by="ours"):
                        await ours(layer, dest)
                    dest.unlink()
    yield rows


if __name__ == "__main__":
    start(main, __doc__, needs=NEEDS, rounds=(3, 1), percent=(100, 2))
