"""Removing bakes and layers: what is needed stays, whoever works beside it."""
# ruff: noqa: ASYNC220, ASYNC240 (files and programs are what these tests look at)

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from trio_supermachine import ConfigError, ImageNotFound
from trio_supermachine.bake.store import Bake, BakeStore, Moment
from trio_supermachine.host.locks import exclusive, in_use
from trio_supermachine.images.layers import ImageStore
from trio_supermachine.library.prune import KEPT_UNUSED, prune, remove
from trio_supermachine.oci.layer import Sink
from trio_supermachine.oci.layer_info import DirectoryInfo
from trio_supermachine.snapshots import finish_full, layer_refs, new_snapshot

from ..support.snapshot_files import MIB, draft, write_sparse

OLD = time.time() - KEPT_UNUSED - 60


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def make_layer(name: str) -> Path:
    def write(sink: Sink) -> None:
        sink.begin(DirectoryInfo())
        sink.write(bytes(1024))

    return await ImageStore().made("test", fingerprint(name), write)


async def write_bake(place: Path, layers: list[Path], **changes: object) -> None:
    async with new_snapshot(place) as directory:
        (directory / "restore.snap").write_bytes(b"state")
        write_sparse(directory / "memory.bin", os.urandom(4096) + bytes(MIB - 4096))
        await finish_full(directory, draft(layers=await layer_refs(layers), **changes))


async def make_bake(text: str, *layers: str, name: str | None = None, old: bool = False) -> str:
    """A bake with a real snapshot of a made-up guest."""
    store = BakeStore()
    found = fingerprint(text)
    files = [await make_layer(layer) for layer in layers]
    with store.try_making(found) as alone:
        assert alone
        await write_bake(store.place(found), files, image_reference=f"oci:{text}")
    store.mark_used(found)
    if old:
        os.utime(store.place(found).parent / "used", (OLD, OLD))
    if name is not None:
        store.set_name(name, found)
    return found


async def bakes() -> set[str]:
    return {bake.fingerprint for bake in await BakeStore().list()}


def layers(home: Path) -> set[str]:
    return {path.stem for path in (home / "layers").glob("test/*.squashfs")}


async def test_only_what_no_name_and_no_recent_use_keeps_is_pruned(home: Path) -> None:
    named = await make_bake("named", "shared", "a", name="n", old=True)
    recent = await make_bake("recent", "b")
    await make_bake("forgotten", "shared", "c", old=True)
    await make_layer("stray")
    dry = await prune(dry_run=True)
    assert await bakes() == {named, recent, fingerprint("forgotten")}
    removed = await prune()
    assert await bakes() == {named, recent}
    assert layers(home) == {fingerprint(name) for name in ("shared", "a", "b")}
    assert {bake.fingerprint for bake in removed.bakes} == {fingerprint("forgotten")}
    assert {layer.stem for layer in removed.layers} == {fingerprint("c"), fingerprint("stray")}
    assert (dry.layers, dry.size) == (removed.layers, removed.size)
    assert removed.size > 0
    for kept in (named, recent):
        assert await BakeStore().find(kept) is not None


async def test_all_means_the_named_and_the_recent_too(home: Path) -> None:
    await make_bake("named", "a", name="n")
    await make_bake("recent", "b")
    removed = await prune(everything=True)
    assert len(removed.bakes) == 2
    assert not await bakes()
    assert not layers(home)
    assert not BakeStore().names()
    left = {path for path in (home / "bakes").rglob("*") if path.is_file()}
    assert not left


async def test_a_name_moves_and_its_last_bake_can_be_pruned(home: Path) -> None:
    await make_bake("first", name="n", old=True)
    second = await make_bake("second", name="n", old=True)
    assert BakeStore().names() == {"n": second}
    await prune()
    assert await bakes() == {second}


async def test_damaged_and_half_made_bakes_go(home: Path) -> None:
    damaged = await make_bake("damaged", "a", name="n")
    metadata = BakeStore().place(damaged) / "metadata.json"
    metadata.write_bytes(metadata.read_bytes()[:-5])
    half = home / "bakes" / fingerprint("half")
    (half / ".tmp-x").mkdir(parents=True)
    (home / "bakes/.tmp-going/snapshot").mkdir(parents=True)
    (home / "layers/.tmp-scratch").mkdir()
    lock = home / "bakes" / f"{fingerprint('half')}.lock"
    lock.touch()
    (found,) = await BakeStore().list()
    assert found.problem is not None
    await prune()
    assert not await bakes()
    assert not layers(home)
    assert [path.name for path in (home / "bakes").iterdir()] == ["names"]
    assert not list((home / "layers").glob(".tmp-*"))


