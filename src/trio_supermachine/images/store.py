"""The store: squashfs layers by digest, shared between images and programs.

One lock guards the making of layers. An image's new layers are made in a scratch directory and
published together once all of them are sound, so a bad image leaves nothing; the next holder of
the lock removes what a killed program left. Reading needs no lock: names appear by a rename.

A layer may have directories that it only implies, with entries below them but none of their
own. Overlayfs would take their attributes from this layer, so they must be those of the layers
below, and such a layer has one file for each set of attributes that it met.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from .. import hostfiles
from ..oci.layer import DirectoryInfo, LayerInfo, Sink
from ..oci.malformed import MalformedError
from ..oci.manifest import LayerSource
from ..oci.progress import ProgressCallback, report
from ..oci.squashfs import convert, write_squashfs
from .verified import VerifiedBlobs

MAX_LAYER = 64 << 30  # bytes
_SCRATCH = ".tmp-"  # what hostfiles.sweep removes


class ImageStore:
    """The layers below a data directory.

    :param root: the directory; ``None`` is the library's own.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = hostfiles.home() if root is None else root
        self._layers = self.root / "layers"
        self._verified = VerifiedBlobs(self.root / "verified")

    @property
    def downloads(self) -> Path:
        """Where programs that were fetched for images are kept."""
        return self.root / "builtin"

    async def layers(
        self, sources: Iterable[LayerSource], progress: ProgressCallback | None = None
    ) -> tuple[Path, ...]:
        """The squashfs files of an image's layers, lowest first, made where they are missing.

        Cancellation ends the tool at work and leaves nothing behind.

        :raises MalformedError: a layer is damaged, or not the one that its digests say.
        """
        sources = tuple(sources)
        for source in sources:
            await self._verify(source, progress)
        lookup = _Lookup(self._layers / "sha256")
        found = await trio.to_thread.run_sync(lookup.all, sources)
        if found is not None:
            return found
        async with self._making() as scratch:
            lookup = _Lookup(self._layers / "sha256")
            for source in sources:
                if not await trio.to_thread.run_sync(lookup.add, source.diff_id):
                    await self._convert(source, lookup, scratch, progress)
            await trio.to_thread.run_sync(lookup.publish)
        return lookup.paths()

    async def made(self, kind: str, fingerprint: str, write: Callable[[Sink], None]) -> Path:
        """The squashfs file of a layer that ``write`` makes, unless it is there already.

        ``write`` runs in a worker thread; its errors pass through.
        """
        dest = self._layers / kind / f"{fingerprint}.squashfs"
        if not dest.exists():
            async with self._making() as scratch:
                if not dest.exists():
                    await write_squashfs(scratch / "layer", write)
                    dest.parent.mkdir(exist_ok=True)
                    await trio.to_thread.run_sync(_publish, {scratch / "layer": dest})
        return dest

    @asynccontextmanager
    async def _making(self) -> AsyncIterator[Path]:
        self._layers.mkdir(parents=True, exist_ok=True)
        async with hostfiles.locked(self._layers / "lock"):
            hostfiles.sweep(self._layers)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._layers) as scratch:
                yield Path(scratch)

    async def _verify(self, source: LayerSource, progress: ProgressCallback | None) -> None:
        """Check the blob of a layer that the store has, as :meth:`_convert` does the others'."""
        if not (self._layers / "sha256" / _info_name(source.diff_id)).exists():
            return
        size = source.blob.size
        if not self._verified.known(source):
            await report(progress, "verify", source.diff_id, 0, size)
            await trio.to_thread.run_sync(self._verified.verify, source, MAX_LAYER)
        await report(progress, "verify", source.diff_id, size, size)

    async def _convert(
        self,
        source: LayerSource,
        lookup: _Lookup,
        scratch: Path,
        progress: ProgressCallback | None,
    ) -> None:
        size = source.blob.size
        await report(progress, "convert", source.diff_id, 0, size)
        temporary = scratch / f"{len(lookup.found)}.squashfs"
        before = self._verified.identity(source.blob)
        done = await convert(source.blob, temporary, limit=MAX_LAYER, resolve=lookup.resolve)
        source.check(done.blob_digest, done.diff_id)
        self._verified.remember(source, before)
        lookup.add_new(source.diff_id, done.info, temporary)
        await report(progress, "convert", source.diff_id, size, size)


