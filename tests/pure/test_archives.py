"""Archives of the content store: what goes out comes in again, whatever it is called."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from trio_supermachine import ConfigError, ImageNotFound, NotSupported
from trio_supermachine.images.content import ContentStore
from trio_supermachine.library.archives import load, save
from trio_supermachine.oci.documents import MANIFESTS, Descriptor

from ..support.image_files import Layout, digest_of, make_tar, member

NAME = "example.com/app:1"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "home")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def archive_of(layout: Layout) -> Path:
    file = layout.path.with_suffix(".tar")
    subprocess.run(["tar", "-cf", file, "-C", layout.path, "."], check=True)
    return file


async def put_image(store: ContentStore, digest: str, size: int) -> None:
    """Let a name stand for an image with one layer."""
    config = await store.put(b"{}")
    document = {
        "schemaVersion": 2,
        "config": {"digest": config, "size": 2},
        "layers": [{"digest": digest, "size": size}],
    }
    data = json.dumps(document).encode()
    top = Descriptor(media_type=MANIFESTS[0], digest=await store.put(data), size=len(data))
    await store.set_record(NAME, top)


class Enough(Exception):
    """The beginning of an archive has been written."""


class Beginning(io.BytesIO):
    """Takes no more than the beginning of a file."""

    def write(self, data: object, /) -> int:
        if self.tell() > 1 << 16:
            raise Enough
        return super().write(data)  # type: ignore[arg-type]


async def test_a_layer_may_be_larger_than_old_tar_files_have_room_for(store: ContentStore) -> None:
    digest, size = digest_of(b"large"), 9 << 30
    await put_image(store, digest, size)
    with store.path(digest).open("wb") as file:
        file.truncate(size)
    out = Beginning()
    with pytest.raises(Enough):
        await save(out, [NAME], store=store)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        sizes = {m.name: m.size for m in (archive.next() for _ in range(5)) if m is not None}
    assert sizes["blobs/" + digest.replace(":", "/")] == size


async def test_a_name_with_a_digest_comes_back(
    store: ContentStore, layout: Layout, tmp_path: Path
) -> None:
    described = layout.manifest([make_tar([member("a")])])
    pinned = f"example.com/app@{described['digest']}"
    described.update(layout.tagged(pinned))
    layout.write(described)
    assert await load(archive_of(layout), store=store) == (pinned,)
    again = tmp_path / "again.tar"
    await save(again, [pinned], store=store)
    other = ContentStore(tmp_path / "other")
    assert await load(again, store=other) == (pinned,)
    assert other.records()[0].top.digest == described["digest"]


async def test_a_name_with_the_digest_of_another_is_refused(
    store: ContentStore, layout: Layout
) -> None:
    described = layout.manifest([make_tar([member("a")])])
    described.update(layout.tagged(f"example.com/app@{digest_of(b'another')}"))
    layout.write(described)
    with pytest.raises(ImageNotFound, match="--name"):
        await load(archive_of(layout), store=store)
    assert not store.records()


async def test_what_is_no_image_is_named(store: ContentStore, layout: Layout) -> None:
    described = layout.blob(b"{}", "application/vnd.example.chart", **layout.tagged(NAME))
    layout.write(described)
    with pytest.raises(NotSupported, match=r"vnd\.example\.chart"):
        await load(archive_of(layout), store=store)


async def test_an_archive_without_an_image_is_not_loaded_in_silence(
    store: ContentStore, layout: Layout
) -> None:
    layout.path.mkdir()
    layout.write()
    for name in (None, NAME):
        with pytest.raises(ImageNotFound, match="no image"):
            await load(archive_of(layout), name=name, store=store)


async def test_a_device_is_not_replaced_by_an_archive(store: ContentStore, tmp_path: Path) -> None:
    await put_image(store, await store.put(b"layer"), 5)
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    with pytest.raises(ConfigError, match="device"):
        await save(device, [NAME], store=store)
    assert device.is_char_device()
