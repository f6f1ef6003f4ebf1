"""The content store: what names stand for, what is kept, and what damage does."""

# ruff: noqa: ASYNC221 (programs and files are what these tests look at)
from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_supermachine import ConfigError, ImageNotFound, SupermachineError
from trio_supermachine.bake.store import BakeStore
from trio_supermachine.images.arrival import Arrival
from trio_supermachine.images.content import ContentStore
from trio_supermachine.images.limits import max_image, max_layer
from trio_supermachine.images.records import Record, named_in, read_records, write_index
from trio_supermachine.library.listing import has_moved
from trio_supermachine.library.prune import prune, remove
from trio_supermachine.oci import MalformedError
from trio_supermachine.oci.decompress import Blob, BlobStream, opened
from trio_supermachine.oci.documents import INDEXES, MANIFESTS, Descriptor
from trio_supermachine.oci.platform import Platform
from trio_supermachine.snapshots import finish_full, new_snapshot

from ..support.image_files import Layout, digest_of, make_tar, member
from ..support.snapshot_files import MIB, draft, write_sparse


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path)


async def receive(
    store: ContentStore, digest: str, size: int, *pieces: bytes, skip: bool = True
) -> bool:
    """Write a blob, as a download does; whether it had to be written."""
    arrival = Arrival()
    data = b"".join(pieces)
    try:
        async with store.receiving(digest, size, arrival) as writer:
            if writer is None:
                return False
            await writer.write(data[writer.done if skip else 0 :])
    finally:
        arrival.close()
    return True


def manifest(*layers: bytes) -> tuple[Descriptor, bytes]:
    """A manifest of some layers, and its descriptor."""
    described = [
        {"mediaType": "application/x", "digest": digest_of(layer), "size": len(layer)}
        for layer in layers
    ]
    data = json.dumps({"config": described[0], "layers": described[1:]}).encode()
    return Descriptor(media_type=MANIFESTS[0], digest=digest_of(data), size=len(data)), data


async def test_a_blob_appears_when_its_digest_was_checked(store: ContentStore) -> None:
    data = os.urandom(100_000)
    digest = digest_of(data)
    assert await receive(store, digest, len(data), data)
    assert store.path(digest).read_bytes() == data
    assert not await receive(store, digest, len(data))
    assert await store.verify(digest)
    assert not list((store.root / "partial").iterdir())


@pytest.mark.parametrize("change", ["other", "more", "less"])
async def test_what_is_not_what_it_should_be_leaves_nothing(
    store: ContentStore, change: str
) -> None:
    data = os.urandom(100_000)
    wrong = {"other": data[1:] + b"\0", "more": data + b"x", "less": data[:-1]}[change]
    with pytest.raises(MalformedError):
        await receive(store, digest_of(data), len(data), wrong)
    assert not list((store.root / "partial").iterdir())
    assert not store.path(digest_of(data)).exists()


async def test_what_was_broken_off_is_gone_on_with(store: ContentStore) -> None:
    data = os.urandom(3_000_000)
    digest = digest_of(data)
    arrival = Arrival()
    with pytest.raises(ZeroDivisionError):
        async with store.receiving(digest, len(data), arrival) as writer:
            assert writer is not None
            await writer.write(data[:1_000_000])
            raise ZeroDivisionError
    arrival.close()
    assert (store.root / "partial" / digest[7:]).stat().st_size == 1_000_000
    arrival = Arrival()
    async with store.receiving(digest, len(data), arrival) as writer:
        assert writer is not None
        assert writer.done == arrival.there == 1_000_000
        await writer.write(data[1_000_000:])
    arrival.close()
    assert await store.verify(digest)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700_000), min_size=1, max_size=6),
    reads=st.lists(st.integers(1, 900_000), min_size=1, max_size=4),
)
def test_a_reader_sees_a_growing_blob_from_its_beginning(
    sizes: list[int], reads: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = [os.urandom(size) for size in sizes]
    data = b"".join(pieces)

    async def main() -> None:
        store = ContentStore(tmp_path_factory.mktemp("growing"))
        arrival = Arrival()
        blob = Blob(store.path(digest_of(data)), 0, len(data), arrival)
        seen: list[bytes] = []

        def read() -> None:
            with opened(blob) as file:
                stream = BlobStream(file, blob, trio.from_thread.check_cancelled)
                number = 0
                while chunk := stream.read(reads[number % len(reads)]):
                    seen.append(chunk)
                    number += 1
                assert stream.digest() == digest_of(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read)
            async with store.receiving(digest_of(data), len(data), arrival) as writer:
                assert writer is not None
                for piece in pieces:
                    await writer.write(piece)
        arrival.close()
        assert b"".join(seen) == data

    trio.run(main)


async def test_a_reader_of_a_blob_that_never_comes_can_be_cancelled(store: ContentStore) -> None:
    arrival = Arrival()
    blob = Blob(store.root / "never", 0, 10, arrival)

    def read() -> None:
        with opened(blob):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, read)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_names_stand_for_what_was_last_said(store: ContentStore) -> None:
    one, _ = manifest(b"1")
    two, _ = manifest(b"2")
    assert store.record("a/b:1") is None
    await store.set_record("a/b:1", one)
    await store.set_record("c/d:1", one)
    await store.set_record("a/b:1", two)
    assert {r.name: r.top.digest for r in store.records()} == {
        "a/b:1": two.digest,
        "c/d:1": one.digest,
    }
    await store.remove_records(["a/b:1", "x"])
    assert [r.name for r in store.records()] == ["c/d:1"]


