"""``trio-supermachine run`` as a user's shell sees it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tarfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pexpect
import pytest

from trio_supermachine import ConfigError
from trio_supermachine.cli.publish import Publish
from trio_supermachine.host import files as hostfiles

pytestmark = [pytest.mark.vm, pytest.mark.long]

PROGRAM = [sys.executable, "-m", "trio_supermachine.cli"]
BUSYBOX = "builtin:busybox"
ANSWER = 120  # seconds: only a hang takes as long


def cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    options.setdefault("stdin", subprocess.DEVNULL)
    if "input" in options:
        del options["stdin"]
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, timeout=ANSWER, check=False, **options
    )


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return cli("run", *arguments, **options)


@pytest.fixture(autouse=True, scope="module")
def baked() -> None:
    """The bake of which most runs here are: the first one says on stderr what it does."""
    assert run("--quiet", BUSYBOX, "true").returncode == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, with the host's kernels."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(hostfiles.home() / "kernels")
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


def test_the_first_run_bakes_and_says_so_and_the_next_one_restores(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(BUSYBOX, "echo", "out")
    assert (first.returncode, first.stdout) == (0, b"out\n")
    phases = [line.partition(":")[0] for line in first.stderr.decode().splitlines()]
    assert phases == ["boot", "capture", "publish"]
    monkeypatch.setenv("TRIO_SUPERMACHINE_TRACE", "vm")
    second = run(BUSYBOX, "echo", "out")
    assert second.stdout == b"out\n"
    assert b" restore <Image" in second.stderr
    assert b" boot <Image" not in second.stderr


@pytest.mark.parametrize("first", ["run", "bake"])
def test_run_and_bake_share_one_bake(home: Path, tmp_path: Path, first: str) -> None:
    image = make_image(tmp_path, {"Cmd": ["/bin/busybox", "touch", "/mark"]}, "bin/busybox")
    command = ("run", "-q", image, "/bin/busybox", "ls", "/mark")
    for words in (command, ("bake", image)) if first == "run" else (("bake", image), command):
        done = cli(*words)
        # The image's own program has not run where a command runs in its place.
        assert done.returncode == (1 if words is command else 0), done.stderr
    (bake,) = json.loads(cli("images", "--json").stdout)["images"]
    assert cli("bake", image).stdout.decode().strip() == bake["fingerprint"]
    assert {path.name for path in (home / "bakes" / bake["fingerprint"]).iterdir()} == {
        "booted",
        "snapshot",
        "used",
    }


def test_a_cold_run_boots_and_bakes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_TRACE", "vm")
    done = run("--cold", BUSYBOX, "echo", "out")
    assert done.stdout == b"out\n"
    assert b" boot <Image" in done.stderr
    assert not (home / "bakes").exists()


def test_a_quiet_first_run_has_only_the_commands_stderr(home: Path) -> None:
    done = run("-q", BUSYBOX, "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_a_run_that_is_stopped_while_it_bakes_leaves_nothing(home: Path) -> None:
    with start(BUSYBOX, "true") as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == b"boot: builtin:busybox\n"
            engines = descendants(process.pid)
            process.terminate()
            assert process.wait(ANSWER) == 128 + signal.SIGTERM
            assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
        finally:
            process.kill()
    assert not list(home.glob("bakes/*/snapshot"))
    assert run(BUSYBOX, "echo", "out").stdout == b"out\n"


def test_what_the_image_runs_has_not_run_in_the_bake(tmp_path: Path) -> None:
    layout = make_image(tmp_path, {"Entrypoint": ["/bin/busybox", "sh", "-c"]}, "bin/busybox")
    script = "echo once >>/marks; /bin/busybox cat /marks"
    for _ in range(2):
        assert run("-q", layout, script).stdout == b"once\n"


def test_output_goes_where_it_belongs_and_the_exit_code_is_the_commands() -> None:
    done = run(BUSYBOX, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_a_signal_is_128_and_its_number() -> None:
    assert run(BUSYBOX, "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126), ("/etc", 126)]
)
def test_what_cannot_be_started_is_126_or_127(program: str, code: int) -> None:
    done = run(BUSYBOX, "--", program)
    assert done.returncode == code
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"trio-supermachine: error: cannot run '{program}': ")


def test_a_timeout_is_124() -> None:
    done = run("--timeout", "0.5", BUSYBOX, "sh", "-c", "echo started; sleep 1000")
    assert (done.returncode, done.stderr) == (124, b"")


def test_options_reach_the_guest(engine_name: str) -> None:
    script = 'echo "$A,$B,$(pwd),$(id -u),$(hostname),$(nproc)"'
    done = run(
        *("-e", "A=1", "--env", "B=x=y", "-e", "ABSENT", "--workdir", "/tmp", "--user", "65534"),
        *("--hostname", "box", "--vcpus", "2", "--memory", "300", "--engine", engine_name),
        *("--quiet", BUSYBOX, "--", "sh", "-c", script),
    )
    assert done.stderr == b""
    assert done.stdout == b"1,x=y,/tmp,65534,box,2\n"


def test_the_environment_is_added_to_the_images() -> None:
    done = run("-e", "PRESENT", BUSYBOX, "env", env={**os.environ, "PRESENT": "here"})
    assert b"PRESENT=here\n" in done.stdout
    assert b"\nPATH=" in b"\n" + done.stdout


def test_options_after_the_image_are_the_commands() -> None:
    done = run(BUSYBOX, "echo", "-i", "--", "--timeout")
    assert done.stdout == b"-i -- --timeout\n"


def test_stdin_is_forwarded_only_when_asked_for() -> None:
    assert run(BUSYBOX, "cat", input=b"unseen").stdout == b""
    data = os.urandom(3_000_000)
    done = run("-i", BUSYBOX, "cat", input=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_stdin_may_be_a_regular_file_or_closed(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"from a file\n")
    with file.open("rb") as opened:
        assert run("-i", BUSYBOX, "cat", stdin=opened).stdout == b"from a file\n"
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *PROGRAM, "run", "-i", BUSYBOX, "echo", "alive"],
        capture_output=True,
        timeout=ANSWER,
        check=False,
    )
    assert closed.stdout == b"alive\n"


def test_a_command_that_ends_without_reading_does_not_wait_for_stdin() -> None:
    reading, writing = os.pipe()
    try:
        done = run("-i", BUSYBOX, "echo", "done", stdin=reading)
        assert done.stdout == b"done\n"
        for fd in (reading, writing):
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_that_goes_away_stops_the_command() -> None:
    with start(BUSYBOX, "yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(ANSWER) == 128 + signal.SIGPIPE


def test_all_output_arrives_however_slow_its_reader_is() -> None:
    with start(BUSYBOX, "sh", "-c", "head -c 200000 /dev/zero; echo end >&2") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"end\n"
        assert len(process.stdout.read()) == 200_000
        assert process.wait(ANSWER) == 0


def start(*arguments: str) -> subprocess.Popen[bytes]:
    # Whoever runs the tests may have them ignore some signals.
    return subprocess.Popen(
        ["env", "--default-signal=INT,HUP,TERM", *PROGRAM, "run", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopping_signal_leaves_nothing_behind(signum: signal.Signals, engine_name: str) -> None:
    with start(BUSYBOX, "sh", "-c", "echo started; sleep 1000") as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"started\n"
            engines = descendants(process.pid)
            assert bool(engines) == (engine_name == "qemu")
            process.send_signal(signum)
            assert process.wait(ANSWER) == 128 + signum
            assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
            assert process.stderr.read() == b""
        finally:
            process.kill()


def test_published_ports_lead_into_the_vm_and_free_ones_are_printed() -> None:
    serve = "echo served >/tmp/page; httpd -p 8080 -h /tmp && echo ready && sleep 1000"
    with start("-p", "8080", "-p", "53/udp", BUSYBOX, "sh", "-c", serve) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            arrow = b"8080/tcp -> "
            first, second = process.stderr.readline(), process.stderr.readline()
            assert first.startswith(arrow + b"127.0.0.1:")
            assert second.startswith(b"53/udp -> 127.0.0.1:")
            assert process.stdout.readline() == b"ready\n"
            address = first.removeprefix(arrow).decode().strip()
            with urlopen(f"http://{address}/page", timeout=ANSWER) as response:
                assert response.read() == b"served\n"
            taken = run("-p", f"{address}:8080", BUSYBOX, "true")
            assert taken.returncode == 125
            assert address in taken.stderr.decode()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "host", "host_port", "guest_port", "protocol"),
    [
        ("80", "127.0.0.1", 0, 80, "tcp"),
        ("8080:80", "127.0.0.1", 8080, 80, "tcp"),
        (":80", "127.0.0.1", 0, 80, "tcp"),
        ("53:5353/udp", "127.0.0.1", 53, 5353, "udp"),
        ("0.0.0.0:80:80/tcp", "0.0.0.0", 80, 80, "tcp"),
        ("0.0.0.0::80", "0.0.0.0", 0, 80, "tcp"),
        ("0.0.0.0:80", "0.0.0.0", 0, 80, "tcp"),
        ("[::1]:8080:80", "::1", 8080, 80, "tcp"),
        ("localhost:8080:80", "localhost", 8080, 80, "tcp"),
    ],
)
def test_ports_are_published_as_docker_has_it(
    text: str, host: str, host_port: int, guest_port: int, protocol: str
) -> None:
    assert Publish.parse(text) == Publish(host, host_port, guest_port, protocol)


@pytest.mark.parametrize(
    "text",
    ["", "x", "80/sctp", "0", "65536", "65536:80", "1:2:3", "::1:80:80", "80-90:80-90", "[::1:80",
     "-1", "80:", "8080:80/", "\u0661", "123456", "a:b:c:d"],
)  # fmt: skip
def test_what_names_no_ports_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="-p"):
        Publish.parse(text)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in listed for child in file.read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


@pytest.mark.parametrize(
    "option",
    [["-v", "/a:/b"], ["--volume", "x"], ["--mount", "x"], ["--balloon"]],
)
def test_options_of_later_versions_are_refused_by_name(option: list[str]) -> None:
    done = run(*option, BUSYBOX, "true")
    assert done.returncode == 125
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("trio-supermachine: error: --")
    assert "not supported" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "1", BUSYBOX],
        ["--memory", "much", BUSYBOX],
        ["--timeout", "0", BUSYBOX],
        ["--engine", "xen", BUSYBOX],
        ["--pull", "often", BUSYBOX],
        ["--publish", "no-port", BUSYBOX],
        ["--publish", "80:70000", BUSYBOX],
        ["--egress", "some", BUSYBOX],
        ["--platform", "linux/arm64", BUSYBOX],
        ["--no-such-option", BUSYBOX],
        ["-e", "=x", BUSYBOX],
        ["-it", BUSYBOX],
        ["rootfs:/nonexistent"],
        ["Not A Reference"],
        [],
    ],
)
def test_our_own_errors_are_125_and_one_line(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 125
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("trio-supermachine: error: ")


def test_tracing_adds_a_traceback() -> None:
    done = run("rootfs:/nonexistent", env={**os.environ, "TRIO_SUPERMACHINE_TRACE": "all"})
    assert done.returncode == 125
    assert b"Traceback (most recent call last)" in done.stderr


def test_an_image_runs_its_entrypoint_with_its_command_or_the_given_one(tmp_path: Path) -> None:
    layout = make_image(tmp_path, {"Entrypoint": ["/bin/echo", "entry"], "Cmd": ["default"]})
    assert run(layout).stdout == b"entry default\n"
    assert run(layout, "--", "given").stdout == b"entry given\n"


def make_image(directory: Path, config: dict[str, object], program: str = "bin/echo") -> str:
    """An OCI layout with the host's static busybox as its only file."""
    layout = directory / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = directory / "layer.tar"
    with tarfile.open(layer, "w") as tar:
        tar.add("/bin/busybox", program)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        media_type = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    stored = put(layer.read_bytes(), "layer.v1.tar")
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [stored["digest"]]},
    }
    described = put(json.dumps(document).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "config": described, "layers": [stored]}
    index = {
        "schemaVersion": 2,
        "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json")],
    }
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{layout}"


