"""``vm.run_process`` and ``ExecChild`` do what ``trio.run_process`` and ``trio.Process`` do.

The same cases run on the host, with the same busybox, and in the guest.
"""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from trio_supermachine import Vm

pytestmark = pytest.mark.vm

Run = Callable[..., Awaitable[subprocess.CompletedProcess[bytes]]]

BOTH: dict[str, Any] = {"capture_stdout": True, "capture_stderr": True}

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "true": (["true"], {}),
    "false raises": (["false"], {}),
    "false unchecked": (["false"], {"check": False}),
    "exit status": (["sh", "-c", "exit 77"], {"check": False}),
    "signal": (["sh", "-c", "kill -TERM $$"], {"check": False}),
    "signal raises": (["sh", "-c", "kill -KILL $$"], BOTH),
    "stdout": (["echo", "hello"], {"capture_stdout": True}),
    "stderr": (["sh", "-c", "echo oops >&2"], {"capture_stderr": True}),
    "both": (["sh", "-c", "echo a; echo b >&2"], BOTH),
    "merged": (
        ["sh", "-c", "echo a; echo b >&2; echo c"],
        {"capture_stdout": True, "stderr": subprocess.STDOUT},
    ),
    "output with a failure": (["sh", "-c", "echo a; echo b >&2; exit 3"], BOTH),
    "stdin": (["cat"], {"stdin": b"some input", **BOTH}),
    "stdin bytearray": (["cat"], {"stdin": bytearray(b"some input"), **BOTH}),
    "stdin memoryview": (["cat"], {"stdin": memoryview(b"some input"), **BOTH}),
    "large stdin": (["cat"], {"stdin": b"0123456789" * 50_000, **BOTH}),
    "unread stdin": (["true"], {"stdin": b"0123456789" * 50_000}),
    "stdin is empty by default": (["cat"], BOTH),
    "stdin devnull": (["cat"], {"stdin": subprocess.DEVNULL, **BOTH}),
    "stdin str": (["cat"], {"stdin": "text"}),
    "stdin pipe": (["cat"], {"stdin": subprocess.PIPE}),
    "stdout pipe": (["cat"], {"stdout": subprocess.PIPE}),
    "devnull": (
        ["sh", "-c", "echo a; echo b >&2"],
        {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
    ),
    "stdout twice": (["true"], {"capture_stdout": True, "stdout": subprocess.DEVNULL}),
    "stderr twice": (["true"], {"capture_stderr": True, "stderr": subprocess.DEVNULL}),
    "shell": ("echo $((6*7)); exit 4", {"shell": True, "check": False, **BOTH}),
    "shell bytes": (b"echo $((6*7))", {"shell": True, **BOTH}),
    "string without shell": ("true", {}),
    "sequence with shell": (["true"], {"shell": True}),
    "env": (["env"], {"env": {"A": "1", "B": "two words"}, **BOTH}),
    "empty env": (["env"], {"env": {}, **BOTH}),
    "bad env": (["env"], {"env": {"A=B": "1"}}),
    "nul in env": (["env"], {"env": {"A": "\0"}}),
    "cwd": (["pwd"], {"cwd": "/tmp", **BOTH}),
    "no cwd": (["pwd"], {"cwd": "/no/such/directory"}),
    "no program": (["no-such-program-anywhere"], {}),
    "no program, absolute": (["/no/such/program"], {}),
    "a directory": (["/tmp"], {}),
    "not executable": (["/etc/passwd"], {}),
    "bytes": ([b"echo", b"\xff\xfe"], BOTH),
    "nul": (["echo", "\0"], {}),
    "unknown option": (["true"], {"no_such_option": 1}),
    "sigpipe is not ignored": (["sh", "-c", "kill -PIPE $$; echo alive"], BOTH),
    "no signal is blocked": (["grep", "SigBlk", "/proc/self/status"], BOTH),
    "open files": (["sh", "-c", "ls /proc/$$/fd; true"], BOTH),
    "umask": (["sh", "-c", "umask"], BOTH),
    "background output is waited for": (["sh", "-c", "(sleep 0.3; echo late) & echo now"], BOTH),
    "large output": (["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x"], BOTH),
}


async def outcome(run: Run, command: Any, options: dict[str, Any]) -> object:
    try:
        done = await run(command, **options)
    except subprocess.CalledProcessError as exc:
        return "CalledProcessError", exc.returncode, exc.stdout, exc.stderr, exc.cmd
    except OSError as exc:
        return type(exc).__name__, exc.errno, exc.filename
    except Exception as exc:
        return type(exc).__name__
    return done.returncode, done.stdout, done.stderr, done.args


async def test_the_same_inputs_have_the_same_outcome(vm: Vm) -> None:
    differing = {}
    for name, (command, options) in CASES.items():
        on_host = await outcome(trio.run_process, command, options)
        in_guest = await outcome(vm.run_process, command, options)
        if on_host != in_guest:
            differing[name] = on_host, in_guest
    assert not differing


@pytest.mark.parametrize("where", ["host", "guest"])
async def test_a_process_object_behaves_the_same(vm: Vm, where: str) -> None:
    run: Any = trio.run_process if where == "host" else vm.run_process
    async with trio.open_nursery() as nursery:

        async def start(*command: str) -> Any:
            async def call(task_status: Any) -> None:
                await run(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    check=False,
                    task_status=task_status,
                )

            return await nursery.start(call)

        cat = await start("cat")
        assert cat.returncode is None
        assert cat.args == ["cat"]
        assert isinstance(cat.pid, int)
        await cat.stdin.send_all(b"abc")
        assert await cat.stdout.receive_some() == b"abc"
        await cat.stdin.aclose()
        assert await cat.stdout.receive_some() == b""
        assert await cat.stderr.receive_some() == b""
        assert await cat.wait() == 0
        assert await cat.wait() == 0
        assert cat.returncode == 0
        cat.send_signal(15)

        for method, status in (("terminate", -15), ("kill", -9)):
            sleeper = await start("sleep", "1000")
            getattr(sleeper, method)()
            assert await sleeper.wait() == status

        blocked = await start("cat")
        with trio.move_on_after(0.1) as scope:
            await blocked.stdout.receive_some()
        assert scope.cancelled_caught
        await blocked.stdin.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await blocked.stdin.send_all(b"x")
        assert await blocked.wait() == 0
