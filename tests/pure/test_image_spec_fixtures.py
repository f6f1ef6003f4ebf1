"""Documents against the cases of the OCI image specification's own tests."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import NotSupported
from trio_supermachine.oci import MalformedError
from trio_supermachine.oci.blobs import as_digest, read_json
from trio_supermachine.oci.documents import (
    Descriptor,
    read_configuration,
    read_index,
    read_layout,
    read_manifest,
)

from ..support import go_tables

PACKAGE = "golang-github-opencontainers-image-spec-dev"
#: Media types and fields as Docker wrote them before they became the specification's.
RENAMED = {
    "vnd.docker.distribution.manifest.list.v2+json": "vnd.oci.image.index.v1+json",
    "vnd.docker.distribution.manifest.v2+json": "vnd.oci.image.manifest.v1+json",
    "vnd.docker.image.rootfs.diff.tar.gzip": "vnd.oci.image.layer.v1.tar+gzip",
    "vnd.docker.container.image.v1+json": "vnd.oci.image.config.v1+json",
    "application/octet-stream": "application/vnd.oci.image.config.v1+json",
}


def descriptor(data: bytes) -> object:
    return Descriptor.from_json(read_json(data, "a descriptor"), "a descriptor")


READERS: dict[str, Callable[[bytes], object]] = {
    "config": read_configuration,
    "descriptor": descriptor,
    "imageIndex": read_index,
    "imageLayout": read_layout,
    "manifest": read_manifest,
}


def cases(file: str, field: str, function: str) -> list[Any]:
    path = f"opencontainers/image-spec/schema/{file}_test.go"
    text = go_tables.function(go_tables.source(path, PACKAGE), function)
    found = go_tables.table(text, "range []")
    assert all(field in case for case in found)
    return found


@pytest.mark.parametrize(
    ("file", "field", "function"),
    [
        ("config", "config", "TestConfig"),
        ("descriptor", "descriptor", "TestDescriptor"),
        ("imageindex", "imageIndex", "TestImageIndex"),
        ("imagelayout", "imageLayout", "TestImageLayout"),
        ("manifest", "manifest", "TestManifest"),
        ("backwards_compatibility", "config", "TestBackwardsCompatibilityConfig"),
        ("backwards_compatibility", "imageIndex", "TestBackwardsCompatibilityImageIndex"),
        ("backwards_compatibility", "manifest", "TestBackwardsCompatibilityManifest"),
    ],
)
def test_documents_are_accepted_and_refused_as_the_specification_says(
    file: str, field: str, function: str
) -> None:
    for case in cases(file, field, function):
        data = case[field].encode()
        if case.get("fail"):
            with pytest.raises(MalformedError):
                READERS[field](data)
        else:
            READERS[field](data)


@pytest.mark.parametrize("function", ["ImageIndex", "Manifest", "Config"])
def test_dockers_documents_are_also_accepted_in_the_words_of_the_specification(
    function: str,
) -> None:
    field = function[0].lower() + function[1:]
    name = f"TestBackwardsCompatibility{function}"
    for case in cases("backwards_compatibility", field, name):
        text = case[field]
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        READERS[field](text.encode())


def examples(page: str) -> list[tuple[str, bytes]]:
    """The examples in a page of the specification that say which document they are."""
    text = go_tables.source(f"opencontainers/image-spec/{page}.md", PACKAGE)
    found = re.findall(r"^```json,([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        (parse_qs(about.replace("&amp;", "&"))["mediatype"][0].replace(" ", "+"), body.encode())
        for about, body in found
        if "mediatype=" in about
    ]


@pytest.mark.parametrize(
    "page", ["config", "descriptor", "image-index", "image-layout", "manifest"]
)
def test_the_examples_of_the_specification_are_accepted(page: str) -> None:
    readers: dict[str, Callable[[bytes], object]] = {
        "application/vnd.oci.image.config.v1+json": read_configuration,
        "application/vnd.oci.descriptor.v1+json": descriptor,
        "application/vnd.oci.image.index.v1+json": read_index,
        "application/vnd.oci.layout.header.v1+json": read_layout,
        "application/vnd.oci.image.manifest.v1+json": read_manifest,
    }
    known = [(kind, body) for kind, body in examples(page) if kind in readers]
    assert known
    for kind, body in known:
        if b'"artifactType"' in body and kind.endswith("manifest.v1+json"):
            with pytest.raises(NotSupported, match="artifact"):
                read_manifest(body)
        else:
            readers[kind](body)


SIZED = {"size": 2, "digest": "sha256:" + "0" * 64}
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **SIZED}
CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", **SIZED}
MANIFEST = {"mediaType": "application/vnd.oci.image.manifest.v1+json", **SIZED}
ROOTFS = {"type": "layers", "diff_ids": [SIZED["digest"]]}
WHOLE = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]}

#: What registries serve and Docker takes, though the specification's schema refuses it.
LENIENT = [
    ("Go programs write an empty map as null", "manifest", {**WHOLE, "annotations": None}),
    (
        "likewise in a descriptor",
        "descriptor",
        {**LAYER, "annotations": None, "urls": None, "platform": None, "data": None},
    ),
    (
        "early registries knew no type for a configuration",
        "manifest",
        {**WHOLE, "config": {**CONFIG, "mediaType": "application/octet-stream"}},
    ),
    ("and some wrote none", "manifest", {**WHOLE, "config": SIZED}),
    ("tools that build for one machine name none", "config", {"rootfs": ROOTFS}),
    (
        "nor does podman for what is no program",
        "imageIndex",
        {
            "schemaVersion": 2,
            "manifests": [{**MANIFEST, "platform": {"os": "", "architecture": ""}}],
        },
    ),
    (
        "a lone string was a command before there were lists",
        "config",
        {"rootfs": ROOTFS, "config": {"Cmd": "sh", "Env": None, "User": None}},
    ),
    (
        "an index may be empty, where the image was removed",
        "imageIndex",
        {"schemaVersion": 2, "manifests": []},
    ),
]


@pytest.mark.parametrize(("reason", "field", "document"), LENIENT)
def test_what_is_served_and_taken_is_taken_here(reason: str, field: str, document: object) -> None:
    READERS[field](json.dumps(document).encode())


#: What the schema lets pass, and is refused here.
STRICT = [
    # Two readers could take it for different things (CVE-2021-41190).
    ("manifest", {**WHOLE, "manifests": [MANIFEST]}),
    ("manifest", {**WHOLE, "mediaType": "application/vnd.oci.image.index.v1+json"}),
    ("imageIndex", {"schemaVersion": 2, "manifests": [], "layers": [LAYER]}),
    ("imageIndex", {"schemaVersion": 2, "manifests": [], "config": CONFIG}),
    # Its numbers, lengths or counts are none that can be.
    ("descriptor", {**LAYER, "size": -1}),
    ("descriptor", {**LAYER, "size": 1 << 63}),
    ("descriptor", {**LAYER, "size": True}),
    ("descriptor", {**LAYER, "digest": "sha256:" + "0" * 63}),
    ("descriptor", {**LAYER, "digest": "sha512:" + "0" * 64}),
    ("descriptor", {**LAYER, "digest": "md5:" + "0" * 2000}),
    ("descriptor", {**LAYER, "data": "AAAA"}),
    ("descriptor", {**LAYER, "data": "A A=="}),
    ("descriptor", {**LAYER, "data": 1}),
    ("descriptor", {**LAYER, "urls": ["https://example.com/\u001b[2J"]}),
    ("descriptor", {**LAYER, "urls": ["https://example.com/"] * 65}),
    ("descriptor", {**LAYER, "artifactType": "none"}),
    ("descriptor", {**LAYER, "platform": {"os": "li\nnux", "architecture": "amd64"}}),
    ("imageIndex", {"schemaVersion": 2, "manifests": [MANIFEST] * 4097}),
    ("manifest", {**WHOLE, "layers": [LAYER] * 128}),
    ("manifest", {**WHOLE, "schemaVersion": 3}),
    ("config", {"rootfs": {**ROOTFS, "diff_ids": ["x"]}}),
    ("config", {"rootfs": ROOTFS, "config": {"Env": ["A=\0"]}}),
]


@pytest.mark.parametrize(("field", "document"), STRICT)
def test_what_could_deceive_is_malformed(field: str, document: object) -> None:
    with pytest.raises(MalformedError):
        READERS[field](json.dumps(document).encode())


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe{\x00}\x00", b"{'a': 1}", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000, b"\xff"],
)
@pytest.mark.parametrize("field", READERS)
def test_what_is_not_json_is_malformed(field: str, data: bytes) -> None:
    with pytest.raises(MalformedError):
        READERS[field](data)


@pytest.mark.parametrize(
    ("named", "field", "document"),
    [
        (
            r"application/vnd\.example\.squashfs",
            "manifest",
            {
                **WHOLE,
                "layers": [LAYER, {**LAYER, "mediaType": "application/vnd.example.squashfs"}],
            },
        ),
        (
            r"tar\+gzip\+encrypted",
            "manifest",
            {**WHOLE, "layers": [{**LAYER, "mediaType": f"{LAYER['mediaType']}+encrypted"}]},
        ),
        (
            "application/vnd.example.chart",
            "manifest",
            {**WHOLE, "config": {**CONFIG, "mediaType": "application/vnd.example.chart"}},
        ),
        (
            "application/vnd.example.sbom",
            "manifest",
            {
                **WHOLE,
                "artifactType": "application/vnd.example.sbom",
                "config": {**CONFIG, "mediaType": "application/vnd.oci.empty.v1+json"},
                "subject": MANIFEST,
            },
        ),
        ("schema 1", "manifest", {"schemaVersion": 1, "fsLayers": []}),
        ("version '2.0.0'", "imageLayout", {"imageLayoutVersion": "2.0.0"}),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    named: str, field: str, document: object
) -> None:
    with pytest.raises(NotSupported, match=named):
        READERS[field](json.dumps(document).encode())


def test_a_digest_that_cannot_be_checked_is_not_supported_rather_than_damaged() -> None:
    digest = "sha512:" + "a" * 128
    found = Descriptor.from_json({**LAYER, "digest": digest}, "a descriptor")
    assert found.digest == digest
    with pytest.raises(NotSupported, match="sha512"):
        as_digest(found.digest, "a layer's digest")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


SOUND: list[tuple[str, dict[str, Any]]] = [
    ("manifest", {**WHOLE, "artifactType": None, "subject": MANIFEST}),
    ("imageIndex", {"schemaVersion": 2, "manifests": [{**MANIFEST, "platform": {}}]}),
    ("descriptor", {**LAYER, "annotations": {"a": "b"}, "urls": [], "data": "AAA="}),
    ("config", {"rootfs": ROOTFS, "os": "linux", "config": {"Env": ["A=b"]}}),
    ("imageLayout", {"imageLayoutVersion": "1.0.0"}),
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, object]:
    """A sound document with something else in one place."""
    field, document = draw(st.sampled_from(SOUND))
    root = copy.deepcopy(document)
    place: Any = root
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        place[key] = draw(JSON)
        return field, root


@given(damaged())
def test_any_document_is_read_or_refused_by_type(case: tuple[str, object]) -> None:
    field, document = case
    try:
        READERS[field](json.dumps(document).encode())
    except (MalformedError, NotSupported):
        pass