def spawn(*arguments: str, **options: Any) -> pexpect.spawn[bytes]:
    return pexpect.spawn(PROGRAM[0], [*PROGRAM[1:], *arguments], timeout=ANSWER, **options)


def test_an_interactive_terminal_is_the_guests_with_its_size_and_ctrl_c() -> None:
    terminal = spawn("run", "-it", BUSYBOX, "sh", dimensions=(30, 100))
    try:
        terminal.sendline("stty size")
        terminal.expect_exact("30 100\r\n")
        terminal.setwinsize(40, 120)
        terminal.sendline("until [ \"$(stty size)\" = '40 120' ]; do :; done; echo re''sized")
        terminal.expect_exact("resized\r\n")
        terminal.sendline("echo rea''dy; sleep 1000")
        terminal.expect_exact("ready\r\n")
        terminal.send("\x03")
        terminal.sendline("exit 5")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close()
    assert terminal.exitstatus == 5


def read_until(terminal: int, text: bytes) -> None:
    """Read what a program writes to a terminal, until it says ``text``."""
    said = b""
    while text not in said:
        assert select.select([terminal], [], [], ANSWER)[0], said
        said += os.read(terminal, 1000)


class InTerminal(NamedTuple):
    """A program, its terminal from outside and inside, and how that was set before."""

    process: subprocess.Popen[bytes]
    ours: int
    theirs: int
    before: list[Any]


