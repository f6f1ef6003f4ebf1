"""Layers in the store: the same bytes each time, made side by side, with extra files on top."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine import ConfigError, Progress
from trio_supermachine.bake.extra import ExtraFile, extra_layer
from trio_supermachine.host.locks import exclusive, in_use, try_exclusive, unused
from trio_supermachine.images.layers import ImageStore
from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.images.spec import ImageSpec
from trio_supermachine.oci.platform import Platform
from trio_supermachine.snapshots import layer_refs

from ..support.image_files import Layout, make_tar, member, tree, unpack

ARCHITECTURE = Platform.parse(None).architecture


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


async def image_of(directory: Path, *tars: bytes) -> ImageSpec:
    layout = Layout(directory)
    reference = layout.write(layout.manifest(tars, architecture=ARCHITECTURE))
    return await prepare_image(reference)


async def test_a_layer_is_the_same_file_whenever_it_is_made(tmp_path: Path, home: Path) -> None:
    # Snapshots name layers by the digests of their files.
    root = member("./", tarfile.DIRTYPE, mode=0o750, mtime=1_234_567_890)
    files = [member(f"f{n}", data=os.urandom(n * 999), mtime=n) for n in range(200)]
    tar = make_tar([root, member("d", tarfile.DIRTYPE), *files])
    first = [layer.read_bytes() for layer in (await image_of(tmp_path / "a", tar)).layers]
    shutil.rmtree(home)
    image = await image_of(tmp_path / "a", tar)
    assert [layer.read_bytes() for layer in image.layers] == first
    out = unpack(image.layers[0], tmp_path / "out")
    assert (out.stat().st_mode & 0o7777, out.stat().st_mtime) == (0o750, 1_234_567_890)


async def test_images_without_a_layer_in_common_are_made_side_by_side(tmp_path: Path) -> None:
    converting = trio.Event()
    go_on = trio.Event()

    async def stop_there(step: Progress) -> None:
        if step.phase == "convert":
            converting.set()
            await go_on.wait()

    def reference(name: str, *contents: bytes) -> str:
        layout = Layout(tmp_path / name)
        tars = [make_tar([member("f", data=content)]) for content in contents]
        return layout.write(layout.manifest(tars, architecture=ARCHITECTURE))

    async with trio.open_nursery() as nursery:
        slow = reference("slow", b"1", b"2")
        nursery.start_soon(lambda: prepare_image(slow, progress=stop_there))
        await converting.wait()
        with trio.fail_after(60):
            await prepare_image(reference("other", b"3"))
            with trio.move_on_after(0.2) as waits:
                await prepare_image(reference("shares", b"3", b"2"))
            assert waits.cancelled_caught
        go_on.set()


async def test_a_lock_goes_with_its_last_holder_and_is_held_by_one_at_a_time(
    tmp_path: Path,
) -> None:
    path = tmp_path / "locks/one"
    inside = 0
    entered = 0

    async def hold() -> None:
        nonlocal inside, entered
        async with exclusive(path):
            inside += 1
            entered += 1
            assert inside == 1
            with try_exclusive(path) as held:
                assert not held
            await trio.lowlevel.checkpoint()
            inside -= 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(hold)
    assert entered == 20
    assert not list(path.parent.iterdir())


def test_what_is_in_use_is_not_unused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with in_use(path) as there, unused(path) as free:
        assert (there, free) == (False, False)
    path.touch()
    with in_use(path) as one, in_use(path) as two, unused(path) as free:
        assert (one, two, free) == (True, True, False)
    with unused(path) as free, in_use(path) as there:
        assert (free, there) == (True, False)


# Extra files


def mode_of(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


async def with_files(image: ImageSpec, *files: ExtraFile) -> Path:
    digests = [ref.sha256 for ref in await layer_refs(image.layers)]
    return await extra_layer(ImageStore(), image.layers, digests, files)


BELOW = make_tar(
    [
        member("./", tarfile.DIRTYPE, mode=0o711),
        member("secret", tarfile.DIRTYPE, mode=0o2700, uid=7, gid=8),
        member("secret/deep", tarfile.DIRTYPE, mode=0o1777),
        member("usr", tarfile.DIRTYPE),
        member("usr/bin", tarfile.DIRTYPE),
        member("bin", tarfile.SYMTYPE, linkname="usr/bin"),
        member("abs", tarfile.SYMTYPE, linkname="/secret/../secret/deep"),
        member("loop", tarfile.SYMTYPE, linkname="loop"),
        member("file", data=b"old"),
        member("gone", tarfile.DIRTYPE, mode=0o700),
        member("odd [*] \\d", tarfile.DIRTYPE, mode=0o701),
    ]
)
ABOVE = make_tar([member(".wh.gone"), member("usr", tarfile.DIRTYPE, mode=0o555)])


async def test_extra_files_leave_the_directories_on_their_way_as_they_are(tmp_path: Path) -> None:
    image = await image_of(tmp_path / "layout", BELOW, ABOVE)
    layer = await with_files(
        image,
        ExtraFile("/secret/deep/a", b"a", 0o600),
        ExtraFile("/usr/b", b"b"),
        ExtraFile("/new/er/c", b"c" * 5000, 0o4755),
        ExtraFile("/gone/d", b""),
        ExtraFile("/odd [*] \\d/e", b"e"),
    )
    out = unpack(layer, tmp_path / "out")
    assert mode_of(out) == 0o711
    secret = (out / "secret").stat()
    assert (mode_of(out / "secret"), secret.st_uid, secret.st_gid) == (0o2700, 7, 8)
    assert mode_of(out / "secret/deep") == 0o1777
    assert mode_of(out / "usr") == 0o555  # as the upper of the two says
    assert mode_of(out / "new") == mode_of(out / "new/er") == 0o755
    assert mode_of(out / "gone") == 0o755  # it was removed, so this is a new one
    assert mode_of(out / "odd [*] \\d") == 0o701
    assert (out / "new/er/c").read_bytes() == b"c" * 5000
    assert mode_of(out / "new/er/c") == 0o4755
    assert mode_of(out / "secret/deep/a") == 0o600
    files = {name for name, entry in tree(out).items() if entry[-1] is not None}
    assert files == {"secret/deep/a", "usr/b", "new/er/c", "gone/d", "odd [*] \\d/e"}


async def test_extra_files_go_where_links_on_their_way_lead(tmp_path: Path) -> None:
    image = await image_of(tmp_path / "layout", BELOW)
    layer = await with_files(image, ExtraFile("/bin/tool", b"1"), ExtraFile("/abs/x", b"2"))
    out = unpack(layer, tmp_path / "out")
    assert (out / "usr/bin/tool").read_bytes() == b"1"
    assert (out / "secret/deep/x").read_bytes() == b"2"
    assert not (out / "bin").exists()
    assert not (out / "abs").exists()


@pytest.mark.parametrize("path", ["/file/x", "/loop/x", "/secret"])
async def test_an_extra_file_without_a_place_is_refused(path: str, tmp_path: Path) -> None:
    image = await image_of(tmp_path / "layout", BELOW)
    with pytest.raises(ConfigError):
        await with_files(image, ExtraFile(path, b""))


async def test_an_extra_file_under_another_is_refused(tmp_path: Path) -> None:
    image = await image_of(tmp_path / "layout", BELOW)
    with pytest.raises(ConfigError, match="'/a' is an extra file and a directory"):
        await with_files(image, ExtraFile("/a", b""), ExtraFile("/a/b", b""))


async def test_the_same_extra_files_share_a_layer_and_others_do_not(tmp_path: Path) -> None:
    image = await image_of(tmp_path / "layout", BELOW)
    first = await with_files(image, ExtraFile("/a", b"1"))
    assert await with_files(image, ExtraFile("/a", b"1")) == first
    others = {
        await with_files(image, ExtraFile("/a", b"2")),
        await with_files(image, ExtraFile("/a", b"1", 0o600)),
        await with_files(image, ExtraFile("/b", b"1")),
        await with_files(image, ExtraFile("/a", b"1"), ExtraFile("/b", b"1")),
    }
    assert len(others | {first}) == 5


@pytest.mark.parametrize(
    ("path", "data", "mode"),
    [
        ("relative", b"", 0o644),
        ("/", b"", 0o644),
        ("//x", b"", 0o644),
        ("/a/../b", b"", 0o644),
        ("/a/", b"", 0o644),
        ("/nul\0", b"", 0o644),
        ("/proc/x", b"", 0o644),
        ("/dev", b"", 0o644),
        ("/" + "x" * 5000, b"", 0o644),
        ("/a", "text", 0o644),
        ("/a", 5, 0o644),
        ("/a", b"", 0o10000),
        ("/a", b"", -1),
        ("/a", b"", True),
    ],
)
def test_what_is_no_extra_file_is_refused_where_it_is_written(
    path: str, data: bytes, mode: int
) -> None:
    with pytest.raises(ConfigError):
        ExtraFile(path, data, mode)


@given(st.text(max_size=20))
def test_any_path_is_taken_as_it_is_or_refused(path: str) -> None:
    try:
        assert ExtraFile(path, b"").path == path
    except ConfigError:
        pass
