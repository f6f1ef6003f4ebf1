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
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Rows, start

MIB = 1 << 20
LAYERS = 5
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

    layers, diff_ids = [], []
    for number in range(LAYERS):
        tar = make_layer(number, mib * MIB // LAYERS)
        diff_ids.append("sha256:" + hashlib.sha256(tar).hexdigest())
        layers.append(put(gzip.compress(tar, 6, mtime=0), "layer.v1.tar+gzip"))
    config = {
        "os": "linux",
        "architecture": "amd64",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode(), "config.v1+json"),
        "layers": layers,
    }
    index = {
        "schemaVersion": 2,
        "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json")],
    }
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return sum(layer["size"] for layer in layers)


@contextmanager
def registry(place: Path) -> Iterator[str]:
    """A registry on loopback; its host and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}, "level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(place / "storage")}},
        "http": {"addr": host},
    }
    (place / "registry.yml").write_text(json.dumps(config))
    with subprocess.Popen(
        ["docker-registry", "serve", str(place / "registry.yml")], stderr=subprocess.DEVNULL
    ) as server:
        try:
            name, port = host.split(":")
            while True:
                try:
                    socket.create_connection((name, int(port))).close()
                    break
                except ConnectionRefusedError:
                    if server.poll() is not None:
                        raise
                    time.sleep(0.02)
            yield host
        finally:
            server.kill()


def by_hand(reference: str, place: Path) -> None:
    """``skopeo copy``, and ``sqfstar`` for each layer."""
    layout = place / "by-hand"
    subprocess.run([*COPY, "--src-tls-verify=false", reference, f"oci:{layout}:x"], check=True)
    index = json.loads((layout / "index.json").read_bytes())
    blobs = layout / "blobs"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].replace(":", "/")).read_bytes())
    for layer in manifest["layers"]:
        blob = blobs / layer["digest"].replace(":", "/")
        with subprocess.Popen(["zcat", blob], stdout=subprocess.PIPE) as cat:
            subprocess.run(
                ["sqfstar", "-comp", "lz4", "-no-progress", "-quiet", f"{blob}.squashfs"],
                stdin=cat.stdout,
                stdout=subprocess.DEVNULL,
                check=True,
            )
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


async def main(mib: int, rounds: int) -> None:
    rows = Rows("ours")
    with tempfile.TemporaryDirectory(prefix="supermachine-benchmark-") as name:
        place = Path(name)
        stored = make_layout(place / "layout", mib)
        with registry(place) as host:
            reference = f"docker://{host}/benchmark:latest"
            push = [*COPY, "--dest-tls-verify=false", f"oci:{place / 'layout'}", reference]
            subprocess.run(push, check=True)
            rows.add("image, unpacked", mib, "MiB", by="-")
            rows.add("image, as it is stored", stored / MIB, "MiB", by="-")
            for _ in range(rounds):
                begin = time.perf_counter()
                by_hand(reference, place)
                rows.add("pull and convert", time.perf_counter() - begin, "s", by="hand")
                first, second, never, memory = ours(reference, place)
                rows.add("pull and convert", first, "s")
                rows.add("the same again, with MISSING", second * 1e3)
                rows.add("the same again, with NEVER", never * 1e3)
                rows.add("peak memory of the program", memory / 1024, "MiB")
    ratio = rows.median("pull and convert", by="ours") / rows.median("pull and convert", by="hand")
    rows.add("pull and convert: ours as a multiple of by hand", ratio, "times")
    rows.print()


if __name__ == "__main__":
    start(main, __doc__, mib=200, rounds=3)
