"""Removal of bakes, layers and pulled images, while other programs use them.

Files that another program has open stay readable for it; so a VM that runs is not disturbed. These
orders keep what somebody is about to use:

- A bake that is being made is locked, and is left alone.
- Whoever makes a bake marks its layers as used, and keeps the mark until the bake is published. A
  layer is removed only if nobody makes it or marks it, and if no bake refers to it that is looked
  up *after* that: either the mark is seen, or the bake.
- Blobs of pulled images are removed when no name stands for them and no pull needs them
  (:mod:`~trio_supermachine.images.content`). Bakes and layers do not need them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import trio

from ..bake.store import Bake, BakeStore
from ..errors import ImageNotFound, ReferenceInvalid, SnapshotIncompatible
from ..host import files as hostfiles
from ..host.locks import try_exclusive, unused
from ..images.content import ContentStore
from ..images.layers import ImageStore
from ..images.pull import find_pulled, name_of
from ..oci import MalformedError
from ..oci.platform import Platform
from ..oci.reference import Reference, Transport
from ..snapshots import Metadata

#: Seconds for which a bake without a name is kept after its last use.
KEPT_UNUSED: Final = 7 * 24 * 3600.0

_RECORDS_KEPT: Final = 30 * 24 * 3600.0  # seconds; without its record a file is read once more
_STRAYS_KEPT: Final = 3600.0  # seconds; nobody takes as long to write a small file
_MIN_PREFIX: Final = 6  # digits of a fingerprint
_TOGETHER: Final = 64  # layers that are locked at once

_Key = tuple[str, str]  # a layer by its directory's name and its own


@attrs.frozen(kw_only=True)
class Removed:
    """The things that were removed, or would be.

    :ivar busy: bakes that were left because somebody is making them.
    :ivar names: the names of images that were pulled or loaded.
    :ivar blobs: the digests of blobs that only these images needed, or nobody.
    :ivar size: the size of all, in bytes on the disk.
    """

    bakes: tuple[Bake, ...]
    layers: tuple[Path, ...]
    busy: tuple[Bake, ...] = ()
    names: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    size: int


async def prune(*, everything: bool = False, dry_run: bool = False) -> Removed:
    """Remove what nobody needs any more.

    That is: bakes without a name that were not used lately, damaged bakes, layers that no bake
    needs, and blobs of images whose name stands for another image by now. Cancelled, this has
    removed a part.

    :param everything: remove all bakes, also named and used ones, and all pulled images.
    :param dry_run: only tell what would be removed.
    """
    bakes = await BakeStore().list()
    oldest = time.time() - KEPT_UNUSED
    going = [
        bake
        for bake in bakes
        if everything or _is_damaged(bake) or (not bake.names and bake.used_at < oldest)
    ]
    removed = await _remove(going, None, dry_run=dry_run)
    names = [record.name for record in ContentStore().records()] if everything else []
    removed = await _forget(removed, names, dry_run=dry_run)
    if not dry_run:
        for bake in bakes:
            if bake.damaged and bake not in going:
                await trio.to_thread.run_sync(BakeStore().remove_damaged, bake)
        await trio.to_thread.run_sync(_tidy)
        await ImageStore().sweep()
    return removed


async def remove(wanted: Iterable[str]) -> Removed:
    """Remove bakes and pulled images by names, references or beginnings of fingerprints.

    A reference to a registry stands for the image that was pulled by it, and for its bakes. A name
    that is one of several names of a bake is removed alone. Layers that only the removed bakes and
    images needed are removed with them, and so are blobs that no other pulled image has.

    :raises ImageNotFound: a text stands for nothing, or for several fingerprints; then nothing is
        removed.
    """
    store = BakeStore()
    bakes = await store.list()
    pulled = {record.name for record in ContentStore().records()}
    names: dict[str, set[str]] = {}
    going: dict[str, Bake] = {}
    forgotten: dict[str, None] = {}
    for text in wanted:
        if (pulled_name := _pulled_name(text)) in pulled and pulled_name is not None:
            forgotten[pulled_name] = None
        try:
            found = find(bakes, text)
        except ImageNotFound:
            if pulled_name not in forgotten:
                raise
            continue
        if len(found) == 1 and text in found[0].names:
            bake = found[0]
            names.setdefault(bake.fingerprint, set()).add(text)
            if names[bake.fingerprint] != set(bake.names):
                continue
        going.update((bake.fingerprint, bake) for bake in found)
    for fingerprint, some in names.items():
        if fingerprint not in going:
            for name in some:
                store.remove_name(name)
    layers = {
        _key(ref.path) for bake in going.values() if bake.metadata for ref in bake.metadata.layers
    }
    stems = await trio.to_thread.run_sync(_stems, list(forgotten))
    stems -= await trio.to_thread.run_sync(_stems, list(pulled.difference(forgotten)))
    layers |= {_key(path) for path in _layers(None) if _stem(path) in stems}
    removed = await _remove(list(going.values()), layers, dry_run=False)
    return await _forget(removed, list(forgotten), dry_run=False) if forgotten else removed


def find(bakes: Sequence[Bake], text: str) -> list[Bake]:
    """Find bakes by their name, else by a reference, else by the beginning of a fingerprint.

    :raises ImageNotFound: there is none, or more than one fingerprint begins so.
    """
    if named := [bake for bake in bakes if text in bake.names]:
        return named
    if of := [bake for bake in bakes if bake.metadata and _is_of(bake.metadata, text)]:
        return of
    begin = [bake for bake in bakes if bake.fingerprint.startswith(text)]
    if len(text) < _MIN_PREFIX or not begin:
        raise ImageNotFound(
            text,
            "no image or bake has this name, reference or fingerprint; trio-supermachine images"
            " lists them",
        )
    if len(begin) > 1:
        raise ImageNotFound(text, f"{len(begin)} fingerprints begin so; give more digits")
    return begin


def _is_of(metadata: Metadata, text: str) -> bool:
    reference = metadata.image_reference
    name = _pulled_name(text)
    return reference == text or (name is not None and _pulled_name(reference) == name)


def _pulled_name(text: str) -> str | None:
    """Give the full name of an image in a registry, if ``text`` is a reference to one."""
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        return None
    return name_of(reference) if reference.transport is Transport.DOCKER else None


def _stems(names: Iterable[str]) -> set[str]:
    """Give the digests with which the file names of pulled images' layers begin."""
    content, platform = ContentStore(), Platform.parse(None)
    found: set[str] = set()
    for name in names:
        try:
            choice = find_pulled(content, Reference.parse(name), platform)
        except (ImageNotFound, MalformedError):
            continue  # it does not run here, or is damaged: prune removes its layers
        if choice is not None:
            found.update(diff_id.partition(":")[2] for _, diff_id in choice.layers)
    return found


