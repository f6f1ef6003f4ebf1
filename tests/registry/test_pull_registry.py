"""Images from a real registry: what is asked of it, what is kept, and what a fault leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_supermachine import (
    ImageCorrupt,
    ImageNotFound,
    NotSupported,
    Progress,
    PullPolicy,
    RegistryError,
    SupermachineError,
)
from trio_supermachine.images.content import ContentStore
from trio_supermachine.images.prepare import prepare_image
from trio_supermachine.images.pull import pulled
from trio_supermachine.images.spec import ImageSpec
from trio_supermachine.oci.platform import Platform
from trio_supermachine.oci.reference import Reference

from ..support.fault_proxy import Drop, Flip, Trickle, fault_proxy, through
from ..support.hostile_server import Request, hostile_server, reply
from ..support.image_files import (
    Layout,
    digest_of,
    layer,
    store_files,
    tree,
    unpack,
    verify,
)
from ..support.registry_server import RegistryServer

INDEX = "application/vnd.oci.image.index.v1+json"


pytestmark = pytest.mark.usefixtures("home")


def facts(image: ImageSpec) -> object:
    """What makes images the same."""
    return image.digest, image.layers, image.config


def partials(home: Path) -> list[Path]:
    return list((home / "content/partial").glob("*"))


async def test_a_pulled_image_is_what_its_layers_say(
    push: Callable[..., str], layout: Layout, home: Path, tmp_path: Path
) -> None:
    tars = [layer("a"), layer("b"), layer("c")]
    reference = push(*tars)
    local = await prepare_image(f"oci:{layout.path}")
    steps: list[Progress] = []

    async def note(step: Progress) -> None:
        steps.append(step)

    os.rename(home, home.with_name("first"))
    image = await prepare_image(reference, progress=note)
    assert image.digest == local.digest
    assert image.config == local.config
    for number, (mine, theirs) in enumerate(zip(image.layers, local.layers, strict=True)):
        theirs = home.with_name("first") / theirs.relative_to(home)
        one, other = (
            unpack(mine, tmp_path / f"p{number}"),
            unpack(theirs, tmp_path / f"l{number}"),
        )
        assert tree(one) == tree(other)
    await verify(home)
    assert not partials(home)
    last = {step.item: step for step in steps if step.phase == "download"}
    assert len(last) == 3
    assert all(step.done == step.total for step in last.values())
    assert [step.phase for step in steps].count("convert") == 6


async def test_missing_asks_once_and_always_asks_only_for_the_digest(
    push: Callable[..., str], registry: RegistryServer
) -> None:
    reference = push(layer("a"))
    async with fault_proxy(registry.address) as proxy:
        reference = through(proxy, reference)
        first = await prepare_image(reference)
        asked = len(proxy.requests)
        assert proxy.count("/blobs/") == 2
        again = await prepare_image(reference)
        assert len(proxy.requests) == asked
        assert facts(again) == facts(first)
        never = await prepare_image(reference, pull=PullPolicy.NEVER)
        assert facts(never) == facts(first)
        assert len(proxy.requests) == asked
        always = await prepare_image(reference, pull=PullPolicy.ALWAYS)
        assert facts(always) == facts(first)
        new = [line for line in proxy.requests[asked:] if not line.startswith("GET /v2/ ")]
        assert len(new) == 1
        assert new[0].startswith("HEAD ")


async def test_always_follows_a_tag_that_has_moved_and_missing_does_not(
    push: Callable[..., str], registry: RegistryServer, home: Path
) -> None:
    shared = layer("shared")
    reference = push(shared, layer("old"), name="test/moving:1")
    async with fault_proxy(registry.address) as proxy:
        proxied = through(proxy, reference)
        old = await prepare_image(proxied)
        push(shared, layer("new"), name="test/moving:1")
        assert (await prepare_image(proxied)).digest == old.digest
        blobs = proxy.count("/blobs/")
        new = await prepare_image(proxied, pull=PullPolicy.ALWAYS)
        assert new.digest != old.digest
        assert new.layers[0] == old.layers[0]
        assert proxy.count("/blobs/") == blobs + 2  # a configuration and one layer
    removed = await ContentStore().collect()
    assert len(removed.digests) == 3  # the old manifest, its configuration and its layer
    assert facts(await prepare_image(proxied, pull=PullPolicy.NEVER)) == facts(new)
    await verify(home)


async def test_never_names_the_reference_and_what_to_do(home: Path) -> None:
    with pytest.raises(ImageNotFound, match=r"localhost:1/app:1.*trio-supermachine pull") as info:
        await prepare_image("localhost:1/app:1", pull=PullPolicy.NEVER)
    assert info.value.reference == "docker://localhost:1/app:1"
    assert not store_files(home)


async def test_a_digest_that_is_here_never_needs_the_network(
    push: Callable[..., str], registry: RegistryServer
) -> None:
    reference = push(layer("a"))
    async with fault_proxy(registry.address) as proxy:
        image = await prepare_image(through(proxy, reference))
        asked = len(proxy.requests)
        pinned = through(proxy, reference).rpartition(":")[0] + "@" + image.digest
        for policy in PullPolicy:
            assert (await prepare_image(pinned, pull=policy)).layers == image.layers
        assert len(proxy.requests) == asked


async def test_a_digest_that_is_here_is_a_name_of_its_own_once_it_is_asked_for(
    push: Callable[..., str], home: Path
) -> None:
    reference = push(layer("a"))
    image = await prepare_image(reference)
    store = ContentStore()
    (name,) = (record.name for record in store.records())
    pinned = name.rpartition(":")[0] + "@" + image.digest
    await prepare_image(pinned)
    assert {record.name for record in store.records()} == {name, pinned}
    await store.remove_records([name])
    assert not (await store.collect()).digests
    assert facts(await prepare_image(pinned, pull=PullPolicy.NEVER)) == facts(image)
    await store.remove_records([pinned])
    assert len((await store.collect()).digests) == 3


async def test_the_variant_for_a_platform_is_taken_and_a_foreign_one_not_run(
    registry: RegistryServer, layout: Layout, home: Path
) -> None:
    amd = layout.manifest([layer("amd")], platform={"os": "linux", "architecture": "amd64"})
    arm = layout.manifest(
        [layer("arm")],
        architecture="arm64",
        platform={"os": "linux", "architecture": "arm64", "variant": "v8"},
    )
    nested = layout.index([arm]) if hasattr(layout, "index") else arm
    layout.write(amd, nested)
    # skopeo copies an index as a whole only if it is the one that the layout names.
    top = layout.blob((layout.path / "index.json").read_bytes(), INDEX)
    layout.write(top)
    reference = registry.push(f"oci:{layout.path}", "test/platforms:1")
    async with fault_proxy(registry.address) as proxy:
        proxied = through(proxy, reference)
        image = await prepare_image(proxied, platform="linux/amd64")
        assert image.digest == amd["digest"]
        blobs = proxy.count("/blobs/")
        with pytest.raises(NotSupported, match="guests here are linux/amd64, not linux/arm64"):
            await prepare_image(proxied, platform="linux/arm64")
        assert proxy.count("/blobs/") == blobs + 1  # the configuration, and no layer
        with pytest.raises(
            ImageNotFound, match="has linux/amd64, linux/arm64/v8, but nothing for linux/s390x"
        ):
            await prepare_image(proxied, platform="linux/s390x")
        parsed, wanted = Reference.parse(proxied), Platform.parse("linux/arm64")
        async with pulled(parsed, wanted, PullPolicy.MISSING, to_run=False) as foreign:
            assert foreign.digest == arm["digest"]
        asked = len(proxy.requests)
        assert (await prepare_image(proxied)).digest == amd["digest"]
        assert len(proxy.requests) == asked
    await verify(home)


async def test_two_programs_at_once_download_a_layer_once(
    push: Callable[..., str], registry: RegistryServer, home: Path
) -> None:
    reference = push(layer("a", 2_000_000), layer("b", 2_000_000))
    images: list[ImageSpec] = []
    async with fault_proxy(registry.address) as proxy:

        async def prepare() -> None:
            images.append(await prepare_image(through(proxy, reference)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(prepare)
        assert len({line for line in proxy.requests if "/blobs/" in line}) == 3
        layers = {line for line in proxy.requests if "/blobs/" in line and proxy.count(line) == 1}
        assert len(layers) >= 2
    assert all(facts(image) == facts(images[0]) for image in images)
    await verify(home)


# Faults


async def test_a_connection_that_drops_is_taken_up_where_it_was(
    push: Callable[..., str], registry: RegistryServer, home: Path
) -> None:
    reference = push(layer("a", 1_000_000))
    faults = [Drop(on="/blobs/", after=5_000 + 200_000 * n) for n in range(3)]
    async with fault_proxy(registry.address, faults) as proxy:
        await prepare_image(through(proxy, reference))
    await verify(home)


async def test_a_flipped_byte_is_a_corrupt_image_and_leaves_nothing(
    push: Callable[..., str], registry: RegistryServer, home: Path
) -> None:
    reference = push(layer("a", 1_000_000))
    digest = None
    async with fault_proxy(registry.address) as proxy:
        proxied = through(proxy, reference)
        parsed, platform = Reference.parse(proxied), Platform.parse(None)
        async with pulled(parsed, platform, PullPolicy.MISSING) as image:
            digest = image.layers[0].digest
        await ContentStore().remove_records([r.name for r in ContentStore().records()])
        await ContentStore().collect()
        assert digest is not None
        for after in (700, 300_000, 900_000):
            proxy.plan.append(Flip(on=digest, after=after))
            with pytest.raises(ImageCorrupt):
                await prepare_image(proxied)
            assert not partials(home)
            assert not ContentStore().records()
            assert not list((home / "layers").rglob("*.squashfs"))
        await prepare_image(proxied)
    await verify(home)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_network_does_the_store_is_sound(
    data: st.DataObject, registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("pull")
    layout = Layout(place / "layout")
    layout.write(layout.manifest([layer("a", 200_000), layer("b", 200_000)]))
    reference = registry.push(f"oci:{layout.path}", "test/faults:1")
    kinds = st.sampled_from([Drop, Flip, Trickle])
    ons = st.sampled_from(["/manifests/", "/blobs/", "HEAD"])
    faults = data.draw(
        st.lists(
            st.builds(
                lambda kind, on, after: (
                    Trickle(on=on, after=after, piece=4096)
                    if kind is Trickle
                    else kind(on=on, after=after)
                ),
                kinds,
                ons,
                st.integers(0, 250_000),
            ),
            max_size=3,
        )
    )

    async def pull() -> None:
        async with fault_proxy(registry.address, faults) as proxy:
            try:
                await prepare_image(through(proxy, reference))
            except SupermachineError:
                assert faults
            await verify(place / "home")
            proxy.plan.clear()
            await prepare_image(through(proxy, reference))
            await verify(place / "home")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_SUPERMACHINE_HOME", str(place / "home"))
        trio.run(pull)


async def test_what_is_not_there_is_named(registry: RegistryServer, home: Path) -> None:
    with pytest.raises(ImageNotFound, match="none/such:1"):
        await prepare_image(f"{registry.host}/none/such:1")
    await verify(home)


async def test_nobody_there_is_a_registry_error(home: Path) -> None:
    with pytest.raises(RegistryError):
        await prepare_image("127.0.0.1:1/none/such:1")


async def test_offline_what_is_here_runs_and_the_rest_is_refused(
    push: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = push(layer("a"))
    image = await prepare_image(reference)
    monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", "1")
    assert facts(await prepare_image(reference)) == facts(image)
    with pytest.raises(SupermachineError, match="OFFLINE"):
        await prepare_image(reference, pull=PullPolicy.ALWAYS)


async def test_a_registry_that_names_a_layer_as_an_image_has_nobody_read_it(home: Path) -> None:
    digest = digest_of(b"a large layer")
    path = ContentStore().path(digest)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)

    async def answer(request: Request, stream: trio.abc.Stream) -> None:
        headers = {"Docker-Content-Digest": digest}
        found = request.method == "HEAD"
        await stream.send_all(reply("200 OK" if found else "404 Not Found", headers))

    async with hostile_server(answer) as server:
        with pytest.raises(ImageNotFound, match=digest):
            await prepare_image(f"{server.host}/app:1")


async def test_a_layer_that_has_two_sizes_is_not_waited_for(layout: Layout, home: Path) -> None:
    def lie(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["size"] += 1

    tar = layer("a")
    described = layout.manifest([tar, tar], change_manifest=lie)

    async def answer(request: Request, stream: trio.abc.Stream) -> None:
        name = request.target.rpartition("/")[2]
        digest = name if ":" in name else described["digest"]
        data = layout.file_of(digest).read_bytes()
        headers = {"Docker-Content-Digest": digest, "Content-Length": str(len(data))}
        await stream.send_all(reply("200 OK", headers, data if request.method == "GET" else b""))

    async with hostile_server(answer) as server:
        with trio.fail_after(60), pytest.raises(ImageCorrupt, match="two sizes"):
            await prepare_image(f"{server.host}/app:1")
    await verify(home)


async def test_documents_that_were_damaged_here_come_again(
    push: Callable[..., str], layout: Layout, home: Path
) -> None:
    reference = push(layer("a"))
    image = await prepare_image(reference)
    store = ContentStore()
    documents = [path for path in (home / "content/blobs/sha256").iterdir()
                 if path.stat().st_size < 100_000]  # fmt: skip
    assert len(documents) == 2
    for path in documents:
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"', b"'"))
        with pytest.raises(ImageCorrupt):
            await prepare_image(reference, pull=PullPolicy.NEVER)
        assert facts(await prepare_image(reference)) == facts(image)
        assert path.read_bytes() == data
    assert len(store.records()) == 1
    await verify(home)


async def test_an_image_that_is_too_large_is_refused_before_its_layers(
    push: Callable[..., str], registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = push(layer("a", 300_000))
    monkeypatch.setenv("TRIO_SUPERMACHINE_MAX_LAYER", "100000")
    async with fault_proxy(registry.address) as proxy:
        with pytest.raises(ImageCorrupt, match="TRIO_SUPERMACHINE_MAX_LAYER"):
            await prepare_image(through(proxy, reference))
        assert proxy.count("/blobs/") == 1
        monkeypatch.setenv("TRIO_SUPERMACHINE_MAX_LAYER", "1000000")
        await prepare_image(through(proxy, reference))


async def test_a_layer_that_lies_about_its_diff_id_is_refused(
    push: Callable[..., str], home: Path
) -> None:
    def lie(config: dict[str, object]) -> None:
        config["rootfs"] = {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}

    reference = push(layer("a"), change_config=lie)
    with pytest.raises(ImageCorrupt, match="diff_id"):
        await prepare_image(reference)
    await verify(home)
    assert not list((home / "layers").rglob("*.squashfs"))


async def test_progress_that_takes_its_time_holds_up_no_download(
    push: Callable[..., str], home: Path
) -> None:
    reference = push(layer("a", 1_000_000))
    begun, go_on = trio.Event(), trio.Event()

    async def slow(step: Progress) -> None:
        if step.phase == "download":
            begun.set()
            await go_on.wait()

    async with trio.open_nursery() as nursery:
        parsed, platform = Reference.parse(reference), Platform.parse(None)

        async def pull() -> None:
            async with pulled(parsed, platform, PullPolicy.MISSING, progress=slow) as image:
                for source in image.layers:
                    assert source.blob.arrival is not None
                    await source.blob.arrival.reach(source.blob.size)
                go_on.set()

        nursery.start_soon(pull)
        await begun.wait()
    await verify(home)


async def test_an_error_of_the_callback_ends_the_pull(push: Callable[..., str], home: Path) -> None:
    reference = push(layer("a", 1_000_000))

    async def fail(step: Progress) -> None:
        raise ValueError(step.phase)

    with pytest.raises(ValueError, match=r"download|convert"):
        await prepare_image(reference, progress=fail)
    await verify(home)
