"""Metadata and diff headers: every value has one encoding, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine.errors import SnapshotIncompatible, SnapshotInvalid
from trio_supermachine.oci import MalformedError
from trio_supermachine.oci.config import ImageConfig
from trio_supermachine.snapshots.diff import MAX_RUNS, DiffHeader, encode_runs, parse_runs
from trio_supermachine.snapshots.metadata import (
    FORMAT,
    MAX_METADATA,
    BaseRef,
    FileRef,
    LayerRef,
    MemoryRef,
    Metadata,
)
from trio_supermachine.snapshots.pages import PAGE, Run, intersection, total, union

from ..support.snapshot_files import draft

DIGESTS = st.binary(max_size=4).map(lambda data: hashlib.sha256(data).hexdigest())
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=40)
PROPER_TEXTS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40
)
SIZES = st.integers(0, 1 << 50)
PATHS = TEXTS.map(lambda text: Path("/", text)).filter(lambda path: "\0" not in str(path))


@st.composite
def metadata(draw: st.DrawFn) -> Metadata:
    """Any metadata at all."""
    config = ImageConfig(
        env=tuple(f"{name}=x" for name in draw(st.lists(PROPER_TEXTS.filter(bool), max_size=3)))
        if draw(st.booleans())
        else (),
        entrypoint=tuple(draw(st.lists(PROPER_TEXTS, max_size=3))),
        workdir="/" + draw(PROPER_TEXTS),
        user=draw(PROPER_TEXTS),
        stop_signal=draw(st.integers(1, 64)),
        exposed_ports=tuple(f"{port}/tcp" for port in sorted(draw(st.sets(st.integers(1, 65535))))),
        labels=draw(st.dictionaries(PROPER_TEXTS, PROPER_TEXTS, max_size=2)),
    )
    config = attrs.evolve(config, env=tuple(e for e in config.env if not e.startswith("=")))
    memory_mib = draw(st.integers(1, 1 << 20))
    described = draft(
        engine=draw(TEXTS),
        host=draw(st.dictionaries(TEXTS, TEXTS, max_size=3)),
        memory_mib=memory_mib,
        vcpus=draw(st.integers(1, 4096)),
        hostname=draw(TEXTS),
        image_reference=draw(TEXTS),
        image_config=config,
        layers=tuple(
            LayerRef(path=path, sha256=draw(DIGESTS), size=draw(SIZES))
            for path in draw(st.lists(PATHS, max_size=3))
        ),
        guest_port=draw(st.none() | st.integers(1, 65535)),
        fingerprint=draw(st.none() | DIGESTS),
        created_at=draw(st.integers(0, 1 << 40)),
    )
    diff = draw(st.booleans())
    return Metadata.of(
        described,
        kind="diff" if diff else "full",
        state=FileRef(sha256=draw(DIGESTS), size=draw(SIZES)),
        memory=MemoryRef(
            sha256=draw(DIGESTS), size=draw(SIZES) if diff else memory_mib << 20, data=draw(SIZES)
        ),
        base=BaseRef(identity=draw(DIGESTS), path=draw(PATHS), relative=draw(TEXTS))
        if diff
        else None,
    )


def example() -> Metadata:
    """A usual full snapshot's."""
    digest = hashlib.sha256(b"").hexdigest()
    described = draft(layers=(LayerRef(path=Path("/l"), sha256=digest, size=1),))
    return Metadata.of(
        described,
        kind="full",
        state=FileRef(sha256=digest, size=0),
        memory=MemoryRef(sha256=digest, size=1 << 20, data=0),
        base=None,
    )


