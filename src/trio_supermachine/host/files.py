"""Where this library keeps files on the host, and how it writes them.

Everything is published by a rename, so that a program killed at any moment leaves either the
old state or the new one, and stray temporary names that :func:`sweep` removes.
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
    """The data directory: ``$TRIO_SUPERMACHINE_HOME``, or below the XDG data directory."""
    if explicit := os.environ.get("TRIO_SUPERMACHINE_HOME"):
        return Path(explicit).absolute()
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "trio-supermachine"


def offline() -> bool:
    """Whether ``$TRIO_SUPERMACHINE_OFFLINE`` forbids downloads."""
    return os.environ.get("TRIO_SUPERMACHINE_OFFLINE", "") not in ("", "0")


@contextmanager
def new_file(dest: Path) -> Iterator[Path]:
    """Give a temporary sibling to write; it becomes ``dest`` if the block ends well."""
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
    """Give a temporary sibling directory; it becomes ``dest`` if the block ends well.

    ``dest`` must not exist, or be an empty directory.
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
    """Remove temporary names that killed programs left in ``directory``.

    The caller holds the lock under which they are made.
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
