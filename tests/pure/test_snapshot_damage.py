"""Damaged snapshots are refused with the file's name; captures leave all or nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.errors import SnapshotIncompatible, SnapshotInvalid
from trio_supermachine.snapshots import (
    Snapshot,
    finish_diff,
    finish_full,
    layer_refs,
    new_snapshot,
    open_snapshot,
    read_metadata,
    verify_snapshot,
)
from trio_supermachine.snapshots.metadata import BaseRef, LayerRef
from trio_supermachine.snapshots.pages import PAGE
from trio_supermachine.snapshots.verify import MAX_CHAIN, Verifier

from ..support.snapshot_files import (
    MIB,
    PAGES,
    draft,
    page,
    read_memory,
    until_settled,
    write_diff,
    write_full,
    write_sparse,
)

MEMORY = page(1) * 8 + bytes(MIB - 16 * PAGE) + page(2) * 8
LATER = page(1) * 7 + page(3) + bytes(MIB - 16 * PAGE) + page(2) * 8

#: Every file of a diff on a full snapshot.
FILES = (
    "full/metadata.json",
    "full/restore.snap",
    "full/memory.bin",
    "diff/metadata.json",
    "diff/restore.snap",
    "diff/memory.diff",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


async def write_chain(root: Path) -> Snapshot:
    base = await write_full(root / "full", MEMORY)
    return await write_diff(root / "diff", base, LATER)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory with ``full`` and ``diff``, sound; what damages them uses :func:`mended`."""
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_SUPERMACHINE_HOME", str(root / "home"))
        trio.run(write_chain, root)
    yield root
    shutil.rmtree(root)


@contextmanager
def mended(path: Path) -> Iterator[None]:
    """Put a file's content back when the block ends."""
    good = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(good)


def names(directory: Path) -> set[str]:
    """What a directory has, but for the data directory that tests put there."""
    return {path.name for path in directory.iterdir()} - {"home"}


async def is_refused(path: Path, damaged: Path) -> SnapshotInvalid:
    """The error by which a snapshot is refused; it names the file, and what to do."""
    with pytest.raises(SnapshotInvalid) as caught:
        await open_snapshot(path)
    named = {caught.value.path, caught.value.reason}
    assert any(str(damaged) in text or str(damaged.parent) in text for text in named)
    assert ";" in caught.value.reason
    return caught.value


@given(name=st.sampled_from(FILES), index=st.integers(0, MIB), mask=st.integers(1, 255))
@settings(deadline=None, max_examples=150)
def test_no_byte_can_be_flipped(chain: Path, name: str, index: int, mask: int) -> None:
    path = chain / name
    with mended(path):
        with path.open("r+b") as file:
            offset = index % path.stat().st_size
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ mask]))
        trio.run(is_refused, chain / "diff", path)