async def test_many_programs_note_names_at_once(store: ContentStore) -> None:
    top, _ = manifest(b"1")
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(store.set_record, f"a/b:{number}", top)
    assert len(store.records()) == 20


@given(names=st.lists(st.text(max_size=50), unique=True, max_size=5))
def test_an_index_keeps_its_records(names: list[str]) -> None:
    top, _ = manifest(b"1")
    index = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    assert read_records(index) == []
    written = write_index([])
    assert read_records(written.encode()) == []
    for name in names:
        (found,) = read_records(write_index([_record(name, top)]).encode("utf-8", "surrogatepass"))
        assert found.name == name


def _record(name: str, top: Descriptor) -> Record:
    return Record(name=name, top=top, resolved_at=1.5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schemaVersion": 2, "manifests": [{}]}', "\xff"])
def test_a_damaged_index_says_what_to_do(store: ContentStore, text: str) -> None:
    store.root.mkdir(parents=True)
    (store.root / "index.json").write_text(text, "latin-1")
    with pytest.raises(SupermachineError, match="remove it"):
        store.records()


async def test_the_store_is_a_layout_that_other_tools_read(
    store: ContentStore, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    described = layout.manifest([make_tar([member("a")])])
    layout.write(described)
    for blob in layout.path.glob("blobs/sha256/*"):
        await store.put(blob.read_bytes())
    top = Descriptor(
        media_type=described["mediaType"], digest=described["digest"], size=described["size"]
    )
    await store.set_record("docker.io/library/app:1", top)
    command = ["skopeo", "inspect", "--raw", f"oci:{store.root}:docker.io/library/app:1"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    assert digest_of(done.stdout) == described["digest"]


async def test_what_no_name_needs_is_collected_and_nothing_else(store: ContentStore) -> None:
    kept, document = manifest(b"config", b"layer", b"shared")
    await store.put(document)
    gone, other = manifest(b"other config", b"shared")
    await store.put(other)
    for blob in (b"config", b"layer", b"shared", b"other config", b"nobody's"):
        await receive(store, digest_of(blob), len(blob), blob)
    data = json.dumps(
        {"manifests": [{"mediaType": MANIFESTS[0], "digest": kept.digest, "size": kept.size}]}
    ).encode()
    index = Descriptor(media_type=INDEXES[0], digest=await store.put(data), size=len(data))
    await store.set_record("kept:1", index)
    await store.set_record("gone:1", gone)
    (store.root / "partial" / hashlib.sha256(b"begun").hexdigest()).write_bytes(b"beg")
    dry = await store.collect(dry_run=True, without=["gone:1"])
    await store.remove_records(["gone:1"])
    collected = await store.collect()
    assert dry == collected
    assert set(collected.digests) == {
        gone.digest, *map(digest_of, (b"other config", b"nobody's", b"begun"))
    }  # fmt: skip
    assert store.below(index).keys() == {
        index.digest, kept.digest, *map(digest_of, (b"config", b"layer", b"shared"))
    }  # fmt: skip
    assert not (await store.collect()).digests


async def test_the_lease_of_a_killed_program_keeps_nothing(store: ContentStore) -> None:
    await receive(store, digest_of(b"x"), 1, b"x")
    lease = store.root / "leases/killed"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text(digest_of(b"x") + "\n")
    assert (await store.collect()).digests == (digest_of(b"x"),)
    assert not lease.exists()


async def test_what_a_killed_program_left_of_a_document_goes(store: ContentStore) -> None:
    kept = await store.put(b"kept")
    strays = [store.root / ".tmp-index", store.path(kept).with_name(".tmp-document")]
    async with store.lease() as lease:
        await lease.keep(kept)
        for stray in strays:
            stray.write_bytes(b"half")
        await store.collect(dry_run=True)
        assert all(stray.exists() for stray in strays)
        await store.collect()
        assert not any(stray.exists() for stray in strays)
        assert await store.verify(kept)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), lambda inner:
    st.lists(inner) | st.dictionaries(
        st.sampled_from(["manifests", "layers", "config", "digest", "mediaType"]), inner),
    max_leaves=12).map(lambda document: json.dumps(document).encode()))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_document_names_something_or_nothing(data: bytes) -> None:
    for named in named_in(data):
        assert named.digest.startswith("sha256:")


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e3", "\u0661", "1" * 30])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_MAX_LAYER", text)
    with pytest.raises(ConfigError, match="TRIO_SUPERMACHINE_MAX_LAYER"):
        max_layer()


