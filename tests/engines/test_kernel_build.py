"""The small kernel: its configuration, its build, and that nothing of a build stays behind."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import trio_supermachine.kernels.store as store
from trio_supermachine import Vm
from trio_supermachine._util.progress import Progress
from trio_supermachine.cli.app import app
from trio_supermachine.errors import AssetNotFound
from trio_supermachine.host.assets import AssetPaths
from trio_supermachine.kernels import (
    CachedKernel,
    build_small_kernel,
    list_kernels,
    preferred_kernel,
    prepare_kernel,
)
from trio_supermachine.kernels.fragment import fragment_digest, missing_options, read_fragment
from trio_supermachine.kernels.group import CommandFailed, run_group
from trio_supermachine.kernels.image import KernelImage

from ..pure.test_kernels import elf
from ..support.guests import PATIENCE

pytestmark = pytest.mark.long

# The configuration.


@pytest.fixture
def fragment() -> str:
    return read_fragment("x86_64")


def test_a_configuration_with_every_line_is_complete(fragment: str) -> None:
    more = "CONFIG_OTHER=y\n# CONFIG_ANOTHER is not set\n"
    assert missing_options(fragment, more + fragment) == []


def test_an_unset_option_may_be_unknown_too() -> None:
    assert missing_options("# CONFIG_A is not set\n", "") == []
    assert missing_options("# CONFIG_A is not set\n", "CONFIG_A=y\n") == ["CONFIG_A=n"]


@given(st.data())
def test_each_line_that_was_dropped_or_changed_is_named(data: st.DataObject) -> None:
    fragment = read_fragment("x86_64")
    options = [line for line in fragment.splitlines() if line.startswith("CONFIG_")]
    dropped = data.draw(st.sampled_from(options))
    name = dropped.partition("=")[0]
    instead = data.draw(st.sampled_from(["", f"# {name} is not set", f"{name}=m"]))
    config = fragment.replace(dropped + "\n", instead + "\n")
    assert missing_options(fragment, config) == [dropped]


def test_the_digest_tells_configurations_apart_and_ignores_comments(fragment: str) -> None:
    digest = fragment_digest(fragment)
    assert fragment_digest(f"# a comment\n\n{fragment}") == digest
    assert fragment_digest("".join(reversed(fragment.splitlines(keepends=True)))) == digest
    assert fragment_digest(fragment + "CONFIG_MORE=y\n") != digest


@pytest.mark.parametrize(
    "option",
    [
        *("VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_CONSOLE", "VIRTIO_VSOCKETS", "VIRTIO_BALLOON"),
        *("VIRTIO_FS", "FUSE_DAX", "HW_RANDOM_VIRTIO", "SQUASHFS_LZ4", "SQUASHFS_ZSTD"),
        *("OVERLAY_FS", "EXT4_FS", "FUSE_FS", "CGROUPS", "CGROUP_BPF", "SECCOMP_FILTER"),
        *("NAMESPACES", "PVH", "KVM_GUEST", "VMGENID", "INET", "IPV6", "UNIX", "INET_DIAG"),
    ],
)
def test_what_guests_rely_on_is_asked_for(option: str, fragment: str) -> None:
    assert f"CONFIG_{option}=y" in fragment.splitlines()


# Commands and what they start.


def ended(pidfd: int) -> bool:
    """Whether the process has ended; waits for it, within reason."""
    try:
        return bool(select.select([pidfd], [], [], PATIENCE)[0])
    finally:
        os.close(pidfd)


async def test_a_command_tells_its_lines_and_ends(tmp_path: Path) -> None:
    lines: list[str] = []

    async def on_line(line: str) -> None:
        lines.append(line)

    script = "pwd; echo $V >&2; printf unfinished"
    await run_group(["sh", "-c", script], tmp_path, {"V": "1", "PATH": os.defpath}, on_line)
    assert lines == [str(tmp_path), "1"]


async def test_a_command_that_fails_raises_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="ended with 3") as caught:
        await run_group(["sh", "-c", "echo out; echo why >&2; exit 3"], tmp_path, os.environ)
    assert caught.value.said == "out\nwhy"


async def test_cancellation_kills_all_that_a_command_started(tmp_path: Path) -> None:
    pidfds: list[int] = []
    with trio.CancelScope() as scope:

        async def on_line(line: str) -> None:
            pidfds.append(os.pidfd_open(int(line)))
            scope.cancel()

        # The inner process ignores what can be ignored, and is no child of the command.
        script = "(trap '' HUP INT TERM; sh -c 'echo $$; exec sleep 1000') & wait"
        await run_group(["sh", "-c", script], tmp_path, os.environ, on_line)
    assert scope.cancelled_caught
    assert ended(pidfds[0])


def test_a_killed_program_takes_its_commands_along() -> None:
    program = (
        "import os, trio\n"
        "from pathlib import Path\n"
        "from trio_supermachine.kernels.group import run_group\n"
        "async def show(line): print(line, flush=True)\n"
        "command = ['sh', '-c', 'sh -c \"echo \\\\$\\\\$; exec sleep 1000\" & wait']\n"
        "trio.run(run_group, command, Path('/'), os.environ, show)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
    assert ended(pidfd)


# The store.


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRIO_SUPERMACHINE_KERNEL", raising=False)
    monkeypatch.delenv("TRIO_SUPERMACHINE_OFFLINE", raising=False)
    return tmp_path / "home"


def install(kind: store.Kind, release: str, fragment: str | None = None) -> CachedKernel:
    """What a build or a download publishes, of a kernel as small as the reader looks at."""
    image = KernelImage(release=release, form="elf", data=elf(release))
    directory = store._store() / f"{kind}-{release}-{fragment}"
    return store._install(directory, image, [], origin="test", kind=kind, fragment=fragment)


async def test_the_small_kernel_of_this_configuration_is_preferred(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = fragment_digest(read_fragment("x86_64"))
    assert await preferred_kernel() is None
    install("small", "6.99.0", "of another")
    assert await preferred_kernel() is None
    stock = install("stock", "6.50.0")
    assert await preferred_kernel() == stock
    install("small", "6.12.1", current)
    small = install("small", "6.12.2", current)
    assert await preferred_kernel() == small
    assert (await prepare_kernel()).kernel == small.kernel
    assert len(await list_kernels()) == 4
    named = tmp_path / "named"
    named.write_bytes(elf("6.1.0"))
    assert (await prepare_kernel(AssetPaths(kernel=named))).release == "6.1.0"
    monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", "1")
    assert await build_small_kernel() == small


async def test_metadata_of_an_unknown_kind_is_passed_over(own_home: Path) -> None:
    kernel = install("stock", "6.50.0")
    metadata = kernel.directory / "kernel.json"
    text = metadata.read_text()
    assert await list_kernels() == [kernel]
    metadata.write_text(text.replace('"stock"', '"magic"'))
    assert await list_kernels() == []


def test_the_list_marks_the_kernel_that_a_start_takes(own_home: Path) -> None:
    done = CliRunner().invoke(app, ["kernel", "list"])
    assert (done.exit_code, done.stdout) == (0, "")
    stock = install("stock", "6.50.0")
    small = install("small", "6.12.2", fragment_digest(read_fragment("x86_64")))
    done = CliRunner().invoke(app, ["kernel", "list"])
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["stock", "6.50.0"],
        ["*", "small"],
    ]
    done = CliRunner().invoke(app, ["kernel", "list", "--json"])
    found = {kernel["kind"]: kernel for kernel in json.loads(done.stdout)}
    assert not found["stock"]["preferred"]
    assert found["small"]["preferred"]
    assert found["stock"]["digest"] == stock.digest
    assert found["small"]["path"] == str(small.kernel)


# The build.


async def test_a_host_without_the_tools_is_told_which_packages_to_install(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("ld", "strip", "make", "bc", "tar", "xz", "nice"):
        (tools / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(AssetNotFound) as caught:
        await build_small_kernel()
    assert caught.value.remedy == "apt-get install bison flex gcc libc6-dev libelf-dev"


async def test_a_build_without_a_network_says_how_to_get_a_kernel(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", "1")
    with pytest.raises(AssetNotFound, match="TRIO_SUPERMACHINE_KERNEL=PATH"):
        await build_small_kernel()


def can_build() -> bool:
    tools = ("apt-get", "gcc", "make", "flex", "bison", "bc", "xz")
    return all(map(shutil.which, tools)) and Path("/usr/include/gelf.h").exists()


needs_tools = pytest.mark.skipif(not can_build(), reason="needs what builds a kernel")
takes_minutes = pytest.mark.skipif(
    "TRIO_SUPERMACHINE_TEST_KERNEL" not in os.environ,
    reason="takes minutes; TRIO_SUPERMACHINE_TEST_KERNEL=1 runs it",
)


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name != ".lock" and not path.is_dir()]


@needs_tools
@takes_minutes
async def test_an_option_that_the_sources_do_not_have_is_named(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = read_fragment("x86_64") + "CONFIG_NO_SUCH_THING=y\n"
    monkeypatch.setattr(store, "_fragment", lambda: (text, fragment_digest(text)))
    with pytest.raises(AssetNotFound, match=r"does not take CONFIG_NO_SUCH_THING=y;"):
        await build_small_kernel()
    assert "downloading linux-source-6" in capfd.readouterr().err
    assert leftovers(own_home) == []


@needs_tools
async def test_a_cancelled_build_leaves_nothing_and_the_next_sweeps_after_a_killed_one(
    own_home: Path,
) -> None:
    killed = own_home / "kernels/.build/.tmp-killed"
    killed.mkdir(parents=True)
    (killed / "vmlinux.o").write_bytes(b"half")
    phases: list[str] = []
    with trio.CancelScope() as scope:

        async def progress(step: Progress) -> None:
            phases.append(step.phase)
            if step.phase == "build" and step.done == 3:
                scope.cancel()

        await build_small_kernel(progress=progress)
    assert scope.cancelled_caught
    assert list(dict.fromkeys(phases)) == ["download", "unpack", "build"]
    assert leftovers(own_home) == []
    assert await list_kernels() == []


@needs_tools
@takes_minutes
async def test_a_build_makes_a_kernel_once(own_home: Path) -> None:
    steps: list[Progress] = []

    async def progress(step: Progress) -> None:
        steps.append(step)

    kernels: list[CachedKernel] = []

    async def build() -> None:
        kernels.append(await build_small_kernel(progress=progress))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(build)
        nursery.start_soon(build)
    assert kernels[0] == kernels[1]
    assert await preferred_kernel() == kernels[0]
    assert len([step for step in steps if step.phase == "unpack"]) == 1
    assert steps[-1].done == steps[-1].total
    assert set(leftovers(own_home)) == {
        kernels[0].kernel,
        kernels[0].directory / "kernel.json",
    }


# The kernel itself, where it was built.


@pytest.mark.vm
@pytest.mark.small_kernel
async def test_a_guest_on_the_small_kernel_has_what_images_rely_on(vm: Vm) -> None:
    kernel = await preferred_kernel()
    if kernel is None or kernel.kind != "small" or "TRIO_SUPERMACHINE_KERNEL" in os.environ:
        pytest.skip("needs `trio-supermachine kernel build`")

    async def read(path: str) -> list[str]:
        return (await vm.read_file(path)).decode().split()

    assert await read("/proc/sys/kernel/osrelease") == [kernel.release]
    kinds = {"squashfs", "overlay", "ext4", "fuse", "virtiofs", "tmpfs", "cgroup2", "binfmt_misc"}
    assert kinds <= set(await read("/proc/filesystems"))
    assert {"cpuset", "cpu", "io", "memory", "pids"} <= set(
        await read("/sys/fs/cgroup/cgroup.controllers")
    )
    assert "user_notif" in await read("/proc/sys/kernel/seccomp/actions_avail")
    script = (
        "set -e; cd /sys/fs/cgroup; mkdir t; echo 1 >t/cgroup.freeze; cat t/cgroup.freeze; rmdir t;"
        " ls /proc/self/ns; test -e /proc/net/if_inet6; test -e /proc/net/unix;"
        " test ! -e /proc/modules"
    )
    done = await vm.run_process(["sh", "-c", script], capture_stdout=True)
    frozen, *namespaces = done.stdout.decode().split()
    assert frozen == "1"
    assert {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} <= set(namespaces)
