"""The stock kernel: Debian's cloud kernel, which is fetched in seconds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from .._util.progress import ProgressCallback
from ..errors import AssetNotFound
from .debian import REMEDY, check_apt, dependencies, download, first_available, package_names
from .versions import version_key

_META: Final = "linux-image-cloud-amd64"
_PREFIX: Final = "linux-image-6."
#: Names of preferred kernels: from 6.12 on, for which the agent's networking is made.
_PREFERRED: Final = re.compile(r"linux-image-(6\.(?:1[2-9]|[2-9]\d)\.\S+)-cloud-amd64(-unsigned)?")
_ASKED: Final = 6  # candidates to ask apt about; nearly always it has the newest


@asynccontextmanager
async def stock_kernel(
    scratch: Path, progress: ProgressCallback | None = None
) -> AsyncIterator[tuple[str, Path]]:
    """Fetch the stock kernel, and give its package's name and the unpacked tree, for the block.

    :param scratch: a directory for temporary files.
    :raises AssetNotFound: it cannot be fetched here; the message says what to do.
    """
    check_apt()
    wanted = newest_first(await package_names(_PREFIX))[:_ASKED]
    if match := re.search(r"Depends: (linux-image-\S+-cloud-amd64)", await dependencies(_META)):
        wanted.append(match[1])
    package = await first_available(wanted)
    if package is None:
        raise AssetNotFound(
            "kernel", "there is none yet, and apt knows no cloud kernel", remedy=REMEDY
        )
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=scratch) as name:
        yield package.name, await download(package, Path(name), progress)


def newest_first(packages: Sequence[str]) -> list[str]:
    """Pick the preferred packages among ``packages``: the newest first, signed before unsigned."""
    found = [match for package in packages if (match := _PREFERRED.fullmatch(package))]
    found.sort(key=lambda match: (version_key(match[1]), match[2] is None), reverse=True)
    return [match[0] for match in found]
