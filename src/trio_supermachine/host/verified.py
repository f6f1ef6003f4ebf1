"""Records of files that were read in full, so that an unchanged one is not read again.

A file counts as unchanged while its path, inode, size and time stamps are the same. Several
programs may use the same records at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from . import files as hostfiles

#: Nanoseconds within which a changed file could change again and keep its time stamps: these
#: advance with the kernel's tick, which is 10 ms at most.
_RACY = 20_000_000

Identity = tuple[int, ...]


def identity(status: os.stat_result) -> Identity:
    """Give the values that change whenever a file does; its time stamps come last."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


class VerifiedFiles:
    """Records of facts about files, such as their digests.

    :param directory: the directory of the records; ``None`` is the library's own.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = hostfiles.home() / "verified" if directory is None else directory

    def recall(self, place: str, found: Identity) -> Sequence[str] | None:
        """Give the facts that were noted of a file; ``None`` if there are none, or it changed.

        :param place: the file's absolute path, and the part of the file where that matters.
        :param found: the file's identity now.
        """
        try:
            record = json.loads(self._record(place).read_bytes())
        except (OSError, ValueError):
            return None
        size = len(found)
        if not isinstance(record, list) or record[:size] != list(found):
            return None
        facts = record[size:]
        return facts if all(isinstance(fact, str) for fact in facts) else None

    def remember(self, place: str, before: Identity, *facts: str) -> None:
        """Note facts about a file.

        A record that cannot be written costs another reading later, so this raises nothing.

        :param before: the file's identity before it was read.
        """
        if time.time_ns() - max(before[3:]) <= _RACY:
            return
        try:
            with hostfiles.new_file(self._record(place)) as new:
                new.write_text(json.dumps([*before, *facts]))
        except OSError:
            pass

    def _record(self, place: str) -> Path:
        return self._directory / hashlib.sha256(os.fsencode(place)).hexdigest()
