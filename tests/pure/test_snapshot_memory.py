"""Guest memory in files: one digest wherever the holes are, and diffs that add up to the truth."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.errors import SnapshotInvalid
from trio_supermachine.snapshots import Snapshot, open_snapshot
from trio_supermachine.snapshots.diff import pack_diff
from trio_supermachine.snapshots.memory import BLOCK, MemoryImage, digest_memory
from trio_supermachine.snapshots.metadata import MemoryRef
from trio_supermachine.snapshots.pages import PAGE, Run

from ..support.snapshot_files import (
    MIB,
    PAGES,
    page,
    read_memory,
    write_diff,
    write_full,
    write_sparse,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def never() -> None:
    """Nothing ends the work."""


def digest(path: Path, size: int = MIB) -> MemoryRef:
    with path.open("rb") as file:
        return digest_memory(file.fileno(), size, never)


def some_memory() -> bytes:
    memory = bytearray(MIB)
    for number in (0, 1, 17, 18, 100, PAGES - 1):
        memory[number * PAGE : (number + 1) * PAGE] = page(number + 1)
    return bytes(memory)


#: Where pages are written, and what: few places and values, so that they meet.
WRITES = st.dictionaries(st.integers(0, 40) | st.just(PAGES - 1), st.integers(0, 3), max_size=12)


def written(memory: bytes, writes: dict[int, int]) -> bytes:
    changed = bytearray(memory)
    for number, value in writes.items():
        changed[number * PAGE : (number + 1) * PAGE] = page(value)
    return bytes(changed)


@given(WRITES, st.sets(st.integers(0, PAGES - 1), max_size=20))
@settings(deadline=None)
def test_a_digest_does_not_depend_on_the_holes(writes: dict[int, int], allocated: set[int]) -> None:
    memory = written(bytes(MIB), writes)
    with tempfile.TemporaryDirectory() as scratch:
        dense, sparse = Path(scratch, "dense"), Path(scratch, "sparse")
        dense.write_bytes(memory)
        write_sparse(sparse, memory)
        with sparse.open("r+b") as file:
            for number in allocated:
                file.seek(number * PAGE)
                file.write(memory[number * PAGE : (number + 1) * PAGE])
        assert digest(sparse) == digest(dense)


@given(WRITES, st.integers(0, MIB - 1), st.integers(1, 255))
@settings(deadline=None)
def test_a_digest_depends_on_every_byte(writes: dict[int, int], index: int, mask: int) -> None:
    memory = bytearray(written(bytes(MIB), writes))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "memory")
        write_sparse(path, bytes(memory))
        before = digest(path)
        memory[index] ^= mask
        write_sparse(path, bytes(memory))
        assert digest(path).sha256 != before.sha256


def test_a_digest_depends_on_where_the_data_is(tmp_path: Path) -> None:
    digests = set()
    for number in (0, 1, BLOCK // PAGE, PAGES - 1):
        write_sparse(tmp_path / "memory", written(bytes(MIB), {number: 1}))
        digests.add(digest(tmp_path / "memory").sha256)
    assert len(digests) == 4


def test_a_digest_is_as_documented(tmp_path: Path) -> None:
    memory = some_memory()
    write_sparse(tmp_path / "memory", memory)
    expected = hashlib.sha256()
    for offset in range(0, MIB, BLOCK):
        if any(block := memory[offset : offset + BLOCK]):
            expected.update(offset.to_bytes(8, "little") + block)
    assert digest(tmp_path / "memory") == MemoryRef(
        sha256=expected.hexdigest(), size=MIB, data=4 * BLOCK
    )


def test_a_digest_of_a_file_that_became_shorter_fails(tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(page(1) * 100)
    with pytest.raises(EOFError):
        digest(tmp_path / "memory")


async def test_a_full_snapshot_gives_its_memory_back(tmp_path: Path) -> None:
    memory = some_memory()
    snapshot = await write_full(tmp_path / "full", memory)
    assert read_memory(snapshot.memory) == memory
    assert snapshot.memory.patches == ()
    assert snapshot.depth == 0
    assert snapshot.metadata.kind == "full"
    assert snapshot.metadata.memory.data == 4 * BLOCK
    # Holes stay holes.
    assert (tmp_path / "full" / "memory.bin").stat().st_blocks * 512 < MIB // 2


@given(st.lists(st.tuples(WRITES, st.booleans(), st.integers(0, 5)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_chain_of_diffs_is_the_memory(
    steps: list[tuple[dict[int, int], bool, int]],
) -> None:
    """Diffs of what was captured, more or less exactly, against a plain array of bytes."""

    async def main(scratch: Path) -> None:
        memory = written(bytes(MIB), {0: 1, 5: 2, 33: 3})
        snapshot = await write_full(scratch / "0", memory)
        for number, (writes, everything, spare) in enumerate(steps, 1):
            before, memory = memory, written(memory, writes)
            runs: tuple[Run, ...] | None = None
            if not everything:  # an engine tells at least the pages that were written
                runs = tuple((n, min(1 + spare, PAGES - n)) for n in writes)
            snapshot = await write_diff(scratch / str(number), snapshot, memory, runs)
            assert read_memory(snapshot.memory) == memory
            assert snapshot.depth == number
            changed = {
                n
                for n in range(PAGES)
                if memory[n * PAGE : (n + 1) * PAGE] != before[n * PAGE : (n + 1) * PAGE]
            }
            patch = snapshot.memory.patches[-1]
            assert {
                n for start, count in patch.runs for n in range(start, start + count)
            } == changed
            assert snapshot.metadata.memory.data == len(changed) * PAGE
            assert not (scratch / str(number) / "memory.bin").exists()

    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_SUPERMACHINE_HOME", scratch + "/home")
        trio.run(main, Path(scratch))


async def test_any_pages_can_be_read_across_patches(tmp_path: Path) -> None:
    memory = some_memory()
    snapshot = await write_full(tmp_path / "0", memory)
    for number, writes in enumerate(({2: 9, 3: 9, 17: 0}, {3: 8, 4: 8, 18: 7}), 1):
        memory = written(memory, writes)
        snapshot = await write_diff(tmp_path / str(number), snapshot, memory)
    with snapshot.memory.reader() as reader:
        for first in range(22):
            for count in range(22):
                expected = memory[first * PAGE : (first + count) * PAGE]
                assert reader.read(first, count) == expected
        with pytest.raises(EOFError):
            reader.read(PAGES - 1, 2)


async def test_a_diff_of_nothing_is_empty(tmp_path: Path) -> None:
    base = await write_full(tmp_path / "full", some_memory())
    for number, runs in enumerate((None, ((0, PAGES),), (), ((17, 2),))):
        diff = await write_diff(tmp_path / str(number), base, some_memory(), runs)
        assert diff.memory.patches[0].runs == ()
        assert diff.metadata.memory.size == PAGE
        assert read_memory(diff.memory) == some_memory()


async def test_a_page_that_became_zero_is_kept(tmp_path: Path) -> None:
    base = await write_full(tmp_path / "full", some_memory())
    memory = written(some_memory(), {17: 0})
    diff = await write_diff(tmp_path / "diff", base, memory, ((17, 1),))
    assert diff.memory.patches[0].runs == ((17, 1),)
    assert read_memory(diff.memory) == memory


@pytest.mark.parametrize("run", [(-1, 2), (PAGES, 1), (PAGES - 1, 2), (0, PAGES + 1)])
async def test_a_captured_page_outside_the_memory_is_refused(tmp_path: Path, run: Run) -> None:
    base = await write_full(tmp_path / "full", some_memory())
    write_sparse(tmp_path / "captured", some_memory())
    with pytest.raises(ValueError, match="inside"):
        pack_diff(tmp_path / "captured", [run], base.memory, tmp_path / "new", never)
    assert not (tmp_path / "new").exists()


async def test_a_base_with_another_size_of_memory_is_refused(tmp_path: Path) -> None:
    base = await write_full(tmp_path / "full", some_memory())
    grown = attrs.evolve(
        base.metadata, memory_mib=2, memory=attrs.evolve(base.metadata.memory, size=2 * MIB)
    )
    other = attrs.evolve(base, metadata=grown)
    with pytest.raises(SnapshotInvalid, match="full snapshot"):
        await write_diff(tmp_path / "diff", other, some_memory())
    assert not (tmp_path / "diff").exists()


async def test_memory_of_another_size_than_said_is_not_finished(tmp_path: Path) -> None:
    for size in (MIB - PAGE, 2 * MIB):
        with pytest.raises(SnapshotInvalid, match="capture again"):
            await write_full(tmp_path / "full", bytes(size))
    assert not (tmp_path / "full").exists()


async def test_readers_close_what_they_opened_even_if_a_patch_is_missing(tmp_path: Path) -> None:
    base = await write_full(tmp_path / "full", some_memory())
    diff = await write_diff(tmp_path / "diff", base, written(some_memory(), {1: 0}))
    (tmp_path / "diff" / "memory.diff").unlink()
    with pytest.raises(SnapshotInvalid, match=r"memory\.diff"), diff.memory.reader():
        pass


@given(st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_packing_can_be_ended_between_any_two_pieces(steps: int) -> None:
    class Ended(Exception):
        pass

    left = steps

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Ended

    with tempfile.TemporaryDirectory() as scratch:
        root, captured = Path(scratch, "root"), Path(scratch, "captured")
        write_sparse(root, some_memory())
        write_sparse(captured, written(some_memory(), dict.fromkeys(range(0, PAGES, 2), 5)))
        try:
            pages = pack_diff(
                captured, [(0, PAGES)], MemoryImage(root, MIB), Path(scratch, "new"), check
            )
        except Ended:
            assert steps < PAGES
        else:
            assert pages == PAGES // 2


async def test_moved_snapshots_have_the_same_memory(tmp_path: Path) -> None:
    memory = some_memory()
    (tmp_path / "a").mkdir()
    snapshot: Snapshot = await write_full(tmp_path / "a" / "full", memory)
    memory = written(memory, {3: 3})
    snapshot = await write_diff(tmp_path / "a" / "diff", snapshot, memory)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = await open_snapshot(tmp_path / "b" / "diff")
    assert moved.identity == snapshot.identity
    assert moved.memory.root == tmp_path / "b" / "full" / "memory.bin"
    assert read_memory(moved.memory) == memory