async def test_the_bake_of_a_newer_version_keeps_all_layers(home: Path) -> None:
    newer = await make_bake("newer", "a")
    await make_layer("b")
    metadata = BakeStore().place(newer) / "metadata.json"
    document = json.loads(metadata.read_bytes())
    metadata.write_text(json.dumps({**document, "format": 1000}))
    removed = await prune()
    assert not removed.layers
    assert await bakes() == {newer}


async def test_what_is_being_made_is_left_alone(home: Path) -> None:
    making = await make_bake("making", "a", old=True)
    with BakeStore().try_making(making) as alone:
        assert alone
        removed = await prune()
        assert [bake.fingerprint for bake in removed.busy] == [making]
        assert not removed.bakes
    assert await bakes() == {making}
    assert layers(home) == {fingerprint("a")}


async def test_layers_that_a_bake_in_progress_uses_are_left_alone(home: Path) -> None:
    used, made = await make_layer("used"), await make_layer("made")
    await make_layer("free")
    async with exclusive(ImageStore().lock_of(fingerprint("made"))):
        with in_use(used) as there:
            assert there
            removed = await prune()
    assert {layer.stem for layer in removed.layers} == {fingerprint("free")}
    assert made.exists()
    assert used.exists()


async def test_a_layer_for_which_a_bake_appears_meanwhile_is_kept(home: Path) -> None:
    # Bakes come and go while layers are pruned: none that is there ever lacks a layer.
    stop = trio.Event()

    async def bake_all_the_time(worker: int) -> None:
        store = BakeStore()
        for number in range(6):
            text = f"{worker} {number}"
            while True:
                layer = await make_layer(f"{number}")
                with in_use(layer) as held:
                    if held:
                        found = await make_bake(text, f"{number}")
                        assert await store.find(found) is not None
                        break
            await trio.to_thread.run_sync(store.remove, found)

    async def prune_all_the_time() -> None:
        while not stop.is_set():
            removed = await prune()
            assert not removed.bakes

    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prune_all_the_time)
            async with trio.open_nursery() as bakers:
                for worker in range(2):
                    bakers.start_soon(bake_all_the_time, worker)
            stop.set()


async def test_old_records_and_strays_go_and_new_ones_stay(home: Path) -> None:
    await make_bake("kept", "a")
    month = time.time() - 31 * 24 * 3600
    for directory in (home / "bakes/names", home / "verified", home / "layers/test"):
        directory.mkdir(exist_ok=True)
        (directory / ".tmp-new").touch()
        (directory / ".tmp-old").touch()
        os.utime(directory / ".tmp-old", (month, month))
    (home / "verified/old").touch()
    os.utime(home / "verified/old", (month, month))
    (home / "verified/new").touch()
    await prune()
    strays = {str(path.relative_to(home)) for path in home.rglob(".tmp-*")}
    assert strays == {"bakes/names/.tmp-new", "verified/.tmp-new", "layers/test/.tmp-new"}
    assert (home / "verified/new").exists()
    assert not (home / "verified/old").exists()


# Removing what was named


async def test_rmi_takes_names_references_and_beginnings_of_fingerprints(home: Path) -> None:
    by_name = await make_bake("a", "one", name="first")
    await make_bake("b", "two")
    by_fingerprint = await make_bake("c", "three")
    kept = await make_bake("d", "three")
    removed = await remove(["first", "oci:b", by_fingerprint[:12]])
    assert await bakes() == {kept}
    assert {bake.fingerprint for bake in removed.bakes} >= {by_name, by_fingerprint}
    assert layers(home) == {fingerprint("three")}


async def test_a_name_beside_another_goes_alone() -> None:
    baked = await make_bake("a", name="one")
    BakeStore().set_name("two", baked)
    await remove(["one"])
    assert BakeStore().names() == {"two": baked}
    assert await bakes() == {baked}
    await remove(["two"])
    assert not await bakes()