@attrs.define
class _Found:
    path: Path
    info: LayerInfo


class _Lookup:
    """One image's layers as they are found or made, from the lowest up."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.found: list[_Found] = []
        self._new: dict[Path, Path] = {}
        self._new_infos: dict[str, LayerInfo] = {}

    def all(self, sources: Iterable[LayerSource]) -> tuple[Path, ...] | None:
        """All layers, if the store has them."""
        return self.paths() if all(self.add(source.diff_id) for source in sources) else None

    def add(self, diff_id: str) -> bool:
        """Take a layer that is there already; false if it is not."""
        info = self._new_infos.get(diff_id) or _read_info(self._directory / _info_name(diff_id))
        if info is None:
            return False
        path = self._path(diff_id, info)
        if not path.exists() and path not in self._new.values():
            return False
        self.found.append(_Found(path, info))
        return True

    def add_new(self, diff_id: str, info: LayerInfo, temporary: Path) -> None:
        """Take a layer that was just made."""
        path = self._path(diff_id, info)
        self._new[temporary] = path
        self._new_infos[diff_id] = info
        self.found.append(_Found(path, info))

    def paths(self) -> tuple[Path, ...]:
        """The files, without those that an opaque root above them hides."""
        first = max((n for n, f in enumerate(self.found) if f.info.root_opaque), default=0)
        return tuple(f.path for f in self.found[first:])

    def resolve(self, path: bytes) -> DirectoryInfo:
        """What the layers below say of a directory."""
        for layer in reversed(self.found):
            if (info := layer.info.directories.get(path)) is not None:
                return info
        return DirectoryInfo()

    def publish(self) -> None:
        """Give the new layers their names; a layer's description follows its file."""
        self._directory.mkdir(exist_ok=True)
        _publish(self._new)
        for diff_id, info in self._new_infos.items():
            with hostfiles.new_file(self._directory / _info_name(diff_id)) as new:
                new.write_text(_dump_info(info))

    def _path(self, diff_id: str, info: LayerInfo) -> Path:
        stem = _hex(diff_id)
        met = {path: self.resolve(path) for path in info.implied}
        if any(attributes != DirectoryInfo() for attributes in met.values()):
            stem += "-" + hashlib.sha256(_dump(met).encode()).hexdigest()[:16]
        return self._directory / f"{stem}.squashfs"


def _publish(files: Mapping[Path, Path]) -> None:
    for temporary, dest in files.items():
        with hostfiles.new_file(dest) as new:
            temporary.replace(new)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _info_name(diff_id: str) -> str:
    return _hex(diff_id) + ".json"


def _dump(directories: Mapping[bytes, DirectoryInfo]) -> str:
    return json.dumps(
        {
            os.fsdecode(path): [
                i.mode,
                i.uid,
                i.gid,
                i.mtime,
                {os.fsdecode(k): v.hex() for k, v in sorted(i.xattrs.items())},
            ]
            for path, i in sorted(directories.items())
        }
    )


def _dump_info(info: LayerInfo) -> str:
    implied = [os.fsdecode(path) for path in info.implied]
    return json.dumps([info.root_opaque, implied, json.loads(_dump(info.directories))])


def _read_info(path: Path) -> LayerInfo | None:
    try:
        opaque, implied, directories = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise MalformedError(f"the store's {path} is damaged; remove it") from None
    return LayerInfo(
        {
            os.fsencode(name): DirectoryInfo(
                mode, uid, gid, mtime, {os.fsencode(k): bytes.fromhex(v) for k, v in xattrs.items()}
            )
            for name, (mode, uid, gid, mtime, xattrs) in directories.items()
        },
        tuple(os.fsencode(name) for name in implied),
        opaque,
    )
