"""Connections into a VM, beside the engine's own channel and beside the same server on the host.

The floor is a raw virtio-serial port of a QEMU driven by hand. An exec's stdout and stdin take the
engine's channel; vm.connect adds TCP in the guest, and expose_tcp adds TCP on the host. Requests
are made by wrk to busybox httpd in the guest and, in turns, to the same on the
host. The memory is that of this process.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import trio
from common import MIB, free_port, idle_builder, scratch, server, start
from raw_qemu import NEEDS
from streams import IN, OUT, STDIN, STDOUT, rate, raw_streams, vm_stdin, vm_stdout
from table import Rows

from trio_supermachine import TcpForwarder, Vm
from trio_supermachine.hv.qemu.command import CPU
from trio_supermachine.kernels import prepare_kernel

HTTP_PORT = 8000
REQUESTS = "short HTTP requests, wrk -t1 -c8"
PAGE = b"x" * 612  # as long as nginx's first page

SERVERS = {
    8001: "dd if=/dev/zero bs=64k count={chunks} 2>/dev/null",
    8002: "dd of=/dev/null bs=64k 2>/dev/null; echo done",
    8003: "exec cat",
}

Connect = Callable[[int], Awaitable[trio.abc.HalfCloseableStream]]


async def receive(stream: trio.abc.HalfCloseableStream, size: int) -> None:
    async with stream:
        left = size
        while left:
            left -= len(await stream.receive_some())


async def send(stream: trio.abc.HalfCloseableStream, size: int) -> None:
    chunk = bytes(1 << 16)
    async with stream:
        for _ in range(size >> 16):
            await stream.send_all(chunk)
        await stream.send_eof()
        assert await stream.receive_some() == b"done\n"


async def throughput(connect: Connect, what: str, rows: Rows, size: int) -> None:
    for port, way, move in ((8001, "guest to host", receive), (8002, "host to guest", send)):
        begin = time.perf_counter()
        await move(await connect(port), size)
        rows.add(f"{what}: {way}", rate(time.perf_counter() - begin, size), "MB/s")


async def round_trips(connect: Connect, what: str, rows: Rows, calls: int) -> None:
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
    rows.add(REQUESTS, float(found[1]), "1/s", by=by)


def resident() -> float:
    """The memory of this process, in MiB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def idle(forward: TcpForwarder, rows: Rows, count: int, seconds: int) -> None:
    """What connections cost that say nothing."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8 * count, most), most))
    before = resident()
    streams = []
    for _ in range(count):
        stream = await trio.open_tcp_stream(*forward.local_addr)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"  # the whole way is there
        streams.append(stream)
    grown = resident() - before
    rows.add(f"memory of {count} idle connections, clients' ends too", grown, "MiB", by="host")
    begin = time.process_time()
    await trio.sleep(seconds)
    used = (time.process_time() - begin) * 1e3 / seconds
    rows.add("our CPU time in a second with them", used, by="host")
    for stream in streams:
        await stream.aclose()


async def serve_in(vm: Vm, size: int, nursery: trio.Nursery) -> dict[int, TcpForwarder]:
    """Start the servers in the guest; a forward to each, by its port."""
    for port, script in SERVERS.items():
        program = ["sh", "-c", script.format(chunks=size >> 16)]
        nursery.start_soon(vm.run_process, ["nc", "-ll", "-p", str(port), "-e", *program])
    await vm.write_file("/tmp/index.html", PAGE)
    nursery.start_soon(vm.run_process, ["httpd", "-f", "-p", str(HTTP_PORT), "-h", "/tmp"])
    forwards = {}
    for port in (*SERVERS, HTTP_PORT):
        await vm.wait_listening(port)
        forwards[port] = await vm.expose_tcp(guest_port=port)
    return forwards


async def http(forward: TcpForwarder, rows: Rows, rounds: int, seconds: int) -> None:
    """The same server on the host and in the guest."""
    rows.compare(REQUESTS, by="host")
    with scratch() as place:
        (place / "index.html").write_bytes(PAGE)
        port = free_port()
        command = ["busybox", "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", os.fspath(place)]
        with server(command, port):
            guest = ":".join(map(str, forward.local_addr))
            addresses = {"host": f"127.0.0.1:{port}", rows.by: guest}
            for _ in range(rounds):
                for by, address in addresses.items():
                    await requests(f"http://{address}/index.html", by, rows, seconds)


async def measure(
    vm: Vm, rows: Rows, rounds: int, size: int, calls: int, seconds: int, connections: int
) -> None:
    async with trio.open_nursery() as nursery:
        forwards = await serve_in(vm, size, nursery)

        async def by_forward(port: int) -> trio.SocketStream:
            return await trio.open_tcp_stream(*forwards[port].local_addr)

        kernel = (await prepare_kernel()).kernel
        for _ in range(rounds):
            if rows.by == "qemu":
                raw_streams(kernel, CPU, rows, size)
            await vm_stdout(vm, rows, size)
            await throughput(vm.connect, "vm.connect", rows, size)
            await throughput(by_forward, "expose_tcp", rows, size)
            await vm_stdin(vm, rows, size)
        await round_trips(vm.connect, "vm.connect", rows, calls)
        await round_trips(by_forward, "expose_tcp", rows, calls)
        await http(forwards[HTTP_PORT], rows, rounds, seconds)
        await idle(forwards[8003], rows, connections, seconds)
        nursery.cancel_scope.cancel()


async def main(
    rounds: int, mib: int, calls: int, seconds: int, connections: int
) -> AsyncIterator[Rows]:
    rows = Rows(title=f"{rounds} rounds of {mib} MiB, {calls} round trips")
    for name in (STDOUT, "vm.connect: guest to host", "expose_tcp: guest to host"):
        rows.compare(name, OUT)
    for name in (STDIN, "vm.connect: host to guest", "expose_tcp: host to guest"):
        rows.compare(name, IN)
    async with Vm.start(await idle_builder().with_memory_mib(512).build()) as vm:
        rows.by = vm.engine
        await measure(vm, rows, rounds, mib * MIB, calls, seconds, connections)
    yield rows


if __name__ == "__main__":
    start(
        main,
        __doc__,
        needs=(*NEEDS, "wrk"),
        rounds=(3, 1),
        mib=(64, 1),
        calls=(200, 4),
        seconds=(5, 1),
        connections=(500, 4),
    )
