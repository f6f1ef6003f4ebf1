"""Layers that are damaged or meant to harm: malformed, or no more than what they say they are."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.oci import MalformedError, tar
from trio_supermachine.oci.decompress import Blob, open_layer
from trio_supermachine.oci.layer import Conflict, LayerFilter, Sink
from trio_supermachine.oci.layer_info import DirectoryInfo, Link
from trio_supermachine.oci.names import clean
from trio_supermachine.oci.tar import Entry, TarReader

from ..support.image_files import make_tar, member
from ..support.nasty_layers import CASES, changed, ended, entries

LIMIT = 64 << 20
DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
Tree = dict[bytes, tuple[object, ...]]


class Collected(Sink):
    """What a filter writes; the tool that reads it is another's, so it must be beyond doubt."""

    def __init__(self) -> None:
        self.data = bytearray()

    def begin(self, root: DirectoryInfo) -> None:
        self.data.clear()

    def write(self, data: bytes | memoryview) -> None:
        self.data += data

    def tree(self) -> Tree:
        found: Tree = {}
        reader = TarReader(io.BytesIO(bytes(self.data)))
        for entry in reader:
            assert entry.name
            assert entry.name == clean(entry.name)
            assert entry.name not in found
            if entry.type == tar.LINK:
                assert found[clean(entry.linkname)][0] not in (tar.DIRECTORY, None)
            content = b"".join(map(bytes, reader.body()))
            found[entry.name] = (entry.type, entry.mode, entry.uid, entry.linkname, content)
        for name in found:
            parent = name.rpartition(b"/")[0]
            assert not parent or found[parent][0] == tar.DIRECTORY
        return found


def no_layers_below(path: bytes) -> DirectoryInfo | Link:
    return DirectoryInfo()


def read(data: bytes, *, limit: int = LIMIT, resolve: object = no_layers_below) -> Tree:
    """What becomes of a layer's bytes, as the conversion has it."""
    return read_with_digest(data, limit=limit, resolve=resolve)[0]


def read_with_digest(
    data: bytes, *, limit: int = LIMIT, resolve: object = no_layers_below
) -> tuple[Tree, str]:
    assert callable(resolve)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "blob")
        path.write_bytes(data)
        blob = Blob(path, 0, len(data))
        sink, filter_ = Collected(), LayerFilter(limit, resolve)
        with open_layer(blob, limit, lambda: None) as (_, layer):
            try:
                filter_.first_pass(TarReader(layer), sink)
                again = False
            except Conflict:
                again = True
            digest = layer.digest()
        if again:
            with open_layer(blob, limit, lambda: None) as (_, layer):
                filter_.second_pass(TarReader(layer), sink)
        return sink.tree(), digest


ODD = ["names", "gnu_names", "numbers", "hard_links", "duplicates", "extended_attributes"]
ALL = ended(b"".join(CASES[name](f"top/{name}")[0] for name in ODD))
SMALL = make_tar(
    [
        member("d", DIR),
        member("d/" + "n" * 120, data=b"long", pax_headers={"SCHILY.xattr.user.a": "b"}),
        member("d/link", LNK, linkname="d/" + "n" * 120),
        member("d/.wh.gone"),
        member("d/file", data=b"x" * 700),
        member("d/file", data=b"again"),
    ]
)


def zstd(data: bytes) -> bytes:
    return zstandard.compress(data)


def in_members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[at : at + 700]) for at in range(0, len(data), 700))


