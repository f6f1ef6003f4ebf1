"""``pull``, ``inspect``, ``save``, ``load``, ``rmi``, ``login`` on the command line, really."""
# ruff: noqa: ASYNC110, ASYNC240 (files)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pexpect
import pytest
import trio

from ..support.fault_proxy import Stall, fault_proxy, through
from ..support.image_files import Layout, layer, make_tar, member
from ..support.registry_server import PASSWORD, USER, RegistryServer

pytestmark = pytest.mark.usefixtures("home")

PROGRAM = [sys.executable, "-m", "trio_supermachine.cli"]


def cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        input=stdin,
        env=dict(os.environ),
    )


def said(*arguments: str, **options: Any) -> str:
    done = cli(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(*arguments: str) -> Any:
    return json.loads(said(*arguments))


def test_from_pull_to_rmi(push: Callable[..., str], home: Path) -> None:
    shared = layer("shared")
    one = push(shared, layer("one"), name="cli/one:1")
    two = push(shared, layer("two"), name="cli/two:1")
    pulled = cli("pull", one)
    assert pulled.returncode == 0
    assert pulled.stderr == ""  # since it is no terminal
    digest = pulled.stdout.strip()
    name = one.removeprefix("docker://")
    inspected = answer("inspect", name)
    assert (inspected["name"], inspected["digest"]) == (name, digest)
    assert all(each["here"] for each in inspected["layers"])
    said("pull", "-q", two)
    document = answer("images", "--json")
    listed = document["pulled"]
    blobs = sum(path.stat().st_size for path in home.glob("content/blobs/sha256/*"))
    squashfs = sum(path.stat().st_size for path in home.glob("layers/*/*.squashfs"))
    assert squashfs > 500_000
    assert blobs + squashfs <= document["size"] < 1.2 * (blobs + squashfs)
    assert [image["name"] for image in listed] == [name, two.removeprefix("docker://")]
    for image in listed:
        assert 250_000 < image["own_size"] < image["size"] - 250_000
    table = said("images")
    assert name in table
    assert digest[7:19] in table
    assert len(list(home.glob("layers/*/*.squashfs"))) == 3
    removed = json.loads(said("rmi", "--json", one))
    assert removed["pulled"] == [name]
    assert len(removed["blobs"]) == 3
    assert len(removed["layers"]) == 1  # the other one has two, too
    assert len(list(home.glob("layers/*/*.squashfs"))) == 2
    assert cli("inspect", one).returncode != 0
    assert answer("inspect", two)["layers"][0] == inspected["layers"][0]
    assert answer("prune", "--all", "--yes", "--json")["pulled"] == [two.removeprefix("docker://")]
    assert not list(home.glob("content/blobs/sha256/*"))


def test_a_saved_image_is_the_same_when_it_is_loaded(
    push: Callable[..., str], registry: RegistryServer, home: Path, tmp_path: Path
) -> None:
    one, two = push(layer("one")), push(layer("two"))
    digests = {said("pull", "-q", each).strip() for each in (one, two)}
    file = tmp_path / "images.tar"
    saved = answer("save", "--json", str(file), one, two)["images"]
    assert set(saved.values()) == digests
    home.rename(tmp_path / "away")
    names = said("load", str(file)).split()
    assert set(names) == set(saved)
    for name in names:
        assert answer("inspect", name)["digest"] == saved[name]
    # Other tools take it, too.
    raw = ["skopeo", "inspect", "--raw", f"oci-archive:{file}:{names[0]}"]
    subprocess.run(raw, check=True, stdout=subprocess.DEVNULL)
    again = tmp_path / "again.tar"
    said("save", str(again), *saved)
    with tarfile.open(file) as first, tarfile.open(again) as second:
        members = {m.name for m in first}
        assert members == {m.name for m in second}


def test_an_archive_goes_where_it_should(push: Callable[..., str], tmp_path: Path) -> None:
    said("pull", "-q", reference := push(layer("a")))
    file, pipe, link = tmp_path / "a.tar", tmp_path / "pipe", tmp_path / "link"
    link.symlink_to(file)
    said("save", str(link), reference)
    assert link.is_symlink()
    os.mkfifo(pipe)
    with subprocess.Popen(["cmp", pipe, file]) as reader:
        said("save", str(pipe), reference)
    assert reader.returncode == 0
    assert pipe.is_fifo()
    absent = cli("save", str(tmp_path / "absent/a.tar"), reference)
    assert absent.returncode == 2
    assert "no directory" in absent.stderr
    assert not (tmp_path / "absent").exists()


def test_a_docker_archive_is_loaded_under_its_name(layout: Layout, tmp_path: Path) -> None:
    data = layer("a")
    layout.write(layout.manifest([data]))
    file = tmp_path / "docker.tar"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{layout.path}",
         f"docker-archive:{file}:some/app:2"],
        check=True,
    )  # fmt: skip
    assert said("load", str(file)) == "docker.io/some/app:2\n"
    found = answer("inspect", "some/app:2")
    assert found["layers"][0]["size"] == len(data)
    assert cli("pull", "--policy", "never", "some/app:2").returncode == 0


