"""Images of local sources: found by their references, honoured, verified, converted once."""
# ruff: noqa: ASYNC110, ASYNC221, ASYNC240 (files are what these tests wait for and look at)

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import zstandard

from trio_supermachine._util.progress import Progress
from trio_supermachine.errors import (
    AssetNotFound,
    ConfigError,
    ImageCorrupt,
    ImageNotFound,
    ReferenceInvalid,
    SupermachineError,
)
from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.oci.platform import Platform

from ..support.image_files import Layout, make_tar, member, store_files, tree, unpack

ARCHITECTURE = Platform.parse(None).architecture
HELLO = make_tar([member("etc", tarfile.DIRTYPE), member("etc/hello", data=b"hello\n")])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


async def test_the_built_in_image_is_busybox_and_the_same_each_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await prepare_image("builtin:busybox")
    first = image.layers[0].read_bytes()
    root = unpack(image.layers[0], tmp_path / "root")
    assert os.readlink(root / "bin/sh") == "/bin/busybox"
    assert (root / "bin/busybox").stat().st_mode & 0o111
    assert "nobody:x:65534:65534" in (root / "etc/passwd").read_text()
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert image.config.argv == ("sh",)
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home) + "2")
    again = await prepare_image("builtin:busybox")
    assert (again.layers[0].read_bytes(), again.digest) == (first, image.digest)


async def test_a_busybox_that_is_no_static_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_BUSYBOX", str(tmp_path / "none"))
    with pytest.raises(AssetNotFound, match="busybox-static"):
        await prepare_image("builtin:busybox")
    assert not store_files(home) if home.exists() else True


async def test_without_squashfs_tools_the_package_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    reference = layout.write(layout.manifest([HELLO], architecture=ARCHITECTURE))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetNotFound, match="apt-get install squashfs-tools"):
        await prepare_image(reference)
    assert not store_files(home)


