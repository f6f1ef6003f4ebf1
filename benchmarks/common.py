"""What benchmarks share: a data directory for each kernel that is here, and the table."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from trio_supermachine import Image, OciImageBuilder
from trio_supermachine.kernels import CachedKernel, list_kernels, preferred_kernel, prepare_kernel

Key = tuple[str, str, str]


@attrs.define
class Rows:
    """Measured values by what they are of, in the order of their first."""

    values: dict[Key, list[float]] = attrs.field(factory=dict)

    def add(self, name: str, value: float, unit: str = "ms", *, by: str = "qemu") -> None:
        self.values.setdefault((name, unit, by), []).append(value)

    def median(self, name: str) -> float:
        (values,) = (values for key, values in self.values.items() if key[0] == name)
        return statistics.median(values)

    def print(self) -> None:
        print(f"{'':56} {'median':>9} {'p99':>9} unit   engine")
        for (name, unit, by), values in self.values.items():
            worst_last = sorted(values, reverse=unit.endswith("/s"))
            p99 = worst_last[min(len(values) - 1, int(len(values) * 0.99))]
            print(f"{name:56} {statistics.median(values):9.2f} {p99:9.2f} {unit:6} {by}")


async def kernels() -> AsyncIterator[CachedKernel]:
    """The stock kernel and the small one, as far as they are here, and one at least."""
    await prepare_kernel()
    preferred = await preferred_kernel()
    assert preferred is not None
    if not preferred.stock:
        for stock in [kernel for kernel in await list_kernels() if kernel.stock][:1]:
            yield stock
    yield preferred


@contextmanager
def home_of(kernel: CachedKernel) -> Iterator[Path]:
    """Have a data directory with this kernel alone, which goes with all that was baked in it."""
    before = os.environ.get("TRIO_SUPERMACHINE_HOME")
    with tempfile.TemporaryDirectory(prefix="supermachine-benchmark-") as name:
        (Path(name) / "kernels").mkdir()
        (Path(name) / "kernels" / kernel.directory.name).symlink_to(kernel.directory)
        os.environ["TRIO_SUPERMACHINE_HOME"] = name
        try:
            yield Path(name)
        finally:
            del os.environ["TRIO_SUPERMACHINE_HOME"]
            if before is not None:
                os.environ["TRIO_SUPERMACHINE_HOME"] = before


def idle_builder() -> OciImageBuilder:
    """A bake of the embedded image with nothing that runs in it."""
    return Image.builder("builtin:busybox").with_cmd([])


def engine_processes() -> list[int]:
    """The QEMUs that this program runs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(" (")[2].rpartition(") ")
        except OSError:
            continue  # it has ended meanwhile
        if "qemu" in name and int(rest.split()[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found
