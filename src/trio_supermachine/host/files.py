"""The data directory, and files and directories of the host that appear whole.

A file or directory is made under a temporary name beside its own, written to the disk, renamed,
and then its directory is written to the disk. A program that is killed at any moment, or a host
that loses power, leaves the old state or the new one. A killed program may leave temporary names,
too, which :func:`sweep` removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = ".tmp-"


def home() -> Path:
    """Give the data directory: ``$TRIO_SUPERMACHINE_HOME``, or one below XDG's for data."""
    if explicit := os.environ.get("TRIO_SUPERMACHINE_HOME"):
        return Path(explicit).absolute()
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "trio-supermachine"


def offline() -> bool:
    """Give whether ``$TRIO_SUPERMACHINE_OFFLINE`` forbids downloads."""
    return os.environ.get("TRIO_SUPERMACHINE_OFFLINE", "") not in ("", "0")


@contextmanager
def new_file(dest: Path) -> Iterator[Path]:
    """Give an empty temporary file, which becomes ``dest`` if the block ends well.

    It is beside ``dest``, whose directory is made. It takes the place of a file that is there.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=dest.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(dest)
        fsync(dest.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(dest: Path) -> Iterator[Path]:
    """Give an empty temporary directory, which becomes ``dest`` if the block ends well.

    It is beside ``dest``, which must not exist, or be an empty directory.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=dest.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                fsync(file)
        fsync(temporary)
        temporary.replace(dest)
        fsync(dest.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(directory: Path) -> None:
    """Remove what killed programs left under temporary names in ``directory``.

    The caller holds the lock under which files are made there, so that nobody is at work on one.
    """
    for stray in directory.glob(_TEMPORARY + "*"):
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file's data, or a directory's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