async def test_images_of_umoci_through_skopeo_are_the_same_by_each_transport(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/file").write_text("content")
    layout = f"{tmp_path}/layout"
    run = ["umoci", "init", "--layout", layout]
    subprocess.run(run, check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:t"], check=True)
    subprocess.run(["umoci", "insert", "--image", f"{layout}:t", root, "/"], check=True)
    options = ["--config.cmd=run", "--config.entrypoint=/bin/e", "--config.env=A=b"]
    options += ["--config.workingdir=/sub", "--config.user=1000:5"]
    options += ["--config.exposedports=80", "--config.stopsignal=SIGQUIT"]
    subprocess.run(["umoci", "config", "--image", f"{layout}:t", *options], check=True)
    sources = [f"oci:{layout}:t", f"oci:{layout}"]
    for transport, tag in (("oci-archive", "t"), ("docker-archive", "user/name:t")):
        dest = f"{transport}:{tmp_path}/{transport}.tar:{tag}"
        subprocess.run(
            ["skopeo", "copy", "-q", "--insecure-policy", f"oci:{layout}:t", dest], check=True
        )
        sources += [dest, f"{transport}:{tmp_path}/{transport}.tar"]
    images = [await prepare_image(source) for source in sources]
    for image in images:
        assert image.layers == images[0].layers
        config = image.config
        assert config.argv == ("/bin/e", "run")
        assert "A=b" in config.env
        assert (config.workdir, config.user, config.stop_signal) == ("/sub", "1000:5", 3)
        assert config.exposed_ports == ("80/tcp",)
    assert (unpack(images[0].layers[0], tmp_path / "out") / "sub/file").read_text() == "content"


async def test_layers_may_be_plain_gzipped_or_zstd(layout: Layout) -> None:
    references = []
    compressions: list[Callable[[bytes], bytes]] = [bytes, zstandard.compress]
    for number, compress in enumerate(compressions):
        at = Layout(layout.path.with_name(f"layout{number}"))
        manifest = at.manifest([HELLO], compress=compress, architecture=ARCHITECTURE)
        references.append(at.write(manifest))
    references.append(layout.write(layout.manifest([HELLO], architecture=ARCHITECTURE)))
    images = [await prepare_image(reference) for reference in references]
    assert len({image.layers for image in images}) == 1
    assert len({image.digest for image in images}) == 3


async def test_a_layer_may_end_right_after_its_last_byte(layout: Layout) -> None:
    # Without padding and the end's two empty blocks, as umoci insert writes it.
    short = HELLO[: HELLO.rindex(b"hello\n") + 6]
    await prepare_image(layout.write(layout.manifest([short], architecture=ARCHITECTURE)))


async def test_a_layer_that_ends_within_a_file_is_corrupt(layout: Layout, home: Path) -> None:
    short = HELLO[: HELLO.rindex(b"hello\n") + 5]
    with pytest.raises(ImageCorrupt, match="within a file"):
        await prepare_image(layout.write(layout.manifest([short], architecture=ARCHITECTURE)))
    assert not store_files(home)


async def test_the_platform_is_chosen_through_nested_indexes(layout: Layout) -> None:
    def one(architecture: str) -> dict[str, object]:
        return layout.manifest(
            [HELLO],
            architecture=architecture,
            platform={"os": "linux", "architecture": architecture},
        )

    arches = {"amd64": one("amd64"), "arm64": one("arm64")}
    inner = json.dumps({"schemaVersion": 2, "manifests": list(arches.values())}).encode()
    kind = "application/vnd.oci.image.index.v1+json"
    reference = layout.write(layout.blob(inner, kind, **layout.tagged("t")))
    for architecture, descriptor in arches.items():
        image = await prepare_image(reference + ":t", platform=f"linux/{architecture}")
        assert image.digest == descriptor["digest"]
    with pytest.raises(
        ImageNotFound, match="has linux/amd64, linux/arm64, but nothing for linux/s390x"
    ):
        await prepare_image(reference, platform="linux/s390x")
    with pytest.raises(ConfigError):
        await prepare_image(reference, platform="linux")


async def test_a_directory_is_an_image_and_changes_are_seen(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/a").write_text("one")
    os.link(root / "bin/a", root / "bin/b")
    os.mkfifo(root / "fifo", 0o600)
    (root / "link").symlink_to("/nowhere")
    (root / ".wh.not-a-whiteout").touch()
    first = await prepare_image(f"rootfs:{root}")
    assert tree(unpack(first.layers[0], tmp_path / "out")) == tree(root)
    assert (await prepare_image(f"rootfs:{root}")).layers == first.layers
    (root / "bin/a").write_text("two")
    second = await prepare_image(f"rootfs:{root}")
    assert (unpack(second.layers[0], tmp_path / "out2") / "bin/b").read_text() == "two"


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("", ReferenceInvalid),
        ("oci:", ReferenceInvalid),
        ("builtin:nginx", ReferenceInvalid),
        ("Alpine", ReferenceInvalid),
        ("oci:/does/not/exist", ImageNotFound),
        ("rootfs:/does/not/exist", ImageNotFound),
        ("docker-archive:/does/not/exist", ImageNotFound),
        ("oci:/etc/passwd", ImageNotFound),
        ("oci-archive:/etc/passwd", ImageCorrupt),
        ("oci:/etc", ImageNotFound),
    ],
)
async def test_bad_references_are_typed_errors(
    reference: str, error: type[SupermachineError], home: Path
) -> None:
    with pytest.raises(error):
        await prepare_image(reference)
    assert not home.exists() or not store_files(home)


BAD_LAYERS = {
    "dots": [member("../evil", data=b"x")],
    "inner dots": [member("a/../../evil", data=b"x")],
    "absolute dots": [member("/../evil", data=b"x")],
    "through a link": [
        member("out", tarfile.SYMTYPE, linkname="/etc"),
        member("out/evil", data=b"x"),
    ],
    "link out": [member("evil", tarfile.LNKTYPE, linkname="../../etc/passwd")],
    "link to nothing": [member("evil", tarfile.LNKTYPE, linkname="missing")],
    "link to a directory": [
        member("d", tarfile.DIRTYPE),
        member("evil", tarfile.LNKTYPE, linkname="d"),
    ],
    "below a file": [member("f", data=b"x"), member("f/g", data=b"x")],
    "hides all": [member(".wh..", data=b"")],
    "hides above": [member("a/.wh...", data=b"")],
}


@pytest.mark.parametrize("members", BAD_LAYERS.values(), ids=BAD_LAYERS)
async def test_a_layer_that_leaves_its_root_leaves_nothing_in_the_store(
    members: list[object], layout: Layout, home: Path
) -> None:
    # The sound layer below it must not stay either.
    tars = [HELLO, make_tar(members)]
    reference = layout.write(layout.manifest(tars, architecture=ARCHITECTURE))
    with pytest.raises(ImageCorrupt):
        await prepare_image(reference)
    assert not {name for name in store_files(home) if name.startswith("layers/")}


async def test_damage_of_every_blob_is_found(layout: Layout, home: Path) -> None:
    reference = layout.write(layout.manifest([HELLO], architecture=ARCHITECTURE))
    for blob in sorted((layout.path / "blobs/sha256").iterdir()):
        sound = blob.read_bytes()
        middle = len(sound) // 2
        flipped = sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :]
        for bad in (flipped, sound[:-1], sound + b"\0", b""):
            blob.write_bytes(bad)
            with pytest.raises(ImageCorrupt):
                await prepare_image(reference)
            assert not store_files(home)
        blob.unlink()
        with pytest.raises(ImageCorrupt, match="missing"):
            await prepare_image(reference)
        blob.write_bytes(sound)
    await prepare_image(reference)


