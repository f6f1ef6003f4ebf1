"""Connections into a VM, beside the engine's own channel and beside the same server on the host.

usage: python benchmarks/network.py [--rounds N] [--seconds N]

The floor is a raw virtio-serial port of a QEMU driven by hand. An exec's stdout and stdin take the
engine's channel; vm.connect adds TCP in the guest, and expose_tcp adds TCP on the host. Requests
are made by wrk (the Debian package) to busybox httpd in the guest and, in turns, to the same on the
host. The memory is that of this process.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from common import Rows, idle_builder, start
from streams import rate, raw_streams, vm_stdin, vm_stdout

from trio_supermachine import TcpForwarder, Vm
from trio_supermachine.hv.qemu.command import CPU
from trio_supermachine.kernels import prepare_kernel

SIZE = 64 << 20
IDLE = 500
HTTP_PORT = 8000
PAGE = b"x" * 612  # as long as nginx's first page

SERVERS = {
    8001: ["sh", "-c", f"dd if=/dev/zero bs=64k count={SIZE >> 16} 2>/dev/null"],
    8002: ["sh", "-c", "dd of=/dev/null bs=64k 2>/dev/null; echo done"],
    8003: ["cat"],
}

Connect = Callable[[int], Awaitable[trio.abc.HalfCloseableStream]]


async def receive(stream: trio.abc.HalfCloseableStream) -> None:
    async with stream:
        left = SIZE
        while left:
            left -= len(await stream.receive_some())


async def send(stream: trio.abc.HalfCloseableStream) -> None:
    chunk = bytes(1 << 16)
    async with stream:
        for _ in range(SIZE >> 16):
            await stream.send_all(chunk)
        await stream.send_eof()
        assert await stream.receive_some() == b"done\n"


async def throughput(connect: Connect, what: str, rows: Rows) -> None:
    for port, way, move in ((8001, "guest to host", receive), (8002, "host to guest", send)):
        begin = time.perf_counter()
        await move(await connect(port))
        rows.add(f"{what}: {way}", rate(time.perf_counter() - begin, SIZE), "MB/s")


async def round_trips(connect: Connect, what: str, rows: Rows, calls: int = 200) -> None:
    async with await connect(8003) as stream:
        for _ in range(calls):
            with rows.timed(f"{what}: a byte there and back"):
                await stream.send_all(b"x")
                await stream.receive_some()
    for _ in range(calls // 4):
        with rows.timed(f"{what}: connect, a byte there and back"):
            async with await connect(8003) as stream:
                await stream.send_all(b"x")
                await stream.receive_some()


async def requests(url: str, by: str, rows: Rows, seconds: int) -> None:
    """What wrk says, with a connection for each request, as busybox closes it."""
    command = ["wrk", "-t1", "-c8", f"-d{seconds}s", "--latency", url]
    done = await trio.run_process(command, capture_stdout=True)
    text = done.stdout.decode()
    found = re.search(r"Requests/sec:\s*([0-9.]+)", text)
    assert found is not None, text
    rows.add("short HTTP requests, wrk -t1 -c8", float(found[1]), "1/s", by=by)


@asynccontextmanager
async def host_httpd(directory: Path) -> AsyncIterator[str]:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("busybox is not installed: apt-get install busybox-static wrk")
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    command = [busybox, "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", os.fspath(directory)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.run_process, command)
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                break
            except OSError:
                await trio.sleep(0.01)
        yield f"http://127.0.0.1:{port}/index.html"
        nursery.cancel_scope.cancel()


def resident() -> float:
    """The memory of this process, in MiB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def idle(forward: TcpForwarder, rows: Rows, seconds: int) -> None:
    """What connections cost that say nothing."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8 * IDLE, most), most))
    before = resident()
    streams = []
    for _ in range(IDLE):
        stream = await trio.open_tcp_stream(*forward.local_addr)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"  # the whole way is there
        streams.append(stream)
    rows.add(f"memory of {IDLE} idle connections, clients' ends too", resident() - before, "MiB")
    begin = time.process_time()
    await trio.sleep(seconds)
    rows.add(f"CPU time of {seconds} s with them", (time.process_time() - begin) * 1e3)
    for stream in streams:
        await stream.aclose()


async def main(rounds: int, seconds: int) -> None:
    image = await idle_builder().with_memory_mib(512).build()
    async with Vm.start(image) as vm, trio.open_nursery() as nursery:
        rows = Rows(vm.engine)
        for port, program in SERVERS.items():
            command = ["nc", "-ll", "-p", str(port), "-e", *program]
            nursery.start_soon(vm.run_process, command)
        await vm.write_file("/tmp/index.html", PAGE)
        nursery.start_soon(vm.run_process, ["httpd", "-f", "-p", str(HTTP_PORT), "-h", "/tmp"])
        forwards = {}
        for port in (*SERVERS, HTTP_PORT):
            await vm.wait_listening(port)
            forwards[port] = await vm.expose_tcp(guest_port=port)

        async def by_forward(port: int) -> trio.SocketStream:
            return await trio.open_tcp_stream(*forwards[port].local_addr)

        kernel = (await prepare_kernel()).kernel
        for _ in range(rounds):
            if vm.engine == "qemu":
                raw_streams(kernel, CPU, rows)
            await vm_stdout(vm, rows)
            await throughput(vm.connect, "vm.connect", rows)
            await throughput(by_forward, "expose_tcp", rows)
            await vm_stdin(vm, rows)
        await round_trips(vm.connect, "vm.connect", rows)
        await round_trips(by_forward, "expose_tcp", rows)
        directory = trio.Path(os.environ.get("TMPDIR", "/tmp")) / f"network-{os.getpid()}"
        await directory.mkdir()
        try:
            await (directory / "index.html").write_bytes(PAGE)
            async with host_httpd(Path(directory)) as url:
                address = ":".join(map(str, forwards[HTTP_PORT].local_addr))
                for _ in range(rounds):
                    await requests(url, "host", rows, seconds)
                    await requests(f"http://{address}/index.html", vm.engine, rows, seconds)
        finally:
            await trio.to_thread.run_sync(shutil.rmtree, directory)
        await idle(forwards[8003], rows, seconds)
        rows.print()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    start(main, __doc__, rounds=3, seconds=5)
