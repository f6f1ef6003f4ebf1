"""What descriptors may say beside digest and size, as an image in a layout has it."""

from __future__ import annotations

import base64
import tarfile
from pathlib import Path
from typing import Any

import pytest

from trio_supermachine.errors import ConfigError, ImageCorrupt, ImageNotFound, NotSupported
from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.oci.platform import Platform

from ..support.image_files import Change, Layout, make_tar, member

HELLO = make_tar([member("etc", tarfile.DIRTYPE), member("etc/hello", data=b"hello\n")])
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    return Layout(tmp_path / "layout")


def image(layout: Layout, change: Change, architecture: str | None = None) -> dict[str, Any]:
    architecture = architecture or Platform.parse(None).architecture
    return layout.manifest([HELLO], architecture=architecture, change_manifest=change)


async def test_embedded_documents_need_no_blobs(layout: Layout) -> None:
    blobs = []

    def embed(manifest: dict[str, Any]) -> None:
        blobs.append(layout.file_of(manifest["config"]["digest"]))
        manifest["config"]["data"] = base64.b64encode(blobs[-1].read_bytes()).decode()

    descriptor = image(layout, embed)
    blobs.append(layout.file_of(descriptor["digest"]))
    descriptor["data"] = base64.b64encode(blobs[-1].read_bytes()).decode()
    for blob in blobs:
        blob.unlink()
    found = await prepare_image(layout.write(descriptor))
    assert found.digest == descriptor["digest"]


async def test_embedded_documents_are_those_of_their_digests(layout: Layout) -> None:
    descriptor = image(layout, lambda _: None)
    data = bytearray(layout.file_of(descriptor["digest"]).read_bytes())
    data[-2:] = b" }" if data[-2:] != b" }" else b"} "
    descriptor["data"] = base64.b64encode(data).decode()
    with pytest.raises(ImageCorrupt, match="digest"):
        await prepare_image(layout.write(descriptor))


async def test_a_foreign_layer_is_taken_where_it_is_there_and_else_refused_by_name(
    layout: Layout,
) -> None:
    layers = []

    def make_foreign(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][0]
        layer |= {"mediaType": FOREIGN, "urls": ["https://example.com/layer"]}
        layers.append(layout.file_of(layer["digest"]))

    reference = layout.write(image(layout, make_foreign))
    await prepare_image(reference)
    layers[0].unlink()
    with pytest.raises(NotSupported, match=rf"{FOREIGN}.*https://example\.com/layer"):
        await prepare_image(reference)


@pytest.mark.parametrize("place", ["manifest", "layer", "config"])
async def test_another_algorithm_is_named_rather_than_called_damage(
    layout: Layout, place: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if place != "manifest":
            about = manifest["config"] if place == "config" else manifest["layers"][0]
            about["digest"] = "sha512:" + "0" * 128

    descriptor = image(layout, change)
    if place == "manifest":
        descriptor["digest"] = "sha512:" + "0" * 128
    with pytest.raises(NotSupported, match="sha512"):
        await prepare_image(layout.write(descriptor))


async def test_what_there_is_in_the_place_of_an_image_is_named(layout: Layout) -> None:
    other = layout.blob(b"{}", "application/vnd.example.bundle+json")
    with pytest.raises(ImageNotFound, match=r"application/vnd\.example\.bundle\+json"):
        await prepare_image(layout.write(other))


@pytest.mark.parametrize(
    ("wanted", "offered", "taken"),
    [
        ("linux/amd64", ["amd64/v3", "amd64"], 1),
        ("linux/amd64", ["amd64/v2"], None),
        ("linux/amd64/v3", ["amd64", "amd64/v2", "amd64/v4"], 1),
        ("linux/x86_64", ["arm64", "amd64/v1"], 1),
        ("linux/arm64", ["arm/v7", "arm64/v8"], 1),
        ("linux/aarch64", ["arm64"], 0),
        ("linux/arm64/v9", ["arm64/v8"], 0),
        ("linux/arm", ["arm/v5", "arm/v7", "arm/v6"], 1),
        ("linux/armel", ["arm/v7", "arm/v5"], 1),
        ("linux/riscv64", ["amd64"], None),
    ],
)
def test_the_nearest_variant_that_runs_is_taken(
    wanted: str, offered: list[str], taken: int | None
) -> None:
    platform = Platform.parse(wanted)
    platforms = [Platform.parse("linux/" + text) for text in offered]
    fit = [p for p in platforms if platform.accepts(p)]
    best = min(fit, key=platform.distance) if fit else None
    assert best == (None if taken is None else platforms[taken])


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/", "a/b/c/d", "L/a"]
)
def test_what_is_no_platform_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match="linux/amd64"):
        Platform.parse(text)