def test_the_limit_of_an_image_follows_that_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_MAX_LAYER", "1000")
    assert (max_layer(), max_image()) == (1000, 4000)
    monkeypatch.delenv("TRIO_SUPERMACHINE_MAX_LAYER")
    assert max_layer() == 64 << 30


async def bake_of(reference: str, digest: str) -> str:
    """A bake that says that it was made of this image; its fingerprint."""
    store = BakeStore()
    fingerprint = hashlib.sha256((reference + digest).encode()).hexdigest()
    async with new_snapshot(store.place(fingerprint)) as directory:
        (directory / "restore.snap").write_bytes(b"state")
        write_sparse(directory / "memory.bin", bytes(MIB))
        described = draft(layers=(), image_reference=reference, image_digest=digest)
        await finish_full(directory, described)
    return fingerprint


async def put_image(store: ContentStore, name: str, text: str) -> str:
    """An image that was pulled under a name; the digest of its manifest."""
    data = text.encode()
    config = {
        "os": "linux",
        "architecture": Platform.parse(None).architecture,
        "rootfs": {"type": "layers", "diff_ids": [digest_of(data)]},
    }
    described = []
    for kind, blob in (("config.v1+json", json.dumps(config).encode()), ("layer.v1.tar", data)):
        await store.put(blob)
        media_type = f"application/vnd.oci.image.{kind}"
        described.append({"mediaType": media_type, "digest": digest_of(blob), "size": len(blob)})
    manifest = {"schemaVersion": 2, "config": described[0], "layers": [described[1]]}
    document = json.dumps(manifest).encode()
    top = Descriptor(media_type=MANIFESTS[0], digest=digest_of(document), size=len(document))
    await store.put(document)
    await store.set_record(name, top)
    return top.digest


async def test_a_bake_knows_when_its_name_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path))
    store = ContentStore()
    name = "docker.io/library/app:1"
    old = await put_image(store, name, "old")
    await bake_of("app:1", old)
    await bake_of(f"app@{old}", old)
    await bake_of("oci:/app:1", old)
    await bake_of("other:1", old)
    assert not any(has_moved(bake, store) for bake in await BakeStore().list())
    await put_image(store, name, "new")
    moved = [bake for bake in await BakeStore().list() if has_moved(bake, store)]
    assert [bake.metadata and bake.metadata.image_reference for bake in moved] == ["app:1"]


async def test_a_name_that_stands_for_no_image_to_run_hides_no_bake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path))
    store = ContentStore()
    chart = {"mediaType": "application/vnd.example.chart", "digest": digest_of(b""), "size": 0}
    document = json.dumps({"schemaVersion": 2, "config": chart, "layers": [chart]}).encode()
    await store.put(document)
    top = Descriptor(media_type=MANIFESTS[0], digest=digest_of(document), size=len(document))
    await store.set_record("docker.io/library/app:1", top)
    await bake_of("app:1", digest_of(b"old"))
    assert [has_moved(bake, store) for bake in await BakeStore().list()] == [False]


async def test_a_reference_in_any_form_removes_image_and_bakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path))
    store = ContentStore()
    digest = await put_image(store, "docker.io/library/app:1", "one")
    await put_image(store, "docker.io/library/app:2", "two")
    gone = {await bake_of("app:1", digest), await bake_of("docker://docker.io/app:1", digest)}
    kept = await bake_of("app:2", digest)
    with pytest.raises(ImageNotFound):
        await remove(["app:1", "app:3"])
    assert len(store.records()) == 2
    removed = await remove(["library/app:1"])
    assert removed.names == ("docker.io/library/app:1",)
    assert {bake.fingerprint for bake in removed.bakes} == gone
    assert len(removed.blobs) == 3
    assert [bake.fingerprint for bake in await BakeStore().list()] == [kept]
    pruned = await prune()
    assert not pruned.names
    assert not pruned.blobs
    assert [record.name for record in store.records()] == ["docker.io/library/app:2"]
    dry = await prune(everything=True, dry_run=True)
    pruned = await prune(everything=True)
    assert pruned.names == dry.names == ("docker.io/library/app:2",)
    assert pruned.blobs == dry.blobs
    assert not store.records()


async def test_an_image_that_is_pulled_again_while_it_is_removed_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path))
    store = ContentStore()
    await put_image(store, "docker.io/library/app:1", "one")
    real = ContentStore.remove_records

    async def remove_records(store: ContentStore, names: Iterable[str]) -> None:
        await real(store, names)
        await put_image(store, "docker.io/library/app:1", "one")  # another program's pull

    monkeypatch.setattr(ContentStore, "remove_records", remove_records)
    assert not (await remove(["app:1"])).blobs
    (record,) = store.records()
    assert len(store.below(record.top)) == 3
