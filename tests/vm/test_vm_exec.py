"""Programs in a guest: streams, signals, terminals, and what leaving a block does."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from typing import Any

import pytest
import trio

from trio_supermachine import ExecChild, Vm

from ..support.guests import guest_processes, read_past, read_until

pytestmark = [pytest.mark.vm, pytest.mark.lab]


async def test_output_is_streamed_as_it_is_written(vm: Vm) -> None:
    async with vm.exec(["sh", "-c", "echo one; read x; echo two; read y"]) as child:
        assert child.stdin is not None
        assert await child.stdout.receive_some() == b"one\n"
        await child.stdin.send_all(b"\n")
        assert await child.stdout.receive_some() == b"two\n"
        await child.stdin.send_all(b"\n")
        assert await child.wait() == 0
        assert await child.stdout.receive_some() == b""
    assert child.returncode == 0


async def test_stdout_and_stderr_are_apart_and_neither_blocks_the_other(vm: Vm) -> None:
    script = "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2; echo end >&2"
    async with vm.exec(["sh", "-c", script]) as child:
        errors = await read_until(child.stderr, b"end\n")
        assert len(errors) == 100_004
        assert sum([len(chunk) async for chunk in child.stdout]) == 100_000


async def test_a_program_that_prints_for_ever_is_held_back_and_killed(vm: Vm) -> None:
    async with vm.exec(["yes"]) as child:
        await trio.testing.wait_all_tasks_blocked(0.3)
        assert (await child.stdout.receive_some(4)) == b"y\ny\n"
        assert len(await guest_processes(vm, "yes")) == 1
        child.kill()
        assert await child.wait() == -signal.SIGKILL
    assert await guest_processes(vm, "yes") == []


async def test_eof_on_stdin_ends_a_filter(vm: Vm) -> None:
    async with vm.exec(["wc", "-c"]) as child:
        assert child.stdin is not None
        await child.stdin.send_all(b"x" * 3_000_000)
        await child.stdin.aclose()
        assert await read_until(child.stdout, b"\n") == b"3000000\n"


async def test_sending_to_a_program_that_does_not_read_waits_and_breaks_at_its_end(
    vm: Vm,
) -> None:
    async with vm.exec(["sleep", "1000"]) as child:
        assert child.stdin is not None
        with trio.move_on_after(0.5) as scope:
            await child.stdin.send_all(b"x" * 10_000_000)
        assert scope.cancelled_caught
        child.kill()
        await child.wait()
        with pytest.raises(trio.BrokenResourceError):
            await child.stdin.send_all(b"x")


async def test_closing_stdout_gives_the_program_sigpipe(vm: Vm) -> None:
    async with vm.exec(["yes"]) as child:
        await child.stdout.aclose()
        assert await child.wait() == -signal.SIGPIPE
        with pytest.raises(trio.ClosedResourceError):
            await child.stdout.receive_some()


async def test_leaving_the_block_by_an_exception_kills_the_group(vm: Vm) -> None:
    with pytest.raises(KeyError):
        async with vm.exec(["sh", "-c", "sleep 1001 & sleep 1002"]):
            raise KeyError
    assert await guest_processes(vm, "sleep 100") == []


async def test_a_background_child_in_the_group_does_not_outlive_the_block(vm: Vm) -> None:
    async with vm.exec(["sh", "-c", "sleep 1003 >/dev/null 2>&1 & echo up"]) as child:
        assert await read_until(child.stdout, b"\n") == b"up\n"
        assert await child.wait() == 0
    assert await guest_processes(vm, "sleep 1003") == []


async def test_a_detached_child_lives_on(vm: Vm) -> None:
    detach = "setsid sh -c '>/tmp/up; exec sleep 1004' >/dev/null 2>&1 </dev/null &"
    await vm.run_process(["sh", "-c", detach + " while [ ! -e /tmp/up ]; do :; done"])
    assert len(await guest_processes(vm, "sleep 1004")) == 1


async def test_a_cancel_scope_is_the_timeout(vm: Vm) -> None:
    with trio.move_on_after(0.5) as scope:
        await vm.run_process(["sh", "-c", "sleep 1005 & sleep 1006"])
    assert scope.cancelled_caught
    assert await guest_processes(vm, "sleep 100") == []


async def test_cancelling_wait_or_a_receive_ends_that_alone(vm: Vm) -> None:
    async with vm.exec(["cat"]) as child:
        assert child.stdin is not None
        with trio.move_on_after(0.05):
            await child.wait()
        with trio.move_on_after(0.05):
            await child.stdout.receive_some()
        await child.stdin.send_all(b"still here\n")
        assert await read_until(child.stdout, b"\n") == b"still here\n"


async def test_signals_are_delivered_and_acknowledged(vm: Vm) -> None:
    script = "trap 'echo got; exit 7' USR1; echo ready; while :; do sleep 0.05; done"
    async with vm.exec(["sh", "-c", script]) as child:
        assert await read_until(child.stdout, b"\n") == b"ready\n"
        await child.signal(signal.SIGUSR1)
        assert await read_until(child.stdout, b"\n") == b"got\n"
        assert await child.wait() == 7
        await child.signal(signal.SIGUSR1)
        child.terminate()
    signaler = child.signaler()
    signaler.kill()
    await signaler.signal(signal.SIGTERM)
    with pytest.raises(ValueError, match="signal"):
        signaler.send_signal(65)


async def test_a_program_that_does_not_exist_raises_as_subprocess_does(vm: Vm) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        async with vm.exec(["no-such-program"]):
            pytest.fail("entered")
    assert caught.value.filename == "no-such-program"
    with pytest.raises(PermissionError):
        await vm.run_process(["/etc/passwd"])
    with pytest.raises(FileNotFoundError):
        await vm.run_process(["true"], cwd="/no/such/directory")


async def test_a_program_that_is_awaited_says_what_to_write(vm: Vm) -> None:
    child: Any = vm.exec(["true"])
    with pytest.raises(TypeError, match=r"write 'async with vm\.exec\(argv\) as child:'"):
        await child


async def test_a_variable_that_is_no_text_is_named(vm: Vm) -> None:
    environment: Any = {"A": 1}
    with pytest.raises(TypeError, match=r"not 'A': 1$"):
        await vm.run_process(["true"], env=environment)


@pytest.mark.parametrize("argv", [[], ["a\0b"], ["true", "\0"]])
async def test_an_impossible_argv_is_a_value_error(vm: Vm, argv: list[str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which of two does not matter
        await vm.run_process(argv)
    with pytest.raises(ValueError):  # noqa: PT011
        async with vm.exec(argv):
            pytest.fail("entered")


async def test_environment_directory_and_user(vm: Vm) -> None:
    async def out(*argv: str, **options: object) -> str:
        done = await vm.run_process(list(argv), capture_stdout=True, **options)  # type: ignore[arg-type]
        return done.stdout.decode().strip()

    assert await out("env", env={"A": "1"}) == "A=1"
    assert "PATH=" in await out("env")
    assert await out("pwd", cwd="/tmp") == "/tmp"
    assert await out("id", "-u", user="nobody") == "65534"
    assert await out("sh", "-c", "id -u; id -g", user="1234:567") == "1234\n567"
    assert await out("id", "-u", user=1234) == "1234"
    added = await vm.exec_builder().argv(["env"]).env("A", "1").output()
    assert b"PATH=" in added.stdout
    assert b"A=1\n" in added.stdout


async def test_a_terminal(vm: Vm) -> None:
    async with vm.exec(["sh"], tty=True, winsize=(100, 30), env={"PS1": "> "}) as child:
        assert child.stdin is not None
        await read_past(child.stdout, b"> ")
        await child.stdin.send_all(b"stty size; tty\n")
        await read_past(child.stdout, b"30 100\r\n/dev/pts/")
        await child.resize(90, 20)
        await child.stdin.send_all(b"stty size\n")
        await read_past(child.stdout, b"20 90\r\n")
        await child.stdin.send_all(b"sleep 1000\n")
        while not await guest_processes(vm, "sleep 1000"):
            pass
        await child.stdin.send_all(b"\x03echo status $?\n")
        await read_past(child.stdout, b"status 130\r\n")
        await child.stdin.aclose()
        async for _ in child.stdout:
            pass
        assert await child.stderr.receive_some() == b""
        assert await child.wait() == 0


async def test_run_process_in_a_nursery_hands_out_the_child(vm: Vm) -> None:
    async with trio.open_nursery() as nursery:
        child: ExecChild = await nursery.start(
            partial(vm.run_process, ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert child.stdin is not None
        await child.stdin.send_all(b"hello\n")
        assert await read_until(child.stdout, b"\n") == b"hello\n"
        await child.stdin.aclose()
        assert await child.wait() == 0


async def test_builder_outcomes(vm: Vm) -> None:
    outcome = await vm.exec_builder().argv(["sh", "-c", "echo out; echo err >&2; exit 3"]).output()
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (3, b"out\n", b"err\n")
    assert not outcome.success
    assert 0 < outcome.duration < 10
    assert outcome.peak_rss_kib > 0

    timed = await vm.exec_builder().argv(["sleep", "1007"]).timeout(0.2).output()
    assert (timed.returncode, timed.timed_out, timed.success) == (-9, True, False)

    chained = vm.exec_builder().argv(["echo", "a"]).chain(["false"]).chain(["echo", "b"])
    outcome = await chained.output()
    assert (outcome.returncode, outcome.stdout) == (1, b"a\n")

    staged = vm.exec_builder().stage_file_mode("/tmp/run.sh", b"#!/bin/sh\necho staged $1\n", 0o755)
    outcome = await staged.argv(["/tmp/run.sh", "x"]).output_resilient(2)
    assert (outcome.success, outcome.stdout) == (True, b"staged x\n")

    event = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_running, vm, event)
        outcome = await vm.exec_builder().argv(["sleep", "1008"]).output_with_cancel(event)
    assert (outcome.returncode, outcome.cancelled) == (-9, True)


async def _set_when_running(vm: Vm, event: trio.Event) -> None:
    while not await guest_processes(vm, "sleep 1008"):
        pass
    event.set()


async def test_fifty_at_once_are_all_right(vm: Vm) -> None:
    async def one(number: int) -> None:
        done = await vm.run_process(
            ["sh", "-c", f"cat; echo {number}"], stdin=b"%d " % number, capture_stdout=True
        )
        assert done.stdout == b"%d %d\n" % (number, number)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(one, number)


async def test_megabytes_go_through_both_ways_unharmed(vm: Vm) -> None:
    data = bytes(range(256)) * 16384
    done = await vm.run_process(["cat"], stdin=data, capture_stdout=True)
    assert done.stdout == data