async def _forget(removed: Removed, names: Sequence[str], *, dry_run: bool) -> Removed:
    """Remove pulled images, too, and blobs that no name stands for."""
    content = ContentStore()
    if names and not dry_run:
        await content.remove_records(names)
    # A pull of one of these that runs meanwhile has a lease, and gives the image its name again.
    collected = await content.collect(dry_run=dry_run, without=names if dry_run else ())
    return attrs.evolve(
        removed, names=tuple(names), blobs=collected.digests, size=removed.size + collected.size
    )


async def _remove(going: Sequence[Bake], only: set[_Key] | None, *, dry_run: bool) -> Removed:
    store = BakeStore()
    gone, busy = [], []
    for bake in going:
        if dry_run or await trio.to_thread.run_sync(store.remove, bake.fingerprint):
            gone.append(bake)
        else:
            busy.append(bake)
    layers = _layers(only)
    size = sum(bake.size for bake in gone)
    sizes = {layer: allocated_file(layer) for layer in layers}
    if dry_run:
        needed = await _needed(frozenset(bake.fingerprint for bake in gone))
        removed = [] if needed is None else [p for p in layers if _key(p) not in needed]
    else:
        removed = []
        for first in range(0, len(layers), _TOGETHER):
            removed += await _remove_layers(layers[first : first + _TOGETHER])
    size += sum(sizes[layer] for layer in removed)
    return Removed(bakes=tuple(gone), layers=tuple(removed), busy=tuple(busy), size=size)


async def _remove_layers(layers: Sequence[Path]) -> list[Path]:
    """Remove those of ``layers`` that nobody needs."""
    images = ImageStore()
    (images.lock_of("x").parent).mkdir(parents=True, exist_ok=True)
    removed = []
    with ExitStack() as stack:
        making = {
            stem: stack.enter_context(try_exclusive(images.lock_of(stem)))
            for stem in {_stem(layer) for layer in layers}
        }
        free = [
            layer for layer in layers if making[_stem(layer)] and stack.enter_context(unused(layer))
        ]
        # A bake that was made by now is seen here. A later one finds that its layer is gone.
        needed = await _needed(frozenset())
        if needed is None:
            return []
        for layer in free:
            if _key(layer) not in needed:
                layer.unlink(missing_ok=True)
                removed.append(layer)
        for layer in removed:  # the description goes with the last file of a layer
            if not any(layer.parent.glob(f"{_stem(layer)}*.squashfs")):
                (layer.parent / f"{_stem(layer)}.json").unlink(missing_ok=True)
    return removed


async def _needed(without: frozenset[str]) -> set[_Key] | None:
    """Find the layers that bakes refer to; ``None`` if a bake of another version does not tell."""
    needed: set[_Key] = set()
    for bake in await BakeStore().list():
        if bake.fingerprint in without:
            continue
        if isinstance(bake.problem, SnapshotIncompatible):
            return None
        if bake.metadata is not None:
            needed |= {_key(ref.path) for ref in bake.metadata.layers}
    return needed


def _is_damaged(bake: Bake) -> bool:
    return bake.problem is not None and not isinstance(bake.problem, SnapshotIncompatible)


def _layers(only: set[_Key] | None) -> list[Path]:
    found = sorted((hostfiles.home() / "layers").glob("*/*.squashfs"))
    return [path for path in found if only is None or _key(path) in only]


def layers_size() -> int:
    """Add up the bytes that all layers take on the disk."""
    return sum(allocated_file(layer) for layer in _layers(None))


def _key(path: Path) -> _Key:
    return path.parent.name, path.name


def _stem(path: Path) -> str:
    """Give the digest with which a layer's file name begins: also the name of its lock."""
    return path.stem.partition("-")[0]


def allocated_file(path: Path) -> int:
    """Give the bytes that a file takes on the disk; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _tidy() -> None:
    """Remove files that killed programs left, and old records, whose files may be long gone."""
    home = hostfiles.home()
    bakes = BakeStore()
    for fingerprint in list(bakes.half_made()):
        bakes.remove(fingerprint)
    bakes.sweep()
    for directory in (home / "bakes/names", home / "verified", *(home / "layers").glob("*/")):
        _remove_old(directory.glob(".tmp-*"), _STRAYS_KEPT)
    _remove_old((home / "verified").glob("[!.]*"), _RECORDS_KEPT)


def _remove_old(files: Iterable[Path], age: float) -> None:
    for path in files:
        try:
            if path.is_file() and path.stat().st_mtime < time.time() - age:
                path.unlink()
        except FileNotFoundError:
            pass