def in_frames(data: bytes) -> bytes:
    """As the tools write it that append an index to a layer, in frames that are to be skipped."""
    frames = [zstandard.compress(data[at : at + 700]) for at in range(0, len(data), 700)]
    index = struct.pack("<II", 0x184D2A50, 8) + b"an index"
    return frames[0] + index + b"".join(frames[1:]) + index


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        zstd,
        in_members,
        in_frames,
        lambda data: gzip.compress(data) + bytes(512),
        lambda data: gzip.compress(data) + gzip.compress(b""),
        lambda data: data + b"what stands behind the end means nothing",
        lambda data: data + ended(entries([member("after/the/end")])),
    ],
)
def test_a_layer_is_the_same_in_all_its_forms(compress: Callable[[bytes], bytes]) -> None:
    assert read(compress(SMALL)) == read(SMALL)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(SMALL, mtime=0) + b"garbage",
        zstd(SMALL) + b"garbage",
        gzip.compress(SMALL, mtime=0)[:-9],
        b"BZh91AY&SY" + bytes(600),
        b"\xfd7zXZ\0" + bytes(600),
        b"PK\3\4" + bytes(600),
        b"\x1f\x8b",
        b"x" * 511,
    ],
)
def test_what_is_no_layer_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        read(data)


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(10240), gzip.compress(b"", mtime=0)])
def test_an_empty_layer_is_empty(data: bytes) -> None:
    assert read(data) == {}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["small", "all"]),
    st.sampled_from([bytes, gzip.compress, zstd, in_members]),
    st.floats(0, 1, exclude_max=True),
)
def test_a_truncated_layer_is_malformed_or_has_another_digest(
    which: str, compress: Callable[[bytes], bytes], part: float
) -> None:
    data = SMALL if which == "small" else ALL
    whole = compress(data)
    try:
        _, digest = read_with_digest(whole[: int(len(whole) * part)])
    except MalformedError:
        return
    # No more was cut off than the archive's end, or than what a frame has behind its content.
    assert compress is zstd or digest != "sha256:" + hashlib.sha256(data).hexdigest()


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, len(SMALL) - 1),
    st.binary(min_size=1, max_size=12)
    | st.sampled_from([b"../../", b"/etc/", b"7777777", b"\xff"]),
    st.booleans(),
)
def test_a_changed_layer_is_malformed_or_beyond_doubt(at: int, field: bytes, mend: bool) -> None:
    block = at // 512 * 512
    field = field[: 512 - at % 512]
    if mend:
        changed_part = changed(SMALL[block:], at - block, field)
        data = SMALL[:block] + changed_part
    else:
        data = SMALL[:at] + field + SMALL[at + len(field) :]
    try:
        read(data)
    except MalformedError:
        pass


def raw(entry: Entry, body: bytes = b"") -> bytes:
    return tar.header(entry) + body + bytes(-len(body) % 512)


def pax(records: bytes, type_: bytes = b"x") -> bytes:
    return raw(Entry(b"pax", type_, size=len(records)), records) + raw(Entry(b"f", tar.FILE))


def sparse(segments: list[tuple[int, int]], real: int, stored: bytes = b"") -> bytes:
    header = raw(Entry(b"s", b"S", size=len(stored)), stored)
    table = b"".join(b"%011o\0%011o\0" % segment for segment in segments)
    return changed(changed(header, 386, table), 483, b"%011o\0" % real)


