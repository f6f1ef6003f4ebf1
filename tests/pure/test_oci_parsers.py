"""The parsers of untrusted text: references, configurations, tar names and headers."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ReferenceInvalid
from trio_supermachine.oci import MalformedError, tar
from trio_supermachine.oci.config import ImageConfig, parse_signal
from trio_supermachine.oci.names import MAX_NAME, clean
from trio_supermachine.oci.reference import Reference
from trio_supermachine.oci.tar import Entry, TarReader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
COMPONENT = st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+)*", fullmatch=True).filter(
    lambda text: len(text) < 30 and text != "localhost"
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("docker:dind", "docker.io/library/docker:dind"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker://index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a/b:t", "localhost:5000/a/b:t"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("quay.io/a__b/c-d", "quay.io/a__b/c-d:latest"),
        ("a@sha256:" + "0" * 64, "docker.io/library/a@sha256:" + "0" * 64),
        ("a:t@sha256:" + "0" * 64, "docker.io/library/a:t@sha256:" + "0" * 64),
    ],
)
def test_names_are_normalised_as_docker_does(text: str, name: str) -> None:
    assert str(Reference.parse(text)) == "docker://" + name


@pytest.mark.parametrize(
    "text",
    [
        *("", ":t", "a:", "a@", "a@sha256:00", "A", "a//b", "a/", "-a", "a_", "a..b", "0" * 64),
        *("oci:", "oci:d:", "oci:d:a b", "docker://", "rootfs:", "builtin:x", "a\n"),
        *("a:" + "t" * 129, "a/" * 128 + "a", "docker-archive:f:UPPER"),
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("/srv/image", "oci:DIR"),
        ("./image", "oci:DIR"),
        ("../image.tar", "oci-archive:FILE"),
        ("https://registry.test/a:1", "without https://"),
    ],
)
def test_what_people_write_instead_is_told_better(text: str, remedy: str) -> None:
    with pytest.raises(ReferenceInvalid, match=remedy):
        Reference.parse(text)


@given(st.text(max_size=80) | st.text("abA01:/@._-[]", max_size=40))
def test_any_text_parses_or_is_refused_and_means_the_same_when_written_out(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        return
    assert Reference.parse(str(reference)) == reference


@given(COMPONENT, COMPONENT, st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True))
def test_a_name_of_proper_parts_parses(user: str, name: str, tag: str) -> None:
    parsed = Reference.parse(f"docker://registry.test/{user}/{name}:{tag}")
    assert (parsed.domain, parsed.path, parsed.tag) == ("registry.test", f"{user}/{name}", tag)


@given(
    JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("Env", "Cmd", "User", "Labels"), JSON))
)
def test_a_configuration_parses_or_is_malformed(config: object) -> None:
    try:
        parsed = ImageConfig.from_json(config)
    except MalformedError:
        return
    assert parsed.workdir.startswith("/")
    assert all("=" in item for item in parsed.env)


@pytest.mark.parametrize(
    ("text", "number"), [("", 15), ("SIGQUIT", 3), ("quit", 3), ("3", 3), ("SIGRTMIN+3", 37)]
)
def test_stop_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["0", "65", "-1", "SIGNOPE", "²", "RTMIN+31", "DFL"])
def test_what_is_no_signal_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_signal(text)


@given(st.lists(st.sampled_from([b"", b".", b"..", b"a", b"b c", b"\xff", b"x" * 256])))
def test_a_clean_name_stays_below_its_root(parts: list[bytes]) -> None:
    name = b"/".join(parts)
    try:
        path = clean(name)
    except MalformedError:
        assert b".." in parts or b"x" * 256 in parts
        return
    assert not path.startswith(b"/")
    assert clean(path) == path
    assert all(0 < len(p) <= MAX_NAME and p not in (b".", b"..") for p in path.split(b"/") if path)


ENTRIES = st.builds(
    Entry,
    name=st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name),
    type=st.sampled_from([tar.FILE, tar.DIRECTORY, tar.SYMLINK, tar.FIFO]),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    mtime=st.integers(0, 2**32 - 1),
    linkname=st.binary(max_size=300).filter(lambda name: b"\0" not in name),
    xattrs=st.dictionaries(
        st.binary(min_size=1, max_size=20).filter(lambda k: not {0, 61} & set(k)),
        st.binary(min_size=1, max_size=50),  # PAX has no empty ones
        max_size=3,
    ),
)


@given(st.lists(ENTRIES, max_size=4))
def test_a_written_header_reads_back(entries: list[Entry]) -> None:
    stream = b"".join(map(tar.header, entries)) + bytes(2 * tar.BLOCK)
    assert list(TarReader(io.BytesIO(stream))) == entries


@given(st.binary(max_size=2048), st.integers(0, 1535), st.integers(0, 255))
def test_damaged_tar_is_read_or_malformed(tail: bytes, at: int, value: int) -> None:
    entry = Entry(b"n" * 150, tar.FILE, size=len(tail), xattrs={b"user.a": b"b"})
    stream = bytearray(tar.header(entry) + tail)
    stream[min(at, len(stream) - 1)] = value
    try:
        reader = TarReader(io.BytesIO(bytes(stream)))
        for _ in reader:
            assert sum(map(len, reader.body())) <= len(stream)
    except MalformedError:
        pass
