"""A pull from a registry, with its conversion, beside ``skopeo copy`` and ``sqfstar`` by hand.

The image is made up: layers of random, of compressible and of small files. Both sides begin with
nothing, and end with every layer as squashfs; ours runs in a program of its own, whose memory is
told too.
"""
# ruff: noqa: ASYNC221 (nothing else is to run meanwhile)

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import layers
from common import MIB, free_port, scratch, server, start
from table import Rows

NEEDS = (*layers.NEEDS, "skopeo", "docker-registry")
LAYERS = 5
PULL = "pull and convert"
VENDOR = "application/vnd.oci.image."
COPY = ("skopeo", "--insecure-policy", "copy", "--quiet")
OURS = """
import sys, time
from pathlib import Path
import trio
from trio_supermachine.api import PullPolicy
from trio_supermachine.api import unbaked_image

async def main():
    for policy in (PullPolicy.MISSING, PullPolicy.MISSING, PullPolicy.NEVER):
        begin = time.perf_counter()
        await unbaked_image(sys.argv[1], pull=policy)
        print(time.perf_counter() - begin)

trio.run(main)
# Not getrusage(2), which begins with the memory of whoever started the program.
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])
"""


def make_layer(number: int, size: int) -> bytes:
    """A tar of files; a third of it is noise, a third half noise, and a third repeats itself."""
    source = random.Random(number)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        count = 0
        while out.tell() < size:
            length = source.choice([2_000, 20_000, 200_000, 2_000_000])
            noise = source.randbytes(length)
            data = [noise, bytes(b & 15 for b in noise), noise[:64] * (length // 64)][count % 3]
            info = tarfile.TarInfo(f"layer{number}/d{count % 50}/f{count}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            count += 1
    return out.getvalue()


def make_layout(path: Path, mib: int) -> int:
    """An OCI layout of an image; the bytes of its layers as they are stored."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": VENDOR + kind, "digest": f"sha256:{digest}", "size": len(data)}

    stored, diff_ids = [], []
    for number in range(LAYERS):
        tar = make_layer(number, mib * MIB // LAYERS)
        diff_ids.append("sha256:" + hashlib.sha256(tar).hexdigest())
        stored.append(put(gzip.compress(tar, 6, mtime=0), "layer.v1.tar+gzip"))
    config = {
        "os": "linux",
        "architecture": "amd64",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode(), "config.v1+json"),
        "layers": stored,
    }
    index = {
        "schemaVersion": 2,
        "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json")],
    }
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return sum(layer["size"] for layer in stored)


@contextmanager
def registry(place: Path) -> Iterator[str]:
    """A registry on loopback; its host and port."""
    port = free_port()
    config = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}, "level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(place / "storage")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (place / "registry.yml").write_text(json.dumps(config))
    with server(["docker-registry", "serve", str(place / "registry.yml")], port):
        yield f"127.0.0.1:{port}"


def by_hand(reference: str, place: Path) -> None:
    """``skopeo copy``, and ``sqfstar`` for each layer."""
    layout = place / "by-hand"
    subprocess.run([*COPY, "--src-tls-verify=false", reference, f"oci:{layout}:x"], check=True)
    index = json.loads((layout / "index.json").read_bytes())
    blobs = layout / "blobs"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].replace(":", "/")).read_bytes())
    for layer in manifest["layers"]:
        blob = blobs / layer["digest"].replace(":", "/")
        layers.by_hand(blob, blob.with_suffix(".squashfs"))
    shutil.rmtree(layout)


def ours(reference: str, place: Path) -> list[float]:
    """Seconds of the first, the second and the third time, and the peak memory in KiB."""
    home = place / "home"
    done = subprocess.run(
        [sys.executable, "-c", OURS, reference],
        env={**os.environ, "TRIO_SUPERMACHINE_HOME": str(home)},
        stdout=subprocess.PIPE,
        check=True,
    )
    shutil.rmtree(home)
    return [float(line) for line in done.stdout.split()]


async def main(mib: int, rounds: int) -> AsyncIterator[Rows]:
    rows = Rows("ours")
    rows.compare(PULL, by="by hand")
    with scratch() as place:
        stored = make_layout(place / "layout", mib) / MIB
        rows.title = f"{rounds} rounds of an image of {mib} MiB, {stored:.0f} MiB as it is stored"
        with registry(place) as host:
            reference = f"docker://{host}/benchmark:latest"
            push = [*COPY, "--dest-tls-verify=false", f"oci:{place / 'layout'}", reference]
            subprocess.run(push, check=True)
            for _ in range(rounds):
                begin = time.perf_counter()
                by_hand(reference, place)
                rows.add(PULL, time.perf_counter() - begin, "s", by="by hand")
                first, second, never, memory = ours(reference, place)
                rows.add(PULL, first, "s")
                rows.add("the same again, with MISSING", second * 1e3)
                rows.add("the same again, with NEVER", never * 1e3)
                rows.add("peak memory of the program", memory / 1024, "MiB")
    yield rows


if __name__ == "__main__":
    start(main, __doc__, needs=NEEDS, mib=(200, 4), rounds=(3, 1))
