"""References against the cases of Docker's own parser, and against themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ReferenceInvalid
from trio_supermachine.oci.reference import Reference, Transport

from ..support import go_tables

DIGEST = "sha256:" + "0123456789abcdef" * 4


def go_table(file: str, function: str, after: str) -> list[Any]:
    text = go_tables.source(
        f"docker/distribution/reference/{file}_test.go", "golang-github-docker-distribution-dev"
    )
    return go_tables.table(go_tables.function(text, function), after)


def parse(text: str) -> Reference:
    """``text`` as a Docker name; some names of the cases are those of our transports too."""
    return Reference.parse("docker://" + text)


def refused(text: str) -> bool:
    try:
        parse(text)
    except ReferenceInvalid:
        return True
    return False


def test_references_are_understood_as_docker_does() -> None:
    for case in go_table("reference", "TestReferenceParse", "referenceTestcases := []"):
        text, domain = case["input"], case.get("domain", "")
        # Docker's command fills in a domain where the first part does not look like a host.
        filled_in = not (set(domain) & set(".:"))
        name = case.get("repository", "").removeprefix(domain + "/")
        if filled_in:
            name = case.get("repository", "")
            name = name if "/" in name else "library/" + name
        if "err" in case or len("docker.io/" + name) > 255:
            assert refused(text), text
            continue
        found = parse(text)
        assert found.domain == ("docker.io" if filled_in else domain), text
        assert found.path == name, text
        assert found.digest == case.get("digest"), text
        assert found.tag == case.get("tag", None if found.digest else "latest"), text


@pytest.mark.parametrize("function", ["TestValidateReferenceName", "TestValidateRemoteName"])
def test_names_are_valid_where_docker_says_so(function: str) -> None:
    noun = "Repo" if function.endswith("ReferenceName") else "Repository"
    for text in go_table("normalize", function, f"valid{noun}Names := "):
        assert not refused(text), text
    for text in go_table("normalize", function, f"invalid{noun}Names := "):
        assert refused(text), text


def test_names_are_made_familiar_and_full_as_docker_does() -> None:
    for case in go_table("normalize", "TestParseRepositoryInfo", "tcases := []tcase"):
        for key in ("FamiliarName", "FullName", "AmbiguousName"):
            if not case[key]:
                continue
            found = parse(case[key])
            assert (found.domain, found.path) == (case["Domain"], case["RemoteName"])
            assert found.familiar == case["FamiliarName"] + ":latest"
            assert str(found) == f"docker://{case['FullName']}:latest"


def test_a_name_is_split_into_host_and_path_as_docker_does() -> None:
    for case in go_table("normalize", "TestNormalizedSplitHostname", "testcases := []"):
        found = parse(case["input"])
        assert (found.domain, found.path) == (case["domain"], case["name"])


def test_a_name_without_tag_means_latest_as_docker_does() -> None:
    for case in go_table("normalize", "TestParseDockerRef", "testcases := []"):
        found = parse(case["input"])
        name = f"{found.domain}/{found.path}"
        # Beside a digest the tag means nothing; here it is kept for whoever reads the name.
        full = f"{name}@{found.digest}" if found.digest else f"{name}:{found.tag}"
        assert full == case["expected"]


def test_an_identifier_is_not_a_name_and_what_is_almost_one_is() -> None:
    for case in go_table("normalize", "TestParseAnyReference", "tcases := []"):
        if case.get("Digests") or "Expected" in case:
            continue  # those are looked up in a set of images, or are no names
        name = parse(case["Reference"])
        expected = case["Equivalent"]
        assert str(name).removeprefix("docker://") in (expected, expected + ":latest")
    for case in go_table("regexp", "TestIdentifierRegexp", "fullCases := "):
        if case["match"]:
            assert refused(case["input"])


def test_the_grammar_of_hosts_is_dockers() -> None:
    for case in go_table("regexp", "TestDomainRegexp", "hostcases := "):
        assert refused(f"{case['input']}/name") is not case["match"], case


def test_the_grammar_of_names_is_dockers() -> None:
    for case in go_table("regexp", "TestFullNameRegexp", "testcases := "):
        text = case["input"]
        too_long = len(text) > 255
        assert refused(text + ":tag") is (not case["match"] or too_long), text


def test_the_grammar_of_references_is_dockers() -> None:
    for case in go_table("regexp", "TestReferenceRegexp", "testcases := "):
        text = case["input"]
        assert refused(text) is not case["match"], text
        if case["match"]:
            _, tag, digest = case["subs"]
            found = parse(text)
            assert (found.tag, found.digest) == (tag or None, digest or None)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("[::1]/a", True),
        ("[2001:db8::7]:5000/a/b:t", True),
        ("[::1]:0/a", False),
        ("[::1]:65536/a", False),
        ("[::::]/a", False),
        ("[]/a", False),
        ("[::1%eth0]/a", False),
        ("[::1", False),
        ("example.com:٣/a", False),
        ("user@example.com/a", False),
        ("example.com:5000:5000/a", False),
    ],
)
def test_a_registry_may_be_an_address_that_can_be_one(text: str, accepted: bool) -> None:
    assert refused(text) is not accepted


@pytest.mark.parametrize(
    ("digest", "accepted"),
    [
        (DIGEST, True),
        ("sha384:" + "a" * 96, True),
        ("sha512:" + "a" * 128, True),
        (DIGEST.upper(), False),
        (DIGEST[:-1], False),
        (DIGEST + "0", False),
        ("sha256:" + "g" * 64, False),
        ("sha1:" + "a" * 40, False),  # well-formed, but Docker knows no such algorithm
        ("sha256+b64:" + "a" * 64, False),
    ],
)
def test_digests_are_those_that_docker_can_check(digest: str, accepted: bool) -> None:
    assert refused("a@" + digest) is not accepted


HOSTS = st.sampled_from(
    ["docker.io", "index.docker.io", "localhost", "localhost:1", "[::1]:5000", "UPPER", "a.b-c.d"]
)
COMPONENTS = st.from_regex(r"[a-z0-9]+([._]|__|-{1,3})[a-z0-9]+|[a-z0-9]{1,9}", fullmatch=True)
TAGS = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)


@given(
    HOSTS,
    st.lists(COMPONENTS, min_size=1, max_size=4) | st.just(["localhost", "a"]) | st.just(["oci"]),
    TAGS,
    st.none() | st.just(DIGEST),
)
def test_each_way_to_write_a_reference_means_the_same(
    host: str, components: list[str], tag: str | None, digest: str | None
) -> None:
    text = "/".join([host, *components])
    text += "" if tag is None else f":{tag}"
    text += "" if digest is None else f"@{digest}"
    found = parse(text)
    assert found.transport is Transport.DOCKER
    assert found.tag == (tag or (None if digest else "latest"))
    assert Reference.parse(str(found)) == Reference.parse(found.familiar) == found
    assert len(found.familiar) <= len(str(found))
