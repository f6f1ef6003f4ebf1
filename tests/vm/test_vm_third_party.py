"""Images that other tools made run, and real programs are sane inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from trio_supermachine import Vm, VmConfig
from trio_supermachine.api import unbaked_image

from ..support.debian_image import debian_layout, run

__all__ = ["debian_layout"]  # a fixture

pytestmark = pytest.mark.vm


async def make_busybox_rootfs(root: Path) -> None:
    """A root file system made without this library."""
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    await run(["cp", "/bin/busybox", str(root / "bin")])
    for name in ("sh", "cat", "echo", "id", "env", "pwd", "sleep", "ls", "stat"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\napp:x:1234:567::/home/app:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nstaff:x:567:\nextra:x:99:app\n")


async def test_an_image_of_umoci_is_honoured_in_every_field(tmp_path: Path) -> None:
    root, layout = tmp_path / "root", tmp_path / "layout"
    await make_busybox_rootfs(root)
    image = f"{layout}:mine"
    await run(["umoci", "init", "--layout", str(layout)])
    await run(["umoci", "new", "--image", image])
    await run(["umoci", "insert", "--image", image, str(root), "/"])
    settings = ["env", "PATH=/bin", "env", "GREETING=hello world", "user", "app"]
    settings += ["workingdir", "/srv/data", "entrypoint", "/bin/echo", "cmd", "from the workload"]
    settings += ["stopsignal", "SIGUSR2", "exposedports", "8080/tcp"]
    options = [f"--config.{n}={v}" for n, v in zip(settings[::2], settings[1::2], strict=True)]
    await run(["umoci", "config", "--image", image, *options])

    loaded = await unbaked_image(f"oci:{image}")
    assert loaded.config.argv == ("/bin/echo", "from the workload")
    async with Vm.start(loaded) as vm:
        assert await vm.wait_workload() == 0, vm.console.tail()
        assert b"from the workload" in vm.console.tail()
        done = await vm.run_process(
            ["sh", "-c", "id -un; id -G; pwd; echo $GREETING; echo $HOME"], capture_stdout=True
        )
        assert done.stdout.decode().splitlines() == [
            "app",
            "567 99",
            "/srv/data",
            "hello world",
            "/home/app",
        ]


async def test_the_same_image_through_each_local_transport(tmp_path: Path) -> None:
    root, layout = tmp_path / "root", tmp_path / "layout"
    await make_busybox_rootfs(root)
    await run(["umoci", "init", "--layout", str(layout)])
    await run(["umoci", "new", "--image", f"{layout}:t"])
    await run(["umoci", "insert", "--image", f"{layout}:t", str(root), "/"])
    sources = [f"oci:{layout}:t", f"rootfs:{root}"]
    for transport in ("oci-archive", "docker-archive"):
        archive = tmp_path / transport
        name = ":x:latest" if transport == "docker-archive" else ""
        await run(
            ["skopeo", "copy", "--insecure-policy", f"oci:{layout}:t",
             f"{transport}:{archive}{name}"]
        )  # fmt: skip
        sources.append(f"{transport}:{archive}")

    async def check(source: str) -> None:
        image = await unbaked_image(source)
        async with Vm.start(image) as vm:
            done = await vm.run_process(["/bin/cat", "/etc/passwd"], capture_stdout=True)
            assert b"app:x:1234" in done.stdout

    async with trio.open_nursery() as nursery:
        for source in sources:
            nursery.start_soon(check, source)


@pytest.mark.several_vcpus
async def test_pythons_own_tests_of_processes_pass_in_a_debian(debian_layout: Path) -> None:
    image = await unbaked_image(f"oci:{debian_layout}:t")
    async with Vm.start(image, VmConfig(memory_mib=512, vcpus=2)) as vm:
        script = (
            "import os, sys, subprocess; print(subprocess.check_output(['id', '-un']).decode())"
        )
        done = await vm.run_process(["python3", "-c", script], capture_stdout=True)
        assert done.stdout.strip() == b"root"
        done = await vm.run_process(
            ["python3", "-m", "test", "-j2", "test_pty", "test_signal", "test_subprocess"],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
