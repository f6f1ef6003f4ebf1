"""What benchmarks share: their options, a data directory for each kernel, and the table."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from trio_supermachine import Image, OciImageBuilder
from trio_supermachine.config.vm import EngineName
from trio_supermachine.kernels import CachedKernel, list_kernels, preferred_kernel, prepare_kernel

Key = tuple[str, str, str]


@attrs.define
class Rows:
    """Measured values by what they are of, in the order of their first.

    :ivar by: whose they are, where :meth:`add` is told nothing else.
    """

    by: str = "qemu"
    values: dict[Key, list[float]] = attrs.field(factory=dict)

    def add(self, name: str, value: float, unit: str = "ms", *, by: str | None = None) -> None:
        self.values.setdefault((name, unit, by or self.by), []).append(value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the milliseconds that the block takes."""
        begin = time.perf_counter()
        yield
        self.add(name, (time.perf_counter() - begin) * 1e3)

    def median(self, name: str, *, by: str | None = None) -> float:
        (values,) = (v for key, v in self.values.items() if key[0] == name and by in (None, key[2]))
        return statistics.median(values)

    def print(self) -> None:
        print(f"{'':56} {'median':>9} {'p99':>9} unit   engine")
        for (name, unit, by), values in self.values.items():
            worst_last = sorted(values, reverse=unit.endswith("/s"))
            p99 = worst_last[min(len(values) - 1, int(len(values) * 0.99))]
            print(f"{name:56} {statistics.median(values):9.2f} {p99:9.2f} {unit:6} {by}")


def start(main: Callable[..., Awaitable[None]], doc: str | None, **defaults: int | str) -> None:
    """The end of each benchmark: run ``main`` with what the command line says of its options.

    :param doc: the module's; its first sentences are the help.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=type(default), default=default, help="default: %(default)s"
        )
    trio.run(partial(main, **vars(parser.parse_args())))


async def usual_kernel() -> CachedKernel:
    """The one that guests boot unless they are told."""
    await prepare_kernel()
    kernel = await preferred_kernel()
    assert kernel is not None
    return kernel


async def kernels() -> AsyncIterator[CachedKernel]:
    """The stock kernel and the small one, as far as they are here, and one at least."""
    preferred = await usual_kernel()
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


def idle_builder(engine: EngineName = "auto") -> OciImageBuilder:
    """A bake of the embedded image with nothing that runs in it."""
    return Image.builder("builtin:busybox").with_cmd([]).with_engine(engine)


def engine_processes(engine: str) -> list[int]:
    """The processes that run this program's VMs: QEMUs, or on KVM the program itself."""
    if engine == "kvm":
        return [os.getpid()]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(" (")[2].rpartition(") ")
        except OSError:
            continue  # it has ended meanwhile
        if "qemu" in name and int(rest.split()[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found