BOMBS = {
    "gzip": gzip.compress(bytes(LIMIT + 1)),
    "zstd": zstd(bytes(LIMIT + 1)),
    "a hole": ended(sparse([(0, 0)], LIMIT)),
    "a file": ended(raw(Entry(b"f", tar.FILE, size=LIMIT))),
    "many holes": ended(sparse([(0, 0)], LIMIT // 2) * 3),
    "what follows the end": SMALL + bytes(LIMIT),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_layer_is_no_larger_than_the_limit_in_any_way(data: bytes) -> None:
    with pytest.raises(MalformedError, match="limit"):
        read(data)


def test_the_limit_can_be_raised() -> None:
    data = gzip.compress(ended(entries([member("f", data=bytes(1 << 20))])))
    with pytest.raises(MalformedError, match="limit of 1000000 bytes"):
        read(data, limit=1_000_000)
    assert read(data, limit=2_000_000)[b"f"][-1] == bytes(1 << 20)


HOSTILE = {
    "a name too long": raw(Entry(b"n" * 256, tar.FILE)),
    "a path too long": raw(Entry((b"n" * 255 + b"/") * 16 + b"n", tar.DIRECTORY)),
    "a path too deep": raw(Entry(b"n/" * 513, tar.DIRECTORY)),
    "dots in an extended name": raw(Entry(b"d/" * 60 + b"../" * 70 + b"evil", tar.FILE)),
    "a NUL in an extended name": pax(b"16 path=a\0b/../c\n"),
    "an extended header too large": raw(Entry(b"x", b"x", size=2 << 20)),
    "a record without length": pax(b"path=evil\n"),
    "a record longer than its header": pax(b"99 path=evil\n"),
    "a record of nothing": pax(b"0 path=evil\n"),
    "headers without end": pax(b"10 uid=00\n")[:1024] * 20,
    "an owner out of range": pax(b"20 uid=99999999999\n"),
    "a negative owner": changed(raw(Entry(b"f", tar.FILE)), 108, b"\xff" * 8),
    "a size that is no number": changed(raw(Entry(b"f", tar.FILE)), 124, b"12x"),
    "a size beyond all files": changed(raw(Entry(b"f", tar.FILE)), 124, b"\x80" + b"\xff" * 11),
    "a device out of range": changed(raw(Entry(b"c", tar.CHAR)), 329, b"7777777\0"),
    "an unknown type": raw(Entry(b"f", b"Z")),
    "a link without target": raw(Entry(b"l", tar.SYMLINK)),
    "a link to itself": raw(Entry(b"l", tar.LINK, linkname=b"l")),
    "a hard link that leads out": raw(Entry(b"l", tar.LINK, linkname=b"../../etc/shadow")),
    "a hard link through a link": raw(Entry(b"d", tar.SYMLINK, linkname=b"/etc"))
    + raw(Entry(b"l", tar.LINK, linkname=b"d/shadow")),
    "the root as a file": raw(Entry(b".", tar.FILE)),
    "the root as a link": raw(Entry(b"/", tar.SYMLINK, linkname=b"/etc")),
    "below a link": raw(Entry(b"d", tar.SYMLINK, linkname=b"/etc"))
    + raw(Entry(b"d/passwd", tar.FILE)),
    "below a device": raw(Entry(b"d", tar.CHAR, device=(1, 3))) + raw(Entry(b"d/f", tar.FILE)),
    "segments that overlap": sparse([(0, 512), (256, 512)], 4096, bytes(1024)),
    "segments beyond the file": sparse([(4096, 512)], 512, bytes(512)),
    "segments without data": sparse([(0, 512)], 512),
    "an attribute with a NUL": pax(b"27 SCHILY.xattr.user.\0a=bc\n"),
    "attributes too large": raw(
        Entry(b"f", tar.FILE, xattrs={b"user.%d" % n: b"v" * 1000 for n in range(70)})
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_entry_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        read(ended(data))


def test_what_umoci_does_not_take_is_taken_where_it_is_harmless() -> None:
    found = read(
        ended(
            entries([member("contiguous", tarfile.CONTTYPE, data=b"c")])
            + entries([member(".wh..wh.plnk", DIR), member(".wh..wh.plnk/1.2", data=b"AUFS")])
            + entries([member("null", tarfile.CHRTYPE, devmajor=0, devminor=0)])
            + entries([member("nor/was/.wh.this")])
        )
    )
    assert found[b"contiguous"][-1] == b"c"
    assert found[b"nor/was/this"][:2] == (tar.CHAR, 0)
    assert found.keys() == {b"contiguous", b"nor", b"nor/was", b"nor/was/this"}


def test_links_of_lower_layers_are_followed_within_the_root_and_not_for_ever() -> None:
    links = {b"a": b"/b/../../..", b"loop": b"pool", b"pool": b"loop", b"out": b"../../etc"}

    def resolve(path: bytes) -> DirectoryInfo | Link:
        return Link(links[path]) if path in links else DirectoryInfo()

    def paths(name: str) -> set[bytes]:
        return set(read(ended(entries([member(name)])), resolve=resolve))

    assert paths("a/file") == {b"file"}
    assert paths("out/passwd") == {b"etc", b"etc/passwd"}
    with pytest.raises(MalformedError, match="too many links"):
        paths("loop/file")
    links[b"long"] = b"l/" * 2000
    with pytest.raises(MalformedError, match="too long"):
        paths("long/file")
