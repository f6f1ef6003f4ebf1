"""The programs in C: the guest's init and agent, and the helper that starts engines."""

from __future__ import annotations

import platform
from pathlib import Path

from ..errors import AssetNotFound

_BIN = Path(__file__).parent / "bin"
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def init_binary(arch: str = "x86_64") -> Path:
    """Find the static program that is the guest's ``/init``.

    :param arch: the guest's processor, ``"x86_64"`` or ``"aarch64"``.
    :raises AssetNotFound: it was not compiled.
    """
    return _binary("init", arch)


def launcher_binary() -> Path:
    """Find the host's helper that ties a child process to its parent's life.

    :raises AssetNotFound: it was not compiled for this host's processor.
    """
    return _binary("launcher", platform.machine())


def _binary(program: str, arch: str) -> Path:
    arch = _ALIASES.get(arch.lower(), arch.lower())
    path = _BIN / f"{program}-{arch}"
    if not path.is_file():
        raise AssetNotFound(
            program,
            f"{path} does not exist",
            remedy=f"pip install ziglang && python {_BIN.parent / 'build.py'} {arch}",
        )
    return path
