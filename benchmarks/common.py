"""What benchmarks share: the command line, the checks before a run, places, and the kernels.

A program ends with :func:`start`. It gives each option a usual value and one for ``--smoke``, the
smallest run that still takes every path. Exit codes: :data:`UNAVAILABLE`, something is not
installed; :data:`NO_KVM`, the program is about KVM, and this host has none that serves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import trio
from table import Report, Rows

from trio_supermachine import AssetNotFound, EngineUnavailable, Image, OciImageBuilder
from trio_supermachine.config.defaults import EngineName
from trio_supermachine.hv.kvm.probe import probe_kvm
from trio_supermachine.kernels import CachedKernel, list_kernels, preferred_kernel, prepare_kernel

MIB = 1 << 20
UNAVAILABLE = os.EX_UNAVAILABLE
NO_KVM = 77  # what Automake's tests return where they cannot run
LAB = Path(__file__).resolve().parent.parent / "scripts" / "kvm-lab"
LAB_SECONDS, LAB_MIB = 3600, 6144

#: Debian's packages, by the programs that benchmarks call.
PACKAGES = {
    "busybox": "busybox-static",
    "cpio": "cpio",
    "docker-registry": "docker-registry",
    "qemu-system-x86_64": "qemu-system-x86",
    "skopeo": "skopeo",
    "sqfstar": "squashfs-tools",
    "wrk": "wrk",
}

Kvm = Literal["device", "linux"]
Main = Callable[..., AsyncIterator[Rows]]


class Unavailable(Exception):
    """This host lacks something; the text says what, and how to get it."""


def start(
    main: Main,
    doc: str | None,
    *,
    needs: Sequence[str] = (),
    kvm: Kvm | None = None,
    prepare: Callable[[], object] | None = None,
    **options: tuple[int, int] | tuple[str, str],
) -> None:
    """Run a benchmark by its command line: print each table of ``main`` as it comes.

    :param doc: the module's; its first paragraph is the help.
    :param needs: programs that it calls, of :data:`PACKAGES`.
    :param kvm: it takes a ``/dev/kvm`` that opens, or one that runs Linux at hardware speed.
    :param prepare: makes what would take long inside the lab.
    :param options: what ``main`` takes: the usual value, and that for ``--smoke``.
    """
    parser = _parser(doc, kvm, options)
    given = vars(parser.parse_args())
    smoke, json, lab = given.pop("smoke"), given.pop("json"), given.pop("lab", False)
    for name, (usual, small) in options.items():
        if given[name] is None:
            given[name] = small if smoke else usual
    try:
        if lab:
            _enter_lab(json, prepare)
        if kvm is not None:
            _require_kvm(kvm)
        require(needs)
        report = Report(parser.prog.removesuffix(".py"), smoke, dict(given))
        trio.run(_run, partial(main, **given), report)
    except (Unavailable, EngineUnavailable, AssetNotFound) as exc:
        _give_up(UNAVAILABLE, exc)
    if json is not None:
        report.write(json)


def _parser(
    doc: str | None, kvm: Kvm | None, options: dict[str, tuple[int, int] | tuple[str, str]]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="run as little as takes every path")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, too")
    if kvm is not None:
        parser.add_argument("--lab", action="store_true", help="run inside scripts/kvm-lab")
    for name, (usual, small) in options.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(usual),
            metavar="N" if isinstance(usual, int) else "TEXT",
            help=f"default: {usual or 'none'}; with --smoke: {small or 'none'}",
        )
    return parser


async def _run(main: Main, report: Report) -> None:
    async for rows in main():
        rows.print()
        report.tables.append(rows)


def _give_up(code: int, reason: object) -> NoReturn:
    print(f"{Path(sys.argv[0]).stem}: {reason}", file=sys.stderr)
    sys.exit(code)


# What must be there


def require(programs: Sequence[str]) -> None:
    """Check that programs are installed. :raises Unavailable: with the packages of those missing"""
    missing = [program for program in programs if not _installed(program)]
    if missing:
        packages = " ".join(PACKAGES[program] for program in missing)
        raise Unavailable(f"needs {', '.join(missing)}: apt-get install {packages}")


def _installed(program: str) -> bool:
    path = shutil.which(program)
    # A raw guest has no libraries: Debian's other busybox does not run there.
    return path is not None and (program != "busybox" or b"/ld-linux" not in _read(path))


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _require_kvm(kvm: Kvm) -> None:
    found = trio.run(probe_kvm)
    if not (found.usable if kvm == "linux" else found.opens):
        _give_up(NO_KVM, f"{found.detail}; --lab runs it in scripts/kvm-lab")


def _enter_lab(json: Path | None, prepare: Callable[[], object] | None) -> NoReturn:
    """Become the lab, which runs this program with the same options."""
    trio.run(usual_kernel)  # the lab has no network to fetch one
    if prepare is not None:
        prepare()
    writable: list[str] = [] if json is None else ["-o", os.fspath(json.resolve().parent)]
    options = [word for word in sys.argv[1:] if word != "--lab"]
    command = [os.fspath(LAB), "-t", str(LAB_SECONDS), "-m", str(LAB_MIB), *writable]
    os.execv(LAB, [*command, sys.executable, sys.argv[0], *options])


# Kernels, places and bakes


async def usual_kernel() -> CachedKernel:
    """The kernel that guests boot unless they are told."""
    await prepare_kernel()
    kernel = await preferred_kernel()
    assert kernel is not None
    return kernel


async def kernels(which: str) -> AsyncIterator[CachedKernel]:
    """Guests' kernels, one after the other, each with a data directory while it is at work.

    :param which: ``"usual"`` is the one that guests boot anyway, in the usual data directory, with
        what was baked there before. ``"all"`` is the stock kernel and the small one, as far as they
        are here. Each gets a data directory of its own, which goes with all that is baked in it.
    """
    if which not in ("usual", "all"):
        raise Unavailable(f"knows the kernels 'usual' and 'all', not {which!r}")
    preferred = await usual_kernel()
    if which == "usual":
        yield preferred
        return
    stock = [kernel for kernel in await list_kernels() if kernel.stock][:1]
    for kernel in [preferred] if preferred.stock else [*stock, preferred]:
        with home_of(kernel):
            yield kernel


@contextmanager
def home_of(kernel: CachedKernel) -> Iterator[None]:
    """Have a data directory with this kernel alone, while the block runs."""
    before = os.environ.get("TRIO_SUPERMACHINE_HOME")
    with scratch() as home:
        (home / "kernels").mkdir()
        (home / "kernels" / kernel.directory.name).symlink_to(kernel.directory)
        os.environ["TRIO_SUPERMACHINE_HOME"] = os.fspath(home)
        try:
            yield
        finally:
            del os.environ["TRIO_SUPERMACHINE_HOME"]
            if before is not None:
                os.environ["TRIO_SUPERMACHINE_HOME"] = before


@contextmanager
def scratch() -> Iterator[Path]:
    """Have a directory for files of a benchmark, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="supermachine-benchmark-") as name:
        yield Path(name)


def idle_builder(engine: EngineName = "auto") -> OciImageBuilder:
    """A bake of the embedded image in which nothing runs."""
    return Image.builder("builtin:busybox").with_cmd([]).with_engine(engine)


# Servers and processes on the host


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[None]:
    """Have a program serve a port of loopback, while the block runs."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None:
                        raise
                    time.sleep(0.02)
            yield
        finally:
            process.kill()


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