async def test_both_names_of_a_bake_take_it_away() -> None:
    baked = await make_bake("a", name="one")
    BakeStore().set_name("two", baked)
    await remove(["one", "two"])
    assert not await bakes()
    assert not BakeStore().names()


async def test_rmi_leaves_layers_that_are_no_bakes_own(home: Path) -> None:
    await make_layer("stray")
    await make_bake("a", "own", name="n")
    await remove(["n"])
    assert layers(home) == {fingerprint("stray")}


@pytest.mark.parametrize("text", ["none", "oci:none", "", "ab", "0" * 64])
async def test_what_stands_for_nothing_removes_nothing(text: str) -> None:
    baked = await make_bake("a", name="n")
    with pytest.raises(ImageNotFound):
        await remove(["n", text])
    assert await bakes() == {baked}
    assert BakeStore().names() == {"n": baked}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "x" * 129, "a\n", "ä", 5, None])
async def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError):
        BakeStore().set_name(name, fingerprint("a"))  # type: ignore[arg-type]


# Kills


REMOVER = """
import sys, trio
from trio_supermachine.library.prune import prune
print(flush=True)
trio.run(lambda: prune(everything=True))
"""


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.004, 0.008, 0.016, 0.032])
async def test_a_killed_prune_leaves_whole_bakes_or_none(delay: float, home: Path) -> None:
    for number in range(4):
        await make_bake(str(number), f"{number}", name=f"n{number}")
    with subprocess.Popen([sys.executable, "-c", REMOVER], stdout=subprocess.PIPE) as remover:
        assert remover.stdout is not None
        await trio.to_thread.run_sync(remover.stdout.readline)
        await trio.sleep(delay)  # any moment will do
        remover.send_signal(signal.SIGKILL)
        await trio.to_thread.run_sync(remover.wait)
    found: list[Bake] = await BakeStore().list()
    for bake in found:
        assert bake.problem is None
        assert await BakeStore().find(bake.fingerprint) is not None
    await prune(everything=True)
    assert not await bakes()
    assert not layers(home)
    assert not list((home / "bakes").glob(".tmp-*"))


async def booted_beside(found: str, *layers: str) -> None:
    """Add the other snapshot of a bake, made before its workload started."""
    files = [await make_layer(layer) for layer in layers]
    place = BakeStore().place(found, Moment.BOOTED)
    await write_bake(place, files, workload_started=False)


@pytest.mark.parametrize("damaged", list(Moment))
async def test_a_damaged_snapshot_beside_a_sound_one_is_removed_alone(
    home: Path, damaged: Moment
) -> None:
    made = await make_bake("made", "a", name="kept")
    await booted_beside(made, "a")
    store = BakeStore()
    (store.place(made, damaged) / "metadata.json").write_bytes(b"{")
    (sound,) = set(Moment) - {damaged}
    (bake,) = await store.list()
    assert (bake.moments, bake.damaged, bake.problem) == ((sound,), (damaged,), None)
    assert bake.directory == store.place(made, sound)
    removed = await prune()
    assert not removed.bakes
    assert not removed.layers  # the sound one needs it
    assert not store.place(made, damaged).exists()
    (bake,) = await store.list()
    assert (bake.moments, bake.damaged) == ((sound,), ())


async def test_a_bake_of_which_nothing_was_ready_yet_is_a_bake(home: Path) -> None:
    made = await make_bake("made", "a", name="kept")
    await booted_beside(made, "a")
    shutil.rmtree(BakeStore().place(made))
    removed = await prune()
    assert not removed.bakes
    (bake,) = await BakeStore().list()
    assert (bake.moments, bake.names) == ((Moment.BOOTED,), ("kept",))
    assert (await remove(["kept"])).bakes == (bake,)
    assert await BakeStore().list() == []


@pytest.mark.parametrize("sweep", ["the next bake", "prune"])
async def test_what_a_killed_capture_left_in_a_bake_goes(home: Path, sweep: str) -> None:
    made = await make_bake("made", "a", name="kept")
    left = BakeStore().place(made).parent / ".tmp-killed"
    left.mkdir()
    (left / "memory.bin").write_bytes(b"x" * 4096)
    if sweep == "prune":
        await prune()
    else:
        await BakeStore().clear(made, Moment.BOOTED)
    assert not left.exists()
    assert len(await BakeStore().list()) == 1