def signed(document: dict[str, Any]) -> bytes:
    """What a hostile writer, who can compute a checksum, makes of a document."""

    def dump(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    document.pop("checksum", None)
    return dump({**document, "checksum": hashlib.sha256(dump(document)).hexdigest()})


@given(metadata())
@settings(deadline=None)
def test_metadata_round_trips(value: Metadata) -> None:
    data = value.to_bytes()
    again = Metadata.parse(data, "name")
    assert again == value
    assert again.image_config.labels == value.image_config.labels
    assert again.host == value.host
    assert again.to_bytes() == data
    assert json.loads(data)["checksum"] == value.identity == again.identity


def test_the_checksum_is_of_the_document_without_it() -> None:
    data = example().to_bytes()
    assert signed(json.loads(data)) == data


def test_a_path_that_is_not_utf8_round_trips() -> None:
    path = Path("/layers/\udcff.squashfs")
    layer = LayerRef(path=path, sha256="0" * 64, size=1)
    value = attrs.evolve(example(), layers=(layer,))
    assert Metadata.parse(value.to_bytes(), "name").layers[0].path == path


@given(st.data())
@settings(deadline=None)
def test_no_other_byte_is_accepted_anywhere(data: st.DataObject) -> None:
    good = bytearray(example().to_bytes())
    index = data.draw(st.integers(0, len(good) - 1))
    good[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotInvalid, match="name"):
        Metadata.parse(bytes(good), "name")


@given(st.data())
@settings(deadline=None)
def test_metadata_cut_short_or_with_more_behind_is_refused(data: st.DataObject) -> None:
    good = example().to_bytes()
    cut = data.draw(st.integers(0, len(good) - 1))
    for bad in good[:cut], good + good[:cut] + b" ", b" " + good:
        with pytest.raises(SnapshotInvalid, match="name"):
            Metadata.parse(bad, "name")


@given(st.binary() | st.text().map(str.encode))
def test_arbitrary_bytes_are_no_metadata(data: bytes) -> None:
    with pytest.raises(SnapshotInvalid):
        Metadata.parse(data, "name")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"format":1,"a":' * 100_000,
        b"1" * 10_000,
        b'{"format":' + b"9" * 10_000 + b"}",
        b'{"format":1e400}',
        b'{"format":NaN}',
        b'{"format":true}',
        b"\xff\xfe{\x00}\x00",
        b" " * (MAX_METADATA + 1),
        b"null",
    ],
    ids=lambda data: f"{data[:8]!r}x{len(data)}",
)
def test_extreme_json_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotInvalid):
        Metadata.parse(data, "name")


def test_a_newer_format_says_to_upgrade() -> None:
    document = json.loads(example().to_bytes())
    document["format"] = FORMAT + 1
    document["something new"] = [1, 2, 3]
    with pytest.raises(SnapshotIncompatible, match="upgrade"):
        Metadata.parse(signed(document), "name")


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.0, True])
def test_a_format_that_never_was_is_refused(version: object) -> None:
    document = json.loads(example().to_bytes())
    document["format"] = version
    with pytest.raises(SnapshotInvalid) as caught:
        Metadata.parse(signed(document), "name")
    assert type(caught.value) is SnapshotInvalid


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unknown", 1),
        ("kind", "half"),
        ("kind", ["full"]),
        ("kind", "diff"),
        ("engine", 5),
        ("engine", "a\0b"),
        ("engine", "x" * 300),
        ("host", ["version"]),
        ("host", {"version": 7}),
        ("host", {str(number): "" for number in range(65)}),
        ("kernel", "0" * 63),
        ("kernel", "0" * 63 + "G"),
        ("kernel", "A" * 64),
        ("kernel", "\u0661" * 64),
        ("memory_mib", 0),
        ("memory_mib", 2),
        ("memory_mib", True),
        ("memory_mib", 1.0),
        ("memory_mib", 1 << 60),
        ("vcpus", -1),
        ("vcpus", None),
        ("guest_port", 0),
        ("guest_port", 65536),
        ("guest_port", "80"),
        ("created_at", -1),
        ("fingerprint", 7),
        ("layers", {}),
        ("layers", [[]]),
        ("layers", [{"path": "relative", "sha256": "0" * 64, "size": 1}]),
        ("layers", [{"path": "/a\0b", "sha256": "0" * 64, "size": 1}]),
        ("layers", [{"path": "/a//b", "sha256": "0" * 64, "size": 1}]),
        ("layers", [{"path": "/" + "a" * 5000, "sha256": "0" * 64, "size": 1}]),
        ("layers", [{"path": "/l", "sha256": "0" * 64, "size": -1}]),
        ("layers", [{"path": "/l", "sha256": "0" * 64, "size": 1, "more": 1}]),
        ("layers", [{"path": "/l", "sha256": "0" * 64}]),
        ("layers", [{"path": "/l", "sha256": "0" * 64, "size": 1}] * 257),
        ("state", None),
        ("state", {"sha256": "0" * 64, "size": 1 << 60}),
        ("memory", []),
        ("base", {}),
        ("base", {"identity": "0" * 64, "path": "/b", "relative": "../b"}),
        ("image_config", None),
        ("image_config", "sh"),
        ("image_config", {"Cmd": 5}),
        ("image_config", {}),
    ],
)
def test_a_value_out_of_bounds_is_refused_even_with_a_right_checksum(
    key: str, value: object
) -> None:
    document = json.loads(example().to_bytes())
    document[key] = value
    with pytest.raises(SnapshotInvalid, match="name"):
        Metadata.parse(signed(document), "name")


