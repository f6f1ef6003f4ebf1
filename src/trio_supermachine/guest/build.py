"""Compile the guest program and the host's launcher with the Zig compiler's C front end.

``python src/trio_supermachine/guest/build.py [ARCH...]`` makes ``bin/init-ARCH`` and
``bin/launcher-ARCH`` for ``x86_64`` and ``aarch64``; what is up to date is left alone. The output
is the same, byte for byte, for the same sources and compiler: its digest is part of what a
snapshot depends on.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

ARCHITECTURES = ("x86_64", "aarch64")
_HERE = Path(__file__).resolve().parent
_BIN = _HERE / "bin"
_FLAGS = (
    *("-static", "-Os", "-s", "-g0", "-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror"),
    *("-fno-ident", "-Wl,--build-id=none"),  # nothing but what the sources say
)
_PROGRAMS = {"init": "*.c", "launcher": "host/*.c"}


def build(architectures: Iterable[str] = ARCHITECTURES) -> list[Path]:
    """Compile what is out of date; returns the paths of all programs asked for.

    :raises subprocess.CalledProcessError: the compiler failed; it has said why on stderr.
    """
    _BIN.mkdir(exist_ok=True)
    return [
        _build(program, pattern, architecture)
        for architecture in architectures
        for program, pattern in _PROGRAMS.items()
    ]


def _build(program: str, pattern: str, architecture: str) -> Path:
    output = _BIN / f"{program}-{architecture}"
    stamp = _BIN / f".{output.name}.stamp"
    sources = sorted(path.relative_to(_HERE).as_posix() for path in _HERE.glob(pattern))
    headers = sorted(path.relative_to(_HERE).as_posix() for path in _HERE.glob("*.h"))
    # Relative names, in this directory: no path of this machine gets into the program.
    command = ["-target", f"{architecture}-linux-musl", *_FLAGS, *sources]
    state = _digest([version("ziglang"), *command], [*sources, *headers])
    if output.exists() and stamp.exists() and stamp.read_text() == state:
        return output
    with tempfile.TemporaryDirectory(dir=_BIN) as directory:
        fresh = Path(directory, output.name)
        subprocess.run(
            [sys.executable, "-m", "ziglang", "cc", *command, "-o", str(fresh)],
            cwd=_HERE,
            check=True,
        )
        fresh.chmod(0o755)
        os.replace(fresh, output)
    stamp.write_text(state)
    return output


def _digest(words: Iterable[str], files: Iterable[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for name in files:
        content = (_HERE / name).read_bytes()
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


if __name__ == "__main__":
    wanted = sys.argv[1:] or ARCHITECTURES
    if unknown := set(wanted) - set(ARCHITECTURES):
        sys.exit(f"unknown architecture: {', '.join(sorted(unknown))}")
    for path in build(wanted):
        print(path)