@given(
    name=st.sampled_from(FILES),
    size=st.integers(0, MIB),
    more=st.integers(1, 2 * PAGE),
    grow=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_no_file_can_be_cut_short_or_grow(
    chain: Path, name: str, size: int, more: int, grow: bool
) -> None:
    path = chain / name
    good = path.stat().st_size
    with mended(path):
        os.truncate(path, good + more if grow else size % good)
        trio.run(is_refused, chain / "diff", path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "kind", ["missing", "symlink", "dangling", "fifo", "socket", "directory", "device"]
)
async def test_only_a_file_is_taken_for_a_file(tmp_path: Path, name: str, kind: str) -> None:
    """Nothing blocks on a FIFO or acts on a device, and a symbolic link is not followed."""
    await write_chain(tmp_path)
    path = tmp_path / name
    kept = path.rename(tmp_path / "kept")
    match kind:
        case "symlink":
            path.symlink_to(kept)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "fifo":
            os.mkfifo(path)
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    await is_refused(tmp_path / "diff", path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        trio.run(write_chain, root)
        for directory in (root, root / "full", root / "diff"):
            directory.chmod(0o755)
        (root / name).chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            error = trio.run(is_refused, root / "diff", root / name)
        finally:
            os.seteuid(user)
    assert "permission" in error.reason


async def test_a_sound_snapshot_is_opened_by_either_name(tmp_path: Path) -> None:
    made = await write_chain(tmp_path)
    for name in ("diff", "diff/restore.snap"):
        found = await open_snapshot(str(tmp_path / name))
        assert found.identity == made.identity
        assert found.state == tmp_path / "diff" / "restore.snap"
        assert read_memory(found.memory) == LATER
        assert await read_metadata(tmp_path / name) == found.metadata
    assert (await verify_snapshot(tmp_path / "diff")).identity == made.identity


async def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "restore.snap").write_text("text")
    for name in ("file", "empty", "missing", "missing/restore.snap", "restore.snap", "file/x"):
        for function in (open_snapshot, verify_snapshot, read_metadata):
            with pytest.raises(
                SnapshotInvalid, match=r"give the directory|give a snapshot"
            ) as caught:
                await function(tmp_path / name)
            assert str(tmp_path) in caught.value.path


async def test_a_newer_snapshot_is_incompatible(tmp_path: Path) -> None:
    await write_full(tmp_path / "full", MEMORY)
    path = tmp_path / "full" / "metadata.json"
    path.write_text(path.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(SnapshotIncompatible, match="upgrade"):
        await open_snapshot(tmp_path / "full")


async def test_a_missing_base_is_named_with_its_place(tmp_path: Path) -> None:
    await write_chain(tmp_path)
    (tmp_path / "full").rename(tmp_path / "elsewhere")
    error = await is_refused(tmp_path / "diff", tmp_path / "full")
    assert f"put the base back at {tmp_path / 'full'}" in error.reason
    (tmp_path / "elsewhere").rename(tmp_path / "full")
    await open_snapshot(tmp_path / "diff")


async def test_another_snapshot_is_no_base_even_with_the_same_memory(tmp_path: Path) -> None:
    await write_chain(tmp_path)
    shutil.rmtree(tmp_path / "full")
    await write_full(tmp_path / "full", MEMORY, state=b"another device state")
    error = await is_refused(tmp_path / "diff", tmp_path / "full")
    assert "another" in error.reason


async def test_a_moved_diff_finds_its_base_where_it_was(tmp_path: Path) -> None:
    await write_chain(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "diff").rename(tmp_path / "far" / "away" / "diff")
    moved = await open_snapshot(tmp_path / "far" / "away" / "diff")
    assert read_memory(moved.memory) == LATER


async def test_a_diff_is_not_made_on_a_base_that_is_gone_or_changed(tmp_path: Path) -> None:
    base = await write_full(tmp_path / "full", MEMORY)
    (tmp_path / "full").rename(tmp_path / "elsewhere")
    with pytest.raises(SnapshotInvalid):
        await write_diff(tmp_path / "diff", base, LATER)
    await write_full(tmp_path / "full", LATER)
    with pytest.raises(SnapshotInvalid, match="another"):
        await write_diff(tmp_path / "diff", base, LATER)
    assert names(tmp_path) == {"elsewhere", "full"}


async def test_a_chain_has_a_greatest_length(tmp_path: Path) -> None:
    snapshot = await write_full(tmp_path / "0", MEMORY)
    for number in range(1, MAX_CHAIN + 1):
        snapshot = await write_diff(tmp_path / str(number), snapshot, MEMORY, ())
    assert snapshot.depth == MAX_CHAIN
    with pytest.raises(SnapshotInvalid, match="full snapshot"):
        await write_diff(tmp_path / "more", snapshot, MEMORY, ())
    assert not (tmp_path / "more").exists()


async def test_layers_are_verified_and_found_again(tmp_path: Path, home: Path) -> None:
    layers = tmp_path / "old" / "layers" / "sha256"
    layers.mkdir(parents=True)
    layer = layers / "abc.squashfs"
    layer.write_bytes(b"layer" * 1000)
    made = await write_full(tmp_path / "full", MEMORY, layers=(layer,))
    assert made.layers == (layer,)
    assert made.metadata.layers == await layer_refs([layer])

    (tmp_path / "old").rename(tmp_path / "elsewhere")
    error = await is_refused(tmp_path / "full", layer)
    assert "missing; prepare its image again" in error.reason
    # The data directory has moved.
    shutil.copytree(tmp_path / "elsewhere" / "layers", home / "layers")
    found = home / "layers" / "sha256" / "abc.squashfs"
    assert (await open_snapshot(tmp_path / "full")).layers == (found,)
    # One that is not what it was is passed over, for one that is.
    layers.mkdir(parents=True)
    layer.write_bytes(b"LAYER" * 1000)
    assert (await open_snapshot(tmp_path / "full")).layers == (found,)
    found.write_bytes(b"other")
    error = await is_refused(tmp_path / "full", layer)
    assert "not the one that was captured" in error.reason


async def test_a_layer_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing", "."):
        with pytest.raises(SnapshotInvalid, match=str(tmp_path)):
            await layer_refs([tmp_path / name])


@pytest.mark.parametrize("place", ["/" + "n" * 300, "/\ud800", "/proc/1/root/x", "/dev/zero"])
async def test_a_place_in_the_metadata_that_cannot_be_is_refused(
    tmp_path: Path, place: str
) -> None:
    """What a hostile writer names is neither opened, unless it is a file, nor believed."""
    layer = LayerRef(path=Path(place), sha256="0" * 64, size=1)
    base = BaseRef(identity="0" * 64, path=Path(place), relative=place)
    for changes in {"layers": (layer,)}, {"kind": "diff", "base": base}:
        made = await write_full(tmp_path / next(iter(changes)), MEMORY)
        metadata = attrs.evolve(made.metadata, **changes)
        (made.directory / "metadata.json").write_bytes(metadata.to_bytes())
        with pytest.raises(SnapshotInvalid, match=r"missing|not the one"):
            await open_snapshot(made.directory)


def bytes_read() -> int:
    """How much this process has read from files so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError


async def test_memory_is_read_in_full_only_once(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(bytes(MIB) + b"layer")
    await until_settled(layer)
    async with new_snapshot(tmp_path / "full") as directory:
        (directory / "restore.snap").write_bytes(b"state")
        (directory / "memory.bin").write_bytes(page(7) * PAGES)
        await finish_full(directory, draft(layers=await layer_refs([layer])))
        await until_settled(directory / "memory.bin")
    before = bytes_read()
    await open_snapshot(tmp_path / "full")  # what was just written is known
    assert bytes_read() - before < MIB // 4
    before = bytes_read()
    await verify_snapshot(tmp_path / "full")
    assert bytes_read() - before > 2 * MIB

    (tmp_path / "full").rename(tmp_path / "moved")  # at another place it is not
    before = bytes_read()
    await open_snapshot(tmp_path / "moved")
    assert MIB < bytes_read() - before < 2 * MIB
    before = bytes_read()
    await open_snapshot(tmp_path / "moved")
    assert bytes_read() - before < MIB // 4


async def test_a_change_with_the_old_times_is_found(tmp_path: Path) -> None:
    await write_chain(tmp_path)
    path = tmp_path / "full" / "memory.bin"
    await until_settled(path)
    await open_snapshot(tmp_path / "diff")
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    await is_refused(tmp_path / "diff", path)


async def test_damaged_records_cost_time_but_prove_nothing(tmp_path: Path, home: Path) -> None:
    await write_chain(tmp_path)
    await until_settled(tmp_path / "diff" / "metadata.json")
    await open_snapshot(tmp_path / "diff")
    records = names(home / "verified")
    assert records
    for junk in (b"", b"{", b"null", b"[]", b"[1, 2]", b"\xff", b'{"a": 1}'):
        for record in records:
            (home / "verified" / record).write_bytes(junk)
        assert read_memory((await open_snapshot(tmp_path / "diff")).memory) == LATER
    shutil.rmtree(home / "verified")
    (home / "verified").symlink_to("/dev/null")  # nothing can be remembered at all
    await open_snapshot(tmp_path / "diff")


@given(steps=st.integers(0, 30))
@settings(deadline=None, max_examples=30)
def test_verification_can_be_ended_between_any_two_pieces(chain: Path, steps: int) -> None:
    class Ended(Exception):
        pass

    left = steps

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Ended

    try:
        found = Verifier(check, thorough=True).snapshot(chain / "diff")
    except Ended:
        assert steps < 30
    else:
        assert found.depth == 1


@pytest.mark.parametrize("there", ["file", "symlink", "directory"])
async def test_a_place_that_is_taken_is_refused_before_any_work(tmp_path: Path, there: str) -> None:
    dest = tmp_path / "dest"
    match there:
        case "file":
            dest.touch()
        case "symlink":
            (tmp_path / "target").mkdir()
            dest.symlink_to(tmp_path / "target")
        case "directory":
            dest.mkdir()
            (dest / "file").touch()
    before = names(tmp_path)
    what = "the directory is not empty" if there == "directory" else "something else is there"
    said = f"{what}: remove it, or give another directory"
    with pytest.raises(FileExistsError, match=said):
        async with new_snapshot(dest):
            pytest.fail("the block ran")
    assert names(tmp_path) == before


async def test_an_empty_directory_or_a_new_path_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/path"):
        await write_full(tmp_path / name, MEMORY)
    assert names(tmp_path / "empty") == {"metadata.json", "restore.snap", "memory.bin"}


async def test_a_place_that_has_a_snapshot_says_how_to_restore_it(tmp_path: Path) -> None:
    await write_full(tmp_path / "dest", MEMORY)
    way_out = r"remove it, give another directory, or restore it by Image\.from_snapshot\("
    with pytest.raises(FileExistsError, match=f"is not empty: {way_out}"):
        async with new_snapshot(tmp_path / "dest"):
            pytest.fail("the block ran")


async def test_of_two_captures_to_one_place_the_first_wins(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        async with new_snapshot(tmp_path / "dest") as directory:
            (directory / "restore.snap").write_bytes(b"slower")
            write_sparse(directory / "memory.bin", MEMORY)
            await finish_full(directory, draft())
            first = await write_full(tmp_path / "dest", LATER)
    assert read_memory((await open_snapshot(tmp_path / "dest")).memory) == LATER
    assert first.identity == (await read_metadata(tmp_path / "dest")).identity
    assert names(tmp_path) == {"dest"}


async def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with new_snapshot(tmp_path / "dest") as directory:
            (directory / "memory.bin").write_bytes(b"half")
            raise KeyError
    with pytest.raises(SnapshotInvalid, match="not a snapshot"):
        async with new_snapshot(tmp_path / "dest") as directory:
            (directory / "memory.bin").write_bytes(b"never finished")
    with trio.CancelScope() as scope:
        async with new_snapshot(tmp_path / "dest") as directory:
            (directory / "restore.snap").write_bytes(b"state")
            write_sparse(directory / "memory.bin", MEMORY)
            scope.cancel()
            await finish_full(directory, draft())
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        async with new_snapshot(tmp_path / "dest") as directory:
            (directory / "restore.snap").write_bytes(b"state")
            write_sparse(directory / "memory.bin", MEMORY)
            await finish_full(directory, draft())
            scope.cancel()  # before it is published
    assert scope.cancelled_caught
    assert names(tmp_path) == set()


@pytest.mark.parametrize("limit", [1, PAGE, PAGE + 100, 3 * PAGE])
async def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond the limit, as if the disk were full there."""
    base = await write_full(tmp_path / "full", MEMORY)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large"):
        async with new_snapshot(tmp_path / "diff") as directory:
            (directory / "restore.snap").write_bytes(b"state")
            write_sparse(directory / "memory.bin", bytes(MIB))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            try:
                await finish_diff(directory, draft(), [(0, PAGES)], base)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == {"full"}
    assert read_memory((await open_snapshot(tmp_path / "full")).memory) == MEMORY


KILLED = """
import os, sys, threading, trio
from pathlib import Path
from tests.support.snapshot_files import draft, write_sparse
from trio_supermachine.snapshots import finish_full, new_snapshot

async def main(dest, moment):
    async with new_snapshot(dest) as directory:
        (directory / "restore.snap").write_bytes(b"state")
        if moment == 0: os.kill(os.getpid(), 9)
        write_sparse(directory / "memory.bin", b"x" * (1 << 20))
        if moment == 1: os.kill(os.getpid(), 9)
        if moment == 2:
            with (directory / "metadata.json").open("w") as file:
                file.write('{"base":null,')
                file.flush()
                os.kill(os.getpid(), 9)
        await finish_full(directory, draft())
trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", [0, 1, 2])
async def test_a_killed_capture_leaves_nothing_that_could_be_restored(
    tmp_path: Path, moment: int
) -> None:
    dest = tmp_path / "dest"
    done = await trio.run_process(
        [sys.executable, "-c", KILLED, str(dest), str(moment)],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not dest.exists()
    strays = names(tmp_path)
    assert len(strays) == 1
    for stray in strays:
        for path in (tmp_path / stray, tmp_path / stray / "restore.snap"):
            with pytest.raises(SnapshotInvalid):
                await open_snapshot(path)
    await write_full(dest, MEMORY)  # and the next one works
