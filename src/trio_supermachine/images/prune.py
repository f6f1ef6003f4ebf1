"""Removing bakes and layers, while other programs use the store.

Whoever has opened a file keeps it. A bake being made is left alone, and so are the layers that
its maker has marked as used: a layer goes only if nobody marks it and, looked up after that,
no bake refers to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import trio

from .. import hostfiles
from ..errors import ImageNotFound, SnapshotIncompatible
from .bakes import Bake, BakeStore
from .locks import try_exclusive, unused
from .store import ImageStore

#: How long a bake without a name is kept after its last use, in seconds.
KEPT_UNUSED: Final = 7 * 24 * 3600.0

_RECORDS_KEPT: Final = 30 * 24 * 3600.0  # seconds; a record that is missed costs one reading
_STRAYS_KEPT: Final = 3600.0  # seconds; nobody is as long at writing a small file
_MIN_PREFIX: Final = 6  # digits of a fingerprint
_TOGETHER: Final = 64  # layers that are held at once

_Key = tuple[str, str]  # a layer by its directory's name and its own


@attrs.frozen(kw_only=True)
class Removed:
    """What was removed, or would be.

    :ivar busy: bakes that were left since somebody makes them just now.
    :ivar size: in bytes on the disk.
    """

    bakes: tuple[Bake, ...]
    layers: tuple[Path, ...]
    busy: tuple[Bake, ...] = ()
    size: int


async def prune(*, everything: bool = False, dry_run: bool = False) -> Removed:
    """Remove bakes that no name and no recent use keep, and layers that no bake needs.

    Damaged bakes go too. Cancelled, it has removed a part.

    :param everything: remove all bakes, named and used ones too.
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
    if not dry_run:
        await trio.to_thread.run_sync(_tidy)
        await ImageStore().sweep()
    return removed


async def remove(wanted: Iterable[str]) -> Removed:
    """Remove what names, references or (the beginnings of) fingerprints stand for.

    A name that is one of several of its bake goes alone. The layers that only the removed bakes
    needed go with them.

    :raises ImageNotFound: one stands for nothing, or for several fingerprints; then nothing is
        removed.
    """
    store = BakeStore()
    bakes = await store.list()
    names: dict[str, set[str]] = {}
    going: dict[str, Bake] = {}
    for text in wanted:
        found = find(bakes, text)
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
    return await _remove(list(going.values()), layers, dry_run=False)


def find(bakes: Sequence[Bake], text: str) -> list[Bake]:
    """The bakes that a name, else a reference, else a beginning of a fingerprint stands for.

    :raises ImageNotFound: there is none, or more than one fingerprint begins so.
    """
    if named := [bake for bake in bakes if text in bake.names]:
        return named
    if of := [bake for bake in bakes if bake.metadata and bake.metadata.image_reference == text]:
        return of
    begin = [bake for bake in bakes if bake.fingerprint.startswith(text)]
    if len(text) < _MIN_PREFIX or not begin:
        raise ImageNotFound(
            text, "no bake has this name, reference or fingerprint; see trio-supermachine images"
        )
    if len(begin) > 1:
        raise ImageNotFound(text, f"{len(begin)} fingerprints begin so; give more digits")
    return begin


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
    """Remove those of some layers that nobody needs."""
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
        # Whoever has made a bake by now is seen here, and whoever makes one later sees no layer.
        needed = await _needed(frozenset())
        if needed is None:
            return []
        for layer in free:
            if _key(layer) not in needed:
                layer.unlink(missing_ok=True)
                removed.append(layer)
        for layer in removed:  # the description, once the last file of a layer has gone
            if not any(layer.parent.glob(f"{_stem(layer)}*.squashfs")):
                (layer.parent / f"{_stem(layer)}.json").unlink(missing_ok=True)
    return removed


async def _needed(without: frozenset[str]) -> set[_Key] | None:
    """The layers that bakes refer to; ``None`` if that cannot be told."""
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


def _key(path: Path) -> _Key:
    return path.parent.name, path.name


def _stem(path: Path) -> str:
    """The digest that a layer's file name begins with, the name of its maker's lock."""
    return path.stem.partition("-")[0]


def allocated_file(path: Path) -> int:
    """The bytes that a file takes on the disk; none if it has gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _tidy() -> None:
    """Remove what killed programs left, and records of files that may be long gone."""
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
