"""Servers that nobody here wrote, in guests, serve clients that nobody here wrote, on the host."""

from __future__ import annotations

import random
import subprocess
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
import trustme

from trio_supermachine import Image, TlsConfig, Vm

from ..support.debian_image import run
from ..support.guests import PATIENCE, read_past
from ..support.network_images import HTTP, POSTGRES, REDIS, network_layout, pgbench, servers

__all__ = ["network_layout", "pgbench", "servers"]  # fixtures

pytestmark = pytest.mark.vm

FILES = {
    "nothing": b"",
    "a-byte": b"\n",
    "large": random.Random(1).randbytes(10 << 20),
}
#: What precedes the port, and a stream, on :attr:`Vm.vsock_path`.
MAGIC = b"SMUX-PORT-V1\0\0\0\0"


async def put_files(vm: Vm) -> None:
    for name, content in FILES.items():
        await vm.write_file(f"/var/www/html/{name}", content)


async def output(*command: str | Path) -> str:
    """What a client prints, which must succeed and have nothing to complain about."""
    with trio.fail_after(PATIENCE * 2):
        done = await run([str(word) for word in command], check=False)
    told = done.stderr.decode()
    assert done.returncode == 0, told
    assert "error" not in told.lower(), told
    return done.stdout.decode()


async def fetched(directory: Path, url: str, *options: str | Path) -> dict[str, bytes]:
    """The files, fetched by one curl over one connection."""
    command: list[str | Path] = ["curl", "-sSf", *options]
    for name in FILES:
        command += [f"{url}/{name}", "-o", directory / name]
    await output(*command)
    return {name: (directory / name).read_bytes() for name in FILES}


# --- nginx ---


async def test_nginx_serves_curl_every_byte(servers: Image, tmp_path: Path) -> None:
    async with servers.start() as vm:
        await put_files(vm)
        forwarder = await vm.expose_tcp(guest_port=HTTP)
        url = "http://{}:{}".format(*forwarder.local_addr)
        assert await fetched(tmp_path, url) == FILES


async def test_nginx_serves_httpx_every_byte_side_by_side(servers: Image) -> None:
    got: list[str] = []

    async def get(client: httpx.AsyncClient, name: str) -> None:
        answer = await client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.content == FILES[name]
        got.append(name)

    async with servers.start() as vm:
        await put_files(vm)
        forwarder = await vm.expose_tcp(guest_port=HTTP)
        url = "http://{}:{}".format(*forwarder.local_addr)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            async with trio.open_nursery() as nursery:
                for name in list(FILES) * 3:
                    nursery.start_soon(get, client, name)
            answer = await client.get("/missing")
            assert answer.status_code == 404
            assert answer.headers["server"].startswith("nginx")
    assert sorted(got) == sorted(list(FILES) * 3)


async def test_nginx_serves_curl_over_tls(servers: Image, tmp_path: Path) -> None:
    ca, certificate, key = tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(ca))
    issued.private_key_pem.write_to_path(str(key))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(certificate), append=True)
    async with servers.start() as vm:
        await put_files(vm)
        forwarder = await vm.expose_tls(
            TlsConfig(certificate=certificate, key=key, guest_port=HTTP)
        )
        url = "https://{}:{}".format(*forwarder.local_addr)
        assert await fetched(tmp_path, url, "--cacert", ca) == FILES
        # And not to whoever does not know the CA.
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await run(["curl", "-sS", f"{url}/a-byte"])
        assert caught.value.returncode == 60


async def test_the_first_listener_serves_curl_through_the_unix_socket(
    servers: Image, tmp_path: Path
) -> None:
    async with servers.start() as vm:
        await put_files(vm)
        got = await fetched(tmp_path, "http://any.name", "--unix-socket", vm.vsock_path)
        assert got == FILES


# --- PostgreSQL ---


def login(forwarder_address: tuple[str, int]) -> list[str]:
    host, port = forwarder_address
    return ["-h", host, "-p", str(port), "-U", "postgres"]


async def test_postgresql_serves_pgbench_for_ten_seconds_without_an_error(
    servers: Image, pgbench: Path
) -> None:
    async with servers.start() as vm:
        forwarder = await vm.expose_tcp(guest_port=POSTGRES)
        options = login(forwarder.local_addr)
        await output(pgbench, *options, "-i", "-s", "1", "-q", "postgres")
        report = await output(pgbench, *options, "-T", "10", "-c", "4", "postgres")
        assert "number of clients: 4" in report
        assert "number of failed transactions: 0" in report
        rows = await output(
            "psql", *options, "-XAtc", "SELECT sum(bbalance) = sum(delta), count(*) > 0 "
            "FROM pgbench_branches, pgbench_history",
        )  # fmt: skip
        assert rows.endswith("|t\n")