@pytest.mark.parametrize("key", sorted(json.loads(example().to_bytes())))
def test_every_key_has_to_be_there(key: str) -> None:
    document = json.loads(example().to_bytes())
    del document[key]
    with pytest.raises(SnapshotInvalid, match="name"):
        Metadata.parse(
            signed(document) if key != "checksum" else json.dumps(document).encode(), "name"
        )


def test_what_could_not_be_read_cannot_be_made() -> None:
    for changes in ({"memory_mib": 0}, {"kernel": "sha256:" + "0" * 64}, {"engine": None}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            draft(**changes)
    large = ImageConfig(labels={"a": "x" * MAX_METADATA})
    with pytest.raises(ValueError, match="too large"):
        attrs.evolve(example(), image_config=large).to_bytes()


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=8)


def pages_of(runs: list[Run]) -> set[int]:
    return {page for start, count in runs for page in range(start, start + count)}


@given(RUNS, RUNS)
def test_runs_are_sets_of_pages(left: list[Run], right: list[Run]) -> None:
    merged = union(left, right)
    assert pages_of(merged) == pages_of(left) | pages_of(right)
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(merged))
    assert total(merged) == len(pages_of(merged))
    common = intersection(union(left), union(right))
    assert pages_of(common) == pages_of(left) & pages_of(right)
    assert total(common) == len(pages_of(common))


@given(RUNS)
def test_the_header_and_the_table_of_a_diff_round_trip(many: list[Run]) -> None:
    runs = union(many)
    header = DiffHeader(1 << 20, total(runs), len(runs))
    data = header.to_bytes()
    assert len(data) == PAGE
    assert DiffHeader.parse(data) == header
    assert parse_runs(encode_runs(runs), header) == tuple(runs)


@given(st.binary(max_size=64), st.integers(0, PAGE - 1), st.integers(1, 255))
def test_a_damaged_header_is_refused_or_says_something_else(
    junk: bytes, index: int, mask: int
) -> None:
    with pytest.raises(MalformedError):
        DiffHeader.parse(junk.ljust(PAGE, b"\0"))
    good = DiffHeader(1 << 20, 5, 3)
    data = bytearray(good.to_bytes())
    data[index] ^= mask
    try:
        found = DiffHeader.parse(bytes(data))
    except MalformedError:
        return
    assert found != good
    assert found.runs <= found.pages <= found.memory_size // PAGE


def test_a_header_cannot_announce_a_table_without_bound() -> None:
    most = DiffHeader(MAX_RUNS * 2 * PAGE, MAX_RUNS, MAX_RUNS)
    assert DiffHeader.parse(most.to_bytes()) == most
    more = DiffHeader(MAX_RUNS * 4 * PAGE, MAX_RUNS + 1, MAX_RUNS + 1)
    with pytest.raises(MalformedError):
        DiffHeader.parse(more.to_bytes())


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 1), (0, 1), (5, 3)],
        [(5, 2), (1, 2), (8, 1)],
        [(0, 2), (1, 2), (9, 1)],
        [(0, 0), (1, 4), (9, 1)],
        [(0, 1), (2, 1), (254, 3)],
        [(0, 1), (2, 1), (4, 2)],
        [(0, 1), (2, 4)],
        [(0, 1), (2, 1), (2**64 - 1, 3)],
    ],
)
def test_a_table_of_runs_that_makes_no_sense_is_refused(runs: list[Run]) -> None:
    with pytest.raises(MalformedError):
        parse_runs(encode_runs(runs), DiffHeader(1 << 20, 5, 3))