@contextmanager
def run_in_terminal(script: str) -> Iterator[InTerminal]:
    """Say ``up`` and run a script, with ``-it``; at the end the terminal must be as before."""
    ours, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        with subprocess.Popen(
            [*PROGRAM, "run", "-it", BUSYBOX, "sh", "-c", f"echo up; {script}"],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                yield InTerminal(process, ours, theirs, before)
            finally:
                process.kill()
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    "command", ["exit 0", "kill -9 $$", "poweroff -f"], ids=["exit", "killed", "power-off"]
)
def test_the_terminal_is_restored_however_the_command_ends(command: str) -> None:
    with run_in_terminal(f"read x; {command}") as (process, ours, theirs, _):
        read_until(ours, b"up")
        assert not termios.tcgetattr(theirs)[3] & termios.ICANON
        os.write(ours, b"\r")
        process.wait(ANSWER)
        assert not fcntl.fcntl(theirs, fcntl.F_GETFL) & os.O_NONBLOCK


def test_the_terminal_is_restored_after_sigterm() -> None:
    with run_in_terminal("sleep 1000") as (process, ours, _, _):
        read_until(ours, b"up")
        process.terminate()
        assert process.wait(ANSWER) == 128 + signal.SIGTERM


def test_a_stopped_run_leaves_the_terminal_to_others_and_takes_it_again() -> None:
    with run_in_terminal("read x; echo $x-came") as (process, ours, theirs, before):
        read_until(ours, b"up")
        process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert termios.tcgetattr(theirs) == before
        process.send_signal(signal.SIGCONT)
        while termios.tcgetattr(theirs)[3] & termios.ICANON:
            assert process.poll() is None
        os.write(ours, b"it\r")
        read_until(ours, b"it-came")
        assert process.wait(ANSWER) == 0
