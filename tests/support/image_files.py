"""What tests of images share: layers and layouts of any content, and a way to read them back."""
# ruff: noqa: ASYNC240 (files are what is looked at)

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from trio_supermachine.images.content import ContentStore

Change = Callable[[dict[str, Any]], None]


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> Any:
    """A tar member and its content; ``fields`` are those of :class:`tarfile.TarInfo`."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime = kind, len(data), 1_000_000_000
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def make_tar(members: Iterable[Any], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layer(seed: str, size: int = 300_000) -> bytes:
    """A layer with a file of this size that does not compress, and one that ``seed`` is in."""
    data = b"".join(os.urandom(1 << 16) for _ in range(size >> 16)) or seed.encode()
    return make_tar([member(f"file-{seed}", data=data), member("same", data=seed.encode())])


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@attrs.define
class Layout:
    """An OCI layout that can be written wrongly on purpose."""

    path: Path

    def blob(self, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        """Store a blob; its descriptor."""
        digest = digest_of(data)
        place = self.path / "blobs/sha256"
        place.mkdir(parents=True, exist_ok=True)
        (place / digest[7:]).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data), **more}

    def file_of(self, digest: str) -> Path:
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def manifest(
        self,
        tars: Iterable[bytes],
        *,
        compress: Callable[[bytes], bytes] = lambda data: gzip.compress(data, mtime=0),
        architecture: str = "amd64",
        config: object = None,
        change_config: Change = lambda _: None,
        change_manifest: Change = lambda _: None,
        **more: Any,
    ) -> dict[str, Any]:
        """Store an image; its manifest's descriptor."""
        tars = list(tars)
        vendor = "application/vnd.oci.image."
        document: dict[str, Any] = {
            "os": "linux",
            "architecture": architecture,
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(t) for t in tars]},
        }
        change_config(document)
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": vendor + "manifest.v1+json",
            "config": self.blob(json.dumps(document).encode(), vendor + "config.v1+json"),
            "layers": [self.blob(compress(t), vendor + "layer.v1.tar+gzip") for t in tars],
        }
        change_manifest(manifest)
        return self.blob(json.dumps(manifest).encode(), vendor + "manifest.v1+json", **more)

    def write(self, *manifests: dict[str, Any]) -> str:
        """Write the index; the layout's reference."""
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "manifests": manifests}
        (self.path / "index.json").write_text(json.dumps(index))
        return f"oci:{self.path}"

    def tagged(self, tag: str) -> dict[str, Any]:
        return {"annotations": {"org.opencontainers.image.ref.name": tag}}


def unpack(layer: Path, dest: Path) -> Path:
    """Unpack a squashfs layer; as root, with all there is in it."""
    command = ["unsquashfs", "-no-progress", "-quiet", "-d", os.fspath(dest), os.fspath(layer)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dest


def store_files(home: Path) -> set[str]:
    """Everything in the store but empty lock files and directories."""
    return {
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and path.name != "lock"
    }


async def verify(home: Path) -> None:
    """Check that all that is in the store is what its name says, and that nothing else is."""
    store = ContentStore(home)
    for blob in (home / "content/blobs/sha256").glob("*"):
        assert await store.verify(f"sha256:{blob.name}")
    assert not list((home / "content/leases").glob("*"))
    assert not list((home / "content/locks").glob("*"))
    assert not list(home.rglob(".tmp-*"))


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """What there is below a directory: type, mode, owner, device, xattrs, links, content."""
    found: dict[str, tuple[object, ...]] = {}
    links: dict[tuple[int, int], str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = None
        first = name
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        if not stat.S_ISDIR(status.st_mode):
            first = links.setdefault((status.st_dev, status.st_ino), name)
        xattrs = {
            x: os.getxattr(path, x, follow_symlinks=False)
            for x in os.listxattr(path, follow_symlinks=False)
            if not x.startswith("security.selinux")
        }
        owner = (status.st_uid, status.st_gid)
        found[name] = (status.st_mode, owner, status.st_rdev, xattrs, first, content)
    return found
