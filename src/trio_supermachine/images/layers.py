"""The image store: layers as squashfs files, by digest, shared between images and programs.

A lock for each layer guards its making, so that different images are made side by side. Who needs
several locks takes them in the order of their names, so that nobody waits in a circle. An image's
new layers are made in a scratch directory, and published together once all of them are sound: a
bad image leaves nothing. The scratch directory is marked as used; whoever makes layers next removes
those that killed programs left. Readers need no lock, since names appear by a rename.

A layer may *imply* directories: it has entries below them, but none of their own. Overlayfs takes
the attributes of a directory from the uppermost layer that has it, which is then this one. So the
squashfs file must have the attributes that the layers below give that directory; and where a layer
below has a symbolic link instead, the entries go where the link leads. What a layer becomes depends
on the layers below it, and there is one file for each result: the digest of the attributes and
links that the layer met is a part of the file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from .._util.progress import ProgressCallback, report
from ..host import files as hostfiles
from ..host.locks import exclusive, in_use, locked, unused
from ..oci import MalformedError
from ..oci.layer_info import DirectoryInfo, LayerInfo, Link
from ..oci.manifest import LayerSource
from .limits import max_layer
from .verified import VerifiedBlobs

if TYPE_CHECKING:
    from ..oci.layer import Sink

_SCRATCH = ".tmp-"  # as the temporary names that hostfiles.sweep removes


class ImageStore:
    """The layers below a data directory.

    :param root: the directory; ``None`` is the library's own.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root: Path = hostfiles.home() if root is None else root
        self._layers = self.root / "layers"
        self._verified = VerifiedBlobs(self.root / "verified")

    @property
    def downloads(self) -> Path:
        """The directory of programs that were fetched for images."""
        return self.root / "builtin"

    async def layers(
        self, sources: Iterable[LayerSource], progress: ProgressCallback | None = None
    ) -> tuple[Path, ...]:
        """Give the squashfs files of an image's layers, lowest first. Make those that are missing.

        Cancellation ends the tool at work and leaves nothing.

        :raises MalformedError: a layer is damaged, or not the one that its digests say.
        """
        sources = tuple(sources)
        for source in sources:
            await self._verify(source, progress)
        mine: set[str] = set()  # the layers that are this call's to make
        while True:
            lookup = _Lookup(self._layers / "sha256")
            missing = await trio.to_thread.run_sync(lookup.missing, sources)
            if not missing:
                return lookup.paths()
            mine |= missing
            async with self._making(mine) as scratch:
                lookup = _Lookup(self._layers / "sha256")
                for source in sources:
                    if not await trio.to_thread.run_sync(lookup.add, source.diff_id):
                        if source.diff_id not in mine:
                            break  # above the new layers it has another file; lock it, too
                        await self._convert(source, lookup, scratch, progress)
                else:
                    await trio.to_thread.run_sync(lookup.publish)

    async def made(self, kind: str, fingerprint: str, write: Callable[[Sink], None]) -> Path:
        """Give the squashfs file of a layer that ``write`` makes, unless it is there already.

        ``write`` runs in a worker thread. Its errors pass through.
        """
        # A caller comes again when somebody removes the file; let that program run meanwhile.
        await trio.lowlevel.checkpoint()
        while (found := self.find_made(kind, fingerprint)) is None:
            async with self._making([fingerprint]) as scratch:
                if self.find_made(kind, fingerprint) is None:
                    from ..oci.squashfs import write_squashfs  # each layer comes here once

                    await write_squashfs(scratch / "layer", write)
                    dest = self._made(kind, fingerprint)
                    dest.parent.mkdir(exist_ok=True)
                    await trio.to_thread.run_sync(_publish, {scratch / "layer": dest})
        return found

    def find_made(self, kind: str, fingerprint: str) -> Path | None:
        """Find the file that :meth:`made` gives, if it is there already."""
        path = self._made(kind, fingerprint)
        return path if path.exists() else None

    def _made(self, kind: str, fingerprint: str) -> Path:
        return self._layers / kind / f"{fingerprint}.squashfs"

    @asynccontextmanager
    async def _making(self, names: Iterable[str]) -> AsyncIterator[Path]:
        """Hold the locks of layers, and give a directory to make them in."""
        async with AsyncExitStack() as stack:
            for name in sorted(set(names)):
                await stack.enter_async_context(exclusive(self.lock_of(_hex(name))))
            self._layers.mkdir(parents=True, exist_ok=True)
            async with locked(self._layers / "lock"):
                self._sweep()
                scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._layers))
                stack.callback(shutil.rmtree, scratch, ignore_errors=True)
                stack.enter_context(in_use(scratch))
            yield scratch

    def lock_of(self, name: str) -> Path:
        """Give the path of the lock for layers whose file names begin with ``name``."""
        return self._layers / "locks" / name

    async def sweep(self) -> None:
        """Remove scratch directories that killed programs left."""
        if self._layers.is_dir():
            async with locked(self._layers / "lock"):
                self._sweep()

    def _sweep(self) -> None:
        for stray in self._layers.glob(_SCRATCH + "*"):
            with unused(stray) as abandoned:
                if abandoned:
                    shutil.rmtree(stray, ignore_errors=True)

    async def _verify(self, source: LayerSource, progress: ProgressCallback | None) -> None:
        """Check the blob of a layer that is made already; :meth:`_convert` checks the others'."""
        if source.checked:
            return  # nobody reads the blob: its diff_id names the layer that is made
        if not (self._layers / "sha256" / _info_name(source.diff_id)).exists():
            return
        size = source.blob.size
        if not self._verified.known(source):
            await report(progress, "verify", source.diff_id, 0, size)
            await trio.to_thread.run_sync(self._verified.verify, source, max_layer())
        await report(progress, "verify", source.diff_id, size, size)

    async def _convert(
        self,
        source: LayerSource,
        lookup: _Lookup,
        scratch: Path,
        progress: ProgressCallback | None,
    ) -> None:
        from ..oci.squashfs import convert  # each layer comes here once

        size = source.blob.size
        await report(progress, "convert", source.diff_id, 0, size)
        temporary = scratch / f"{len(lookup.found)}.squashfs"
        before = None if source.checked else self._verified.identity(source.blob)
        done = await convert(source.blob, temporary, limit=max_layer(), resolve=lookup.resolve)
        source.check(done.blob_digest, done.diff_id)
        if before is not None:
            self._verified.remember(source, before)
        lookup.add_new(source.diff_id, done.info, temporary)
        await report(progress, "convert", source.diff_id, size, size)


