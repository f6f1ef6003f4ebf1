"""The store of bakes, below ``bakes`` in the data directory.

``FINGERPRINT/snapshot`` and ``FINGERPRINT/booted`` are the snapshots of a bake, one for each
:class:`Moment`. ``FINGERPRINT/used`` has the time of its last use. ``FINGERPRINT.lock`` exists
while somebody makes or removes it. ``names/NAME`` holds the fingerprint that a name stands for. A
snapshot appears by one rename; until then what is in its directory is nobody's, and the next who
takes the lock removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Final

import attrs
import trio

from ..errors import ConfigError, SnapshotIncompatible, SnapshotInvalid
from ..host import files as hostfiles
from ..host.locks import try_exclusive
from ..snapshots import Metadata, Snapshot, open_snapshot, read_metadata

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_GOING: Final = ".tmp-"  # what hostfiles.sweep removes


class Moment(Enum):
    """A moment of a bake at which it is captured, by the name of the snapshot's directory."""

    #: The guest has booted, and its workload has not started: for running another command.
    BOOTED = "booted"
    #: The workload is ready and the warm-up has run: for all that is started of the image.
    READY = "snapshot"


def check_name(name: object) -> str:
    """Check a name for bakes. :raises ConfigError: it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"a name must be up to 128 letters, digits, dots, hyphens and underscores, not {name!r}"
        )
    return name


@attrs.frozen(kw_only=True)
class Bake:
    """A bake in the store.

    :ivar directory: its snapshot: that of the later moment, if that is sound.
    :ivar moments: the moments whose snapshots are sound, the later first.
    :ivar damaged: the moments whose snapshots are not, beside a sound one.
    :ivar names: the names that stand for it.
    :ivar metadata: the metadata of the snapshot; ``None`` if none is sound.
    :ivar problem: the reason if ``metadata`` is ``None``, or a snapshot is of a newer version.
    :ivar size: the bytes that its snapshots take on the disk.
    :ivar used_at: the time when it was last made or asked for, in seconds since 1970.
    """

    fingerprint: str
    directory: Path
    moments: tuple[Moment, ...] = ()
    damaged: tuple[Moment, ...] = ()
    names: tuple[str, ...]
    metadata: Metadata | None
    problem: SnapshotInvalid | None
    size: int
    used_at: float


class BakeStore:
    """The bakes below a data directory.

    :param root: the directory; ``None`` is the library's own.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._bakes = (hostfiles.home() if root is None else root) / "bakes"

    def place(self, fingerprint: str, moment: Moment = Moment.READY) -> Path:
        """Give the place where a snapshot of a bake is, or will be."""
        return self._bakes / fingerprint / moment.value

    def _has_any(self, fingerprint: str) -> bool:
        return any(self.place(fingerprint, moment).exists() for moment in Moment)

    async def find(self, fingerprint: str, moment: Moment = Moment.READY) -> Snapshot | None:
        """Give a snapshot of a bake, verified; ``None`` if there is none that is sound."""
        place = self.place(fingerprint, moment)
        if not place.exists():
            await trio.lowlevel.checkpoint()
            return None
        try:
            return await open_snapshot(place)
        except SnapshotInvalid:
            return None

    def try_making(self, fingerprint: str) -> AbstractContextManager[bool]:
        """Be the only one, of all programs, who makes this bake; give whether that is so."""
        self._bakes.mkdir(parents=True, exist_ok=True)
        return try_exclusive(self._lock(fingerprint))

    async def clear(self, fingerprint: str, moment: Moment) -> None:
        """Remove a snapshot that is half made or damaged. The caller makes the bake."""
        await trio.to_thread.run_sync(self._clear, fingerprint, moment)

    def remove_damaged(self, bake: Bake) -> None:
        """Remove damaged snapshots of a bake that has a sound one, unless it is being made.

        In a thread.
        """
        with try_exclusive(self._lock(bake.fingerprint)) as held:
            if held:
                for moment in bake.damaged:
                    self._clear(bake.fingerprint, moment)

    def _clear(self, fingerprint: str, moment: Moment) -> None:
        self._take_away(self.place(fingerprint, moment))
        hostfiles.sweep(self._bakes / fingerprint)

    def mark_used(self, fingerprint: str) -> None:
        """Note that a bake was asked for just now, unless it has gone meanwhile."""
        try:
            (self._bakes / fingerprint / "used").touch()
        except FileNotFoundError:
            pass

    def set_name(self, name: str, fingerprint: str) -> None:
        """Let a name stand for a bake, and no longer for another."""
        path = self._bakes / "names" / check_name(name)
        if _read_name(path) != fingerprint:
            with hostfiles.new_file(path) as new:
                new.write_text(fingerprint)

    def names(self) -> Mapping[str, str]:
        """Map each name to the fingerprint that it stands for."""
        found = {}
        for path in sorted((self._bakes / "names").glob("[!.]*")):
            if _NAME.fullmatch(path.name) and (fingerprint := _read_name(path)) is not None:
                found[path.name] = fingerprint
        return found

    def remove_name(self, name: str) -> None:
        """Forget a name."""
        (self._bakes / "names" / name).unlink(missing_ok=True)

    async def list(self) -> list[Bake]:
        """Describe all bakes, the last used first."""
        names = self.names()
        found = []
        for directory in sorted(self._bakes.glob("*")):
            if not _FINGERPRINT.fullmatch(directory.name):
                continue
            fingerprint = directory.name
            sound: dict[Moment, Metadata] = {}
            problems: dict[Moment, SnapshotInvalid] = {}
            for moment in (Moment.READY, Moment.BOOTED):
                place = self.place(fingerprint, moment)
                try:
                    if place.exists():
                        sound[moment] = await read_metadata(place)
                except SnapshotInvalid as error:
                    if place.exists():  # otherwise it was removed meanwhile
                        problems[moment] = error
            foreign = [e for e in problems.values() if isinstance(e, SnapshotIncompatible)]
            if not (sound or problems):
                continue
            best = next(iter([*sound, *problems]))
            found.append(
                Bake(
                    fingerprint=fingerprint,
                    directory=self.place(fingerprint, best),
                    moments=tuple(sound),
                    damaged=tuple(problems) if sound and not foreign else (),
                    names=tuple(name for name, of in names.items() if of == fingerprint),
                    metadata=sound.get(best),
                    problem=next(iter([*foreign, *(() if sound else problems.values())]), None),
                    size=allocated(directory),
                    used_at=_used_at(directory),
                )
            )
        return sorted(found, key=lambda bake: bake.used_at, reverse=True)

    def remove(self, fingerprint: str) -> bool:
        """Remove a bake and its names, in a thread; false if somebody is making it just now.

        Programs that have restored it keep what they have open.
        """
        if not self._bakes.is_dir():
            return True
        with try_exclusive(self._lock(fingerprint)) as held:
            if held:
                for name, of in self.names().items():
                    if of == fingerprint:
                        self.remove_name(name)
                self._take_away(self._bakes / fingerprint)
            return held

    def half_made(self) -> Iterator[str]:
        """Give the fingerprints of bakes that were left half made, or are being made."""
        for directory in self._bakes.glob("*"):
            if _FINGERPRINT.fullmatch(directory.name) and not self._has_any(directory.name):
                yield directory.name

    def sweep(self) -> None:
        """Remove what was being removed when a program was killed, and names without a bake."""
        hostfiles.sweep(self._bakes)
        for name, fingerprint in self.names().items():
            if not self._has_any(fingerprint):
                self.remove_name(name)
        for directory in self._bakes.glob("*"):
            if _FINGERPRINT.fullmatch(directory.name):
                with try_exclusive(self._lock(directory.name)) as held:
                    if held:
                        hostfiles.sweep(directory)
        for lock in self._bakes.glob("*.lock"):
            with try_exclusive(lock):
                pass  # its file goes with it

    def _lock(self, fingerprint: str) -> Path:
        return self._bakes / f"{fingerprint}.lock"

    def _take_away(self, place: Path) -> None:
        # Under another name first, so that a kill on the way leaves nothing that looks whole.
        going = self._bakes / (_GOING + secrets.token_hex(8))
        try:
            place.rename(going)
        except FileNotFoundError:
            return
        shutil.rmtree(going, ignore_errors=True)


def allocated(directory: Path) -> int:
    """Count the bytes that the files below a directory take on the disk; holes take none."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                pass
    return total


def _read_name(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(65).decode("ascii", "replace")
    except OSError:
        return None
    return text if _FINGERPRINT.fullmatch(text) else None


def _used_at(directory: Path) -> float:
    for path in (directory / "used", directory):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            pass
    return time.time()