async def test_links_in_a_circle_are_a_corrupt_image(layout: Layout) -> None:
    reference = layout.write(layout.manifest([HELLO]))
    index = layout.path / "index.json"
    index.unlink()
    index.symlink_to("index.json")
    with pytest.raises(ImageCorrupt, match=r"index\.json"):
        await prepare_image(reference)


async def test_a_lie_about_the_diff_id_is_found(layout: Layout, home: Path) -> None:
    def lie(document: dict[str, object]) -> None:
        document["rootfs"] = {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}

    manifest = layout.manifest([HELLO], architecture=ARCHITECTURE, change_config=lie)
    with pytest.raises(ImageCorrupt, match="diff_id"):
        await prepare_image(layout.write(manifest))
    assert not store_files(home)


async def test_a_changed_blob_is_found_though_the_store_has_its_layer(layout: Layout) -> None:
    descriptor = layout.manifest([HELLO], architecture=ARCHITECTURE)
    reference = layout.write(descriptor)
    await prepare_image(reference)
    manifest = json.loads(layout.file_of(descriptor["digest"]).read_bytes())
    blob = layout.file_of(manifest["layers"][0]["digest"])
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ImageCorrupt):
        await prepare_image(reference)


async def test_an_unchanged_blob_is_not_hashed_again(layout: Layout) -> None:
    manifest = layout.manifest([HELLO], architecture=ARCHITECTURE)
    reference = layout.write(manifest)
    for blob in (layout.path / "blobs/sha256").iterdir():
        # The time of a change cannot be set, so wait until these files' is old enough.
        while await trio.to_thread.run_sync(_is_fresh, blob):
            await trio.sleep(0.02)
    seen: list[Progress] = []

    async def progress(step: Progress) -> None:
        seen.append(step)

    await prepare_image(reference, progress=progress)
    assert [(s.phase, s.done == s.total) for s in seen] == [("convert", False), ("convert", True)]
    seen.clear()
    await prepare_image(reference, progress=progress)
    assert [(s.phase, s.done == s.total) for s in seen] == [("verify", True)]


def _is_fresh(path: Path) -> bool:
    return time.time_ns() - path.stat().st_ctime_ns < 150_000_000


async def test_cancelling_a_conversion_leaves_nothing(layout: Layout, home: Path) -> None:
    big = make_tar([member(f"f{n}", data=os.urandom(1 << 20)) for n in range(64)])
    reference = layout.write(layout.manifest([big], compress=bytes, architecture=ARCHITECTURE))
    with trio.CancelScope() as scope:

        async def progress(step: Progress) -> None:
            nursery.start_soon(cancel_when_writing)

        async def cancel_when_writing() -> None:
            while not any(p.stat().st_size for p in home.rglob(".tmp-*/*")):
                await trio.sleep(0.001)
            scope.cancel()

        async with trio.open_nursery() as nursery:
            await prepare_image(reference, progress=progress)
    assert scope.cancelled_caught
    assert not store_files(home)
    assert not list(home.rglob(".tmp-*"))
    await prepare_image(reference)


async def test_tasks_and_programs_convert_a_layer_once(layout: Layout, home: Path) -> None:
    data = [member(f"f{n}", data=os.urandom(1 << 16)) for n in range(64)]
    tars = [make_tar(data)]
    reference = layout.write(layout.manifest(tars, architecture=ARCHITECTURE))
    program = (
        "import sys, trio\n"
        "from trio_supermachine.images.prepare import prepare_image\n"
        "async def progress(s): print(s.phase, s.done == s.total)\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        for _ in range(3):\n"
        "            nursery.start_soon(one)\n"
        "async def one(): await prepare_image(sys.argv[1], progress=progress)\n"
        "trio.run(main)\n"
    )
    output: list[str] = []

    async def run() -> None:
        command = [sys.executable, "-c", program, reference]
        output.append((await trio.run_process(command, capture_stdout=True)).stdout.decode())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(run)
    assert "".join(output).count("convert True") == 1


async def test_what_a_killed_program_left_is_swept(layout: Layout, home: Path) -> None:
    stray = home / "layers/.tmp-killed"
    stray.mkdir(parents=True)
    (stray / "half").touch()
    await prepare_image(layout.write(layout.manifest([HELLO], architecture=ARCHITECTURE)))
    assert not stray.exists()