@attrs.define
class _Found:
    path: Path
    info: LayerInfo


class _Lookup:
    """Lookup of one image's layers, found or newly made, from the lowest up."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.found: list[_Found] = []
        self._new: dict[Path, Path] = {}
        self._new_infos: dict[str, LayerInfo] = {}

    def missing(self, sources: Iterable[LayerSource]) -> set[str]:
        """Take the layers that are there, and give the digests of the others."""
        return {source.diff_id for source in sources if not self.add(source.diff_id)}

    def add(self, diff_id: str) -> bool:
        """Take a layer that is there already; give false if it is not."""
        info = self._new_infos.get(diff_id) or _read_info(self._directory / _info_name(diff_id))
        if info is None:
            return False
        path = self._path(diff_id, info)
        if not path.exists() and path not in self._new.values():
            return False
        self.found.append(_Found(path, info))
        return True

    def add_new(self, diff_id: str, info: LayerInfo, temporary: Path) -> None:
        """Take a layer that was just made under a temporary name."""
        path = self._path(diff_id, info)
        self._new[temporary] = path
        self._new_infos[diff_id] = info
        self.found.append(_Found(path, info))

    def paths(self) -> tuple[Path, ...]:
        """Give the files, without those that an opaque root above them hides."""
        first = max((n for n, f in enumerate(self.found) if f.info.root_opaque), default=0)
        return tuple(f.path for f in self.found[first:])

    def resolve(self, path: bytes) -> DirectoryInfo | Link:
        """Find what the layers below have in the place of an implied directory."""
        for layer in reversed(self.found):
            if (found := layer.info.find(path)) is not None:
                return found
            if layer.info.hides(path):
                break
        return DirectoryInfo()

    def publish(self) -> None:
        """Give the new layers their names: first each file, then its description."""
        self._directory.mkdir(exist_ok=True)
        _publish(self._new)
        for diff_id, info in self._new_infos.items():
            with hostfiles.new_file(self._directory / _info_name(diff_id)) as new:
                new.write_text(_dump_info(info))

    def _path(self, diff_id: str, info: LayerInfo) -> Path:
        stem = _hex(diff_id)
        met = {path: self.resolve(path) for path in info.implied + info.followed}
        directories = {path: at for path, at in met.items() if isinstance(at, DirectoryInfo)}
        links = {path: at.target for path, at in met.items() if isinstance(at, Link)}
        if links or info.hidden or any(at != DirectoryInfo() for at in directories.values()):
            seen = _dump(directories) + (_dump_links(links) if links or info.hidden else "")
            stem += "-" + hashlib.sha256(seen.encode()).hexdigest()[:16]
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


def _dump_links(links: Mapping[bytes, bytes]) -> str:
    return json.dumps({os.fsdecode(k): os.fsdecode(v) for k, v in sorted(links.items())})


def _dump_info(info: LayerInfo) -> str:
    implied = [os.fsdecode(path) for path in info.implied]
    hidden = [os.fsdecode(path) for path in sorted(info.hidden)]
    followed = [os.fsdecode(path) for path in info.followed]
    links = json.loads(_dump_links(info.links))
    directories = json.loads(_dump(info.directories))
    return json.dumps([info.root_opaque, implied, directories, links, hidden, followed])


def _read_info(path: Path) -> LayerInfo | None:
    try:
        parts = json.loads(path.read_bytes())
        if not isinstance(parts, list):
            raise ValueError
        if len(parts) == 3:
            return None  # by an earlier version, which did not note links
        opaque, implied, directories, links, hidden, followed = parts
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
        {os.fsencode(name): os.fsencode(target) for name, target in links.items()},
        frozenset(map(os.fsencode, hidden)),
        tuple(map(os.fsencode, followed)),
    )