async def test_a_capture_of_the_running_vm_disturbs_no_transaction(
    servers: Image, pgbench: Path, tmp_path: Path
) -> None:
    async with servers.start() as vm:
        forwarder = await vm.expose_tcp(guest_port=POSTGRES)
        options = login(forwarder.local_addr)
        await output(pgbench, *options, "-i", "-s", "1", "-q", "postgres")
        image: Image | None = None
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def work() -> None:
                report = await output(pgbench, *options, "-t", "50", "-c", "2", "postgres")
                assert "number of failed transactions: 0" in report

            while await count(options) == 0:
                pass
            image = await vm.snapshot(tmp_path / "snapshot")
        assert await count(options) == 100
        async with image.start() as copy:
            forwarder = await copy.expose_tcp(guest_port=POSTGRES)
            # What was committed then, and what became of those whose connections are gone.
            assert 0 < await count(login(forwarder.local_addr)) <= 100


async def count(options: list[str]) -> int:
    """How many transactions pgbench has made."""
    return int(
        await output("psql", *options, "-XAtc", "SELECT count(*) FROM pgbench_history", "postgres")
    )


async def test_psql_moves_megabytes_both_ways(servers: Image, tmp_path: Path) -> None:
    lines = "".join(f"{n}\t{random.Random(n).randbytes(60).hex()}\n" for n in range(20_000))
    (tmp_path / "rows").write_text(lines)
    async with servers.start() as vm:
        forwarder = await vm.expose_tcp(guest_port=POSTGRES)
        await output(
            "psql", *login(forwarder.local_addr), "-Xqc", "CREATE TABLE t (n int, text text)",
            "-c", f"\\copy t FROM '{tmp_path}/rows'",
            "-c", f"\\copy (SELECT * FROM t ORDER BY n) TO '{tmp_path}/back'",
        )  # fmt: skip
    assert (tmp_path / "back").read_text() == lines


async def test_psql_speaks_to_the_first_listener_through_the_unix_socket(
    servers: Image, tmp_path: Path
) -> None:
    async with servers.start() as vm:
        # The other two listen earlier. PostgreSQL's clients want this name.
        await vm.run_process(["sh", "-c", "redis-cli shutdown; nginx -s quit"])
        assert await vm.wait_listening(POSTGRES) == POSTGRES
        (tmp_path / f".s.PGSQL.{POSTGRES}").symlink_to(vm.vsock_path)
        answer = await output("psql", "-h", tmp_path, "-U", "postgres", "-XAtc", "SELECT 6 * 7")
        assert answer == "42\n"


# --- Redis ---


async def test_redis_serves_its_benchmark_and_its_client(servers: Image) -> None:
    async with servers.start() as vm:
        forwarder = await vm.expose_tcp(guest_port=REDIS)
        host, port = forwarder.local_addr
        options = ["-h", host, "-p", str(port)]
        tests = ["-t", "ping,set,get", "-d", "100"]
        report = await output("redis-benchmark", *options, "-n", "2000", "-q", *tests)
        assert report.count("requests per second") == 4
        assert await output("redis-cli", *options, "SET", "key", "a value") == "OK\n"
        assert await output("redis-cli", *options, "GET", "key") == "a value\n"


async def test_redis_tells_subscribers_in_the_order_of_what_was_published(servers: Image) -> None:
    async with servers.start() as vm:
        forwarder = await vm.expose_tcp(guest_port=REDIS)
        host, port = forwarder.local_addr
        client = ["redis-cli", "-h", host, "-p", str(port)]
        async with trio.open_nursery() as nursery:
            start = partial(
                trio.run_process,
                [*client, "--csv", "SUBSCRIBE", "news"],
                stdout=subprocess.PIPE,
                check=False,
            )
            subscriber: trio.Process = await nursery.start(start)
            assert subscriber.stdout is not None
            async with subscriber.stdout:
                await read_past(subscriber.stdout, b'"subscribe","news",1')
                for number in range(5):
                    assert await output(*client, "PUBLISH", "news", f"item {number}") == "1\n"
                    await read_past(subscriber.stdout, f'"message","news","item {number}"'.encode())
            subscriber.terminate()


async def test_a_routing_header_on_the_unix_socket_leads_to_redis(servers: Image) -> None:
    async with servers.start() as vm, await trio.open_unix_socket(vm.vsock_path) as stream:
        await stream.send_all(MAGIC + REDIS.to_bytes(4, "big") + b"PING\r\n")
        await read_past(stream, b"+PONG\r\n")
        # A second one is what it looks like: a word that Redis does not know.
        header = MAGIC + HTTP.to_bytes(4, "big")
        await stream.send_all(b"*1\r\n$%d\r\n%b\r\n" % (len(header), header))
        await read_past(stream, b"-ERR unknown command")


# --- side by side ---


async def test_three_vms_of_one_snapshot_serve_three_sets_of_clients(servers: Image) -> None:
    async def use(name: str) -> None:
        async with servers.start() as vm:
            forwarder = await vm.expose_tcp(guest_port=REDIS)
            client = ["redis-cli", "-h", "127.0.0.1", "-p", str(forwarder.local_addr[1])]
            assert await output(*client, "SETNX", "name", name) == "1\n"
            forwarder = await vm.expose_tcp(guest_port=POSTGRES)
            table = f"CREATE TABLE {name} (n int); TABLE {name}"
            await output("psql", *login(forwarder.local_addr), "-Xqc", table)
            assert await output(*client, "GET", "name") == f"{name}\n"

    async with trio.open_nursery() as nursery:
        for name in ("one", "two", "three"):
            nursery.start_soon(use, name)
