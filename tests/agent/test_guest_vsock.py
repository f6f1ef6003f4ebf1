"""The agent over real AF_VSOCK, which differs from unix sockets in how it tells of ends."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from trio_supermachine.api import unbaked_image
from trio_supermachine.kernels import prepare_kernel

from ..support import guest_client as g
from ..support.guest_client import exec_request, frame, string, u32
from ..support.guest_vsock import Boot, VsockGuest, booted, frames, restored
from ..support.guests import VCPUS

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(
        not os.path.exists("/dev/vhost-vsock"), reason="needs the module vhost_vsock"
    ),
]


@pytest.fixture(scope="module")
def boot() -> Boot:
    kernel = trio.run(prepare_kernel)
    image = trio.run(unbaked_image, "builtin:busybox")
    return Boot(kernel.kernel, kernel.initramfs, tuple(image.layers), VCPUS)


@pytest.fixture(scope="module")
def guest(boot: Boot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VsockGuest]:
    """One guest for all tests that leave it as it was."""
    with booted(attrs.evolve(boot, cid=4), tmp_path_factory.mktemp("guest")) as (_, guest):
        yield guest


def alive(guest: VsockGuest, name: str) -> bool:
    return bool(guest.run("sh", "-c", f"pidof {name} || true").strip())


def wait_until_gone(guest: VsockGuest, name: str) -> None:
    guest.run("sh", "-c", f"while pidof {name}; do usleep 10000; done")


def started(connection: socket.socket, *argv: str) -> Iterator[tuple[int, int, bytes]]:
    connection.sendall(exec_request(argv, window=1 << 30))
    answers = frames(connection)
    assert next(answers)[0] == g.STARTED
    return answers


def test_an_exec_runs_and_much_output_arrives_whole(guest: VsockGuest) -> None:
    assert guest.run("echo", "out") == b"out\n"
    assert guest.run("seq", "300000") == b"".join(b"%d\n" % n for n in range(1, 300_001))


def test_much_input_arrives_whole(guest: VsockGuest) -> None:
    data = os.urandom(3_000_000)
    with guest.dial() as connection:
        connection.sendall(frame(g.WRITE_FILE, string("/tmp/file") + u32(0o644)))
        for at in range(0, len(data), 65536):
            connection.sendall(frame(g.DATA, data[at : at + 65536]))
        connection.sendall(frame(g.END))
        assert [kind for kind, _, _ in frames(connection)] == [g.OK, g.OK]
    answers = guest.ask(frame(g.READ_FILE, string("/tmp/file") + struct.pack("<Q", 1 << 30)))
    assert b"".join(payload for kind, _, payload in answers if kind == g.DATA) == data


def test_what_was_sent_before_closing_counts(guest: VsockGuest) -> None:
    with guest.dial() as connection:
        request = frame(g.WRITE_FILE, string("/tmp/file") + u32(0o644))
        connection.sendall(request + frame(g.DATA, b"x" * 65536) + frame(g.DATA, b"y"))
        connection.sendall(frame(g.END))
        connection.recv(1)  # it has been opened
    guest.run("sh", "-c", "until [ -e /tmp/file ]; do usleep 10000; done")
    assert guest.run("wc", "-c", "/tmp/file").split()[0] == b"65537"


@pytest.mark.parametrize("half_first", [False, True])
def test_closing_kills_the_group(guest: VsockGuest, half_first: bool) -> None:
    with guest.dial() as connection:
        answers = started(connection, "sleep", "1000")
        if half_first:
            connection.shutdown(socket.SHUT_WR)
            guest.call(g.PING)
            assert alive(guest, "sleep")
        answers.close()  # type: ignore[attr-defined]
    wait_until_gone(guest, "sleep")


def test_closing_kills_a_group_whose_output_nobody_reads(guest: VsockGuest) -> None:
    with guest.dial() as connection:
        answers = started(connection, "yes")
        guest.call(g.PING)
        answers.close()  # type: ignore[attr-defined]
    wait_until_gone(guest, "yes")


def test_closing_kills_a_group_that_does_not_read_its_input(guest: VsockGuest) -> None:
    with guest.dial() as connection:
        connection.sendall(exec_request(["sleep", "1000"], flags=g.STDIN))
        connection.sendall(frame(g.DATA, bytes(65536)) * 4)
        guest.call(g.PING)
    wait_until_gone(guest, "sleep")


def test_a_half_closed_connection_goes_on(guest: VsockGuest) -> None:
    with guest.dial() as connection:
        connection.sendall(exec_request(["sh", "-c", "sleep 0.1; echo x"]))
        connection.shutdown(socket.SHUT_WR)
        assert g.EXIT in [kind for kind, _, _ in frames(connection)]


def test_signals_are_answered_while_output_is_not_read(guest: VsockGuest) -> None:
    with guest.dial() as connection:
        connection.sendall(exec_request(["yes"], window=1 << 30))
        connection.sendall(frame(g.SIGNAL, struct.pack("<IiI", 7, signal.SIGKILL, 1)))
        kinds = [kind for kind, _, _ in frames(connection)]
    assert g.ACK in kinds
    assert g.EXIT in kinds


def test_many_connections_at_once(guest: VsockGuest) -> None:
    connections = [guest.dial() for _ in range(50)]
    for n, connection in enumerate(connections):
        connection.sendall(exec_request(["echo", str(n)]))
    for n, connection in enumerate(connections):
        with connection:
            output = [payload for kind, _, payload in frames(connection) if kind == g.DATA]
            assert output == [b"%d\n" % n]


def test_without_its_host_the_machine_powers_off(boot: Boot, tmp_path: Path) -> None:
    with booted(boot, tmp_path) as (qemu, guest):
        guest.lifeline.shutdown(socket.SHUT_RDWR)
        assert qemu.process.wait(g.PATIENCE) == 0


@pytest.mark.several_vcpus
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_copy_is_told_so_before_anything_runs_in_it(
    boot: Boot, tmp_path: Path, vcpus: int
) -> None:
    boot = attrs.evolve(boot, vcpus=vcpus)
    counting = "n=0; while :; do n=$((n+1)); echo $n >/tmp/next; mv /tmp/next /tmp/count; done"
    state = tmp_path / "state"
    with booted(boot, tmp_path) as (qemu, guest):
        first = guest.run("cat", "/proc/sys/kernel/random/boot_id")
        with guest.dial() as running, guest.dial() as silent, guest.dial() as held:
            answers = started(running, "sh", "-c", f"setsid sh -c '{counting}' & sleep 1000")
            guest.run("sh", "-c", "until [ -e /tmp/count ]; do usleep 10000; done")
            silent.sendall(frame(g.PING)[:5])
            guest.call(g.FREEZE)
            held.sendall(exec_request(["touch", "/tmp/held"]))
            guest.call(g.PING)
            qemu.save(state)
            answers.close()  # type: ignore[attr-defined]
    for _ in range(2):
        with restored(boot, tmp_path, state) as (_, guest):
            assert guest.run("cat", "/etc/machine-id") == b"0123456789abcdef" * 2 + b"\n"
            assert guest.run("cat", "/proc/sys/kernel/random/boot_id") != first
            there = int(guest.run("cat", "/tmp/count"))
            guest.run("sh", "-c", f"until [ $(cat /tmp/count) -gt {there} ]; do usleep 9000; done")
            wait_until_gone(guest, "sleep")
            assert guest.run("sh", "-c", "ls /tmp/held || echo no").endswith(b"no\n")
            for _ in range(20):
                assert guest.run("echo", "x") == b"x\n"


def test_a_machine_that_was_only_paused_goes_on_where_it_was(boot: Boot, tmp_path: Path) -> None:
    with booted(boot, tmp_path) as (qemu, guest), guest.dial() as connection:
        answers = started(connection, "sh", "-c", "sleep 1; echo x")
        guest.call(g.FREEZE)
        qemu.execute("stop")
        qemu.execute("cont")
        guest.call(g.SET_CLOCK, struct.pack("<Q", 10**18))
        guest.call(g.THAW)
        assert [payload for kind, _, payload in answers if kind == g.DATA] == [b"x\n"]
        assert guest.run("date", "+%s").startswith(b"1000000")