def test_an_archive_of_one_image_may_be_given_a_name(layout: Layout, tmp_path: Path) -> None:
    layout.write(layout.manifest([make_tar([member("a")])]))
    file = tmp_path / "oci.tar"
    subprocess.run(["tar", "-cf", file, "-C", layout.path, "."], check=True)
    refused = cli("load", str(file))
    assert refused.returncode != 0
    assert "--name" in refused.stderr
    assert said("load", "--name", "mine", str(file)) == "docker.io/library/mine:latest\n"


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_archive_is_refused(layout: Layout, tmp_path: Path, damage: str) -> None:
    layout.write(layout.manifest([layer("a")], **layout.tagged("a/b:1")))
    file = tmp_path / "oci.tar"
    subprocess.run(["tar", "-cf", file, "-C", layout.path, "."], check=True)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[data.rindex(b"\x1f\x8b\x08") + 1000] ^= 1
    else:
        data[:] = b"this is no archive"
    file.write_bytes(data)
    done = cli("load", str(file))
    assert done.returncode != 0
    assert done.stderr.startswith("trio-supermachine: error: ")
    assert "Traceback" not in done.stderr
    assert not answer("images", "--json")["pulled"]


def test_what_cannot_be_is_said_in_one_line(home: Path, tmp_path: Path) -> None:
    for arguments in (
        ["pull", "oci:/somewhere"],
        ["pull", "--policy", "never", "no/such:1"],
        ["inspect", "no/such:1"],
        ["inspect", "rootfs:/"],
        ["save", str(tmp_path / "x.tar"), "no/such:1"],
        ["load", str(tmp_path / "none.tar")],
        ["rmi", "no/such:1"],
        ["login", "--password-stdin", "localhost:1"],
        ["logout", "localhost:1"],
    ):
        done = cli(*arguments)
        assert done.returncode != 0, arguments
        assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "x.tar").exists()


def test_an_archive_is_not_written_to_a_terminal(push: Callable[..., str]) -> None:
    said("pull", "-q", reference := push(layer("a")))
    terminal = pexpect.spawn(PROGRAM[0], [*PROGRAM[1:], "save", "-", reference], timeout=120)
    terminal.expect_exact("not written to a terminal")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 2


def test_bars_are_for_terminals(push: Callable[..., str]) -> None:
    reference = push(layer("a", 2_000_000), layer("b"))
    terminal = pexpect.spawn(PROGRAM[0], [*PROGRAM[1:], "pull", reference], timeout=120)
    terminal.expect("download [0-9a-f]{24}")
    terminal.expect("sha256:[0-9a-f]{64}\r\n")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_a_login_that_the_registry_takes_is_kept_until_the_logout(
    push: Callable[..., str],
    basic_registry: RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = push(layer("a"), name="cli/secret:1").rpartition("/cli/")[2]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    basic_registry.trust(tmp_path / "config")
    reference = f"{basic_registry.host}/cli/{name}"
    assert cli("pull", reference).returncode != 0
    login = ["login", basic_registry.host, "-u", USER, "--password-stdin"]
    assert cli(*login, stdin="wrong\n").returncode != 0
    assert cli("pull", reference).returncode != 0
    said(*login, stdin=PASSWORD + "\n")
    said("pull", reference)
    kept = json.loads((tmp_path / "docker/config.json").read_bytes())
    assert list(kept["auths"]) == [basic_registry.host]
    said("logout", basic_registry.host)
    assert cli("pull", reference).returncode != 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_pull_that_a_signal_ends_says_nothing_and_goes_on_later(
    push: Callable[..., str], registry: RegistryServer, home: Path, signum: signal.Signals
) -> None:
    reference = push(layer("a", 3_000_000))
    # The configuration is too short for its fault; the layer is not.
    faults = [Stall(on="/blobs/", after=900_000)] * 2
    async with fault_proxy(registry.address, faults) as proxy:
        name = through(proxy, reference)
        async with trio.open_nursery() as nursery:
            # Whoever runs the tests may have them ignore some.
            heedful = ["env", "--default-signal=INT,HUP,TERM", *PROGRAM]
            start = partial(
                trio.run_process,
                [*heedful, "pull", name],
                check=False,
                capture_stderr=True,
            )
            process = await nursery.start(start)
            with trio.fail_after(60):
                while not any(f.stat().st_size > 500_000 for f in home.glob("content/partial/*")):
                    await trio.sleep(0.02)
            process.send_signal(signum)
            with trio.fail_after(60):
                assert await process.wait() == 128 + signum
        assert not list(home.glob("content/leases/*"))
        (begun,) = home.glob("content/partial/*")
        assert begun.stat().st_size > 500_000
        proxy.plan.clear()
        done = await trio.run_process(
            [*PROGRAM, "pull", name], capture_stdout=True, capture_stderr=True
        )
    assert done.stdout.startswith(b"sha256:")
    assert done.stderr == b""


def test_a_pull_for_another_platform_is_kept_to_be_looked_at(push: Callable[..., str]) -> None:
    foreign = push(layer("a"), change_config=lambda document: document.update(os="windows"))
    refused = cli("run", "--platform", "windows/amd64", foreign, "true")
    assert refused.returncode == 125
    assert "pull --platform windows/amd64" in refused.stderr
    digest = said("pull", "--platform", "windows/amd64", foreign).strip()
    assert answer("inspect", "--platform", "windows/amd64", foreign)["digest"] == digest
    absent = cli("pull", foreign)
    assert absent.returncode == 125
    assert "it has windows/amd64, but nothing for linux/amd64" in absent.stderr
