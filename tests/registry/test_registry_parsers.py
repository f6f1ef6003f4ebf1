"""The parts of the registry client that do no I/O: what they understand, and what they refuse."""

from __future__ import annotations

import email.utils
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ConfigError, RegistryError
from trio_supermachine.oci import MalformedError
from trio_supermachine.oci.names import show_text
from trio_supermachine.oci.reference import Reference
from trio_supermachine.oci.registry import RegistrySettings
from trio_supermachine.oci.registry.challenge import Challenge, parse_challenges
from trio_supermachine.oci.registry.endpoints import endpoint, endpoints_of
from trio_supermachine.oci.registry.ranges import bytes_to_skip
from trio_supermachine.oci.registry.registries_conf import parse_tables
from trio_supermachine.oci.registry.retry import Retry, Transient, parse_retry_after

FILE = Path("registries.conf")
TOKENS = st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~", min_size=1, max_size=12)
VALUES = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20)


class TestChallenges:
    def test_the_one_of_docker_hub(self) -> None:
        header = (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",'
            'scope="repository:library/alpine:pull"'
        )
        [challenge] = parse_challenges([header])
        assert challenge.scheme == "bearer"
        assert challenge.parameters == {
            "realm": "https://auth.docker.io/token",
            "service": "registry.docker.io",
            "scope": "repository:library/alpine:pull",
        }

    def test_several_in_one_header_and_in_several(self) -> None:
        found = parse_challenges(
            ['Negotiate, Newauth realm="a, b", type=1 , Basic realm=simple', "NTLM TlRMTVNTUAAC=="]
        )
        assert [c.scheme for c in found] == ["negotiate", "newauth", "basic", "ntlm"]
        assert found[1].parameters == {"realm": "a, b", "type": "1"}

    def test_a_quoted_comma_and_backslash_belong_to_the_value(self) -> None:
        [challenge] = parse_challenges([r'Basic realm="say \"hi\", \\ you"'])
        assert challenge.parameters == {"realm": 'say "hi", \\ you'}

    def test_spaces_around_the_equals_sign(self) -> None:
        [challenge] = parse_challenges(['Bearer realm = "x" , service= y'])
        assert challenge.parameters == {"realm": "x", "service": "y"}

    @given(
        st.lists(
            st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), VALUES, max_size=4)),
            max_size=4,
        )
    )
    def test_what_is_written_well_is_read_back(
        self, wanted: list[tuple[str, dict[str, str]]]
    ) -> None:
        def quoted(value: str) -> str:
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

        header = ", ".join(
            (f"{scheme} " + ", ".join(f"{n}={quoted(v)}" for n, v in parameters.items())).strip()
            for scheme, parameters in wanted
        )
        assert parse_challenges([header]) == [Challenge(s.lower(), p) for s, p in wanted]

    @given(st.lists(st.text(max_size=60), max_size=4))
    def test_anything_else_is_survived(self, headers: list[str]) -> None:
        for challenge in parse_challenges(headers):
            assert challenge.scheme

    @given(st.text('aB"=,\\ \t', max_size=40))
    def test_near_misses_are_survived(self, header: str) -> None:
        parse_challenges([header])

    def test_there_are_bounds(self) -> None:
        assert parse_challenges(["Basic realm=" + "x" * 20_000]) == []
        assert len(parse_challenges(["a, " * 5000])) <= 16


class TestRetryAfter:
    def test_seconds(self) -> None:
        assert parse_retry_after(" 120 ") == 120

    def test_a_date(self) -> None:
        text = email.utils.formatdate(1_000_000_060, usegmt=True)
        assert parse_retry_after(text, 1_000_000_000) == 60
        assert parse_retry_after(text, 1_000_000_100) == 0

    @pytest.mark.parametrize(
        "text", [None, "", "-1", "1.5", "soon", "Fri, 99 Foo 2020", "²", "9" * 70]
    )
    def test_nonsense_is_no_wish(self, text: str | None) -> None:
        assert parse_retry_after(text, 0) is None

    @given(st.text(max_size=70))
    def test_anything_is_survived(self, text: str) -> None:
        seconds = parse_retry_after(text, 0)
        assert seconds is None or seconds >= 0


class TestRetry:
    failure = Transient(RegistryError("no", registry="r"))

    def retry(self, limit: int = 4, chance: float = 1.0) -> Retry:
        return Retry(RegistrySettings(backoff=1, longest_wait=3), limit, lambda: chance)

    def test_pauses_double_up_to_the_longest(self) -> None:
        retry = self.retry(limit=10)
        assert [retry.after(self.failure) for _ in range(4)] == [1, 2, 3, 3]

    def test_half_of_a_pause_is_chance(self) -> None:
        assert self.retry(chance=0.0).after(self.failure) == 0.5

    def test_the_last_attempt_raises_the_error_itself(self) -> None:
        retry = self.retry(limit=2)
        retry.after(self.failure)
        with pytest.raises(RegistryError, match="no"):
            retry.after(self.failure)

    def test_an_advance_begins_anew(self) -> None:
        retry = self.retry(limit=2)
        for _ in range(100):
            assert retry.after(self.failure) == 1
            retry.advanced()

    def test_a_server_may_ask_for_longer_but_not_for_ever(self) -> None:
        asked = Transient(self.failure.error, retry_after=2.5)
        assert self.retry().after(asked) == 2.5
        asked = Transient(self.failure.error, retry_after=1e9)
        assert self.retry().after(asked) == 3

    def test_many_attempts_do_not_overflow(self) -> None:
        retry = self.retry(limit=10_000)
        assert max(retry.after(self.failure) for _ in range(5000)) == 3

    @pytest.mark.parametrize("field", ["attempts", "backoff", "longest_wait", "stall_timeout"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
    def test_settings_are_checked_where_they_are_written(self, field: str, value: float) -> None:
        with pytest.raises(ConfigError, match=field):
            RegistrySettings(**{field: value})  # type: ignore[arg-type]


class TestRanges:
    def skip(self, status: int, range: str | None, length: str | None) -> int:
        return bytes_to_skip(status, range, length, start=10, size=100)

    def test_the_range_that_was_asked_for(self) -> None:
        assert self.skip(206, "bytes 10-99/100", "90") == 0
        assert self.skip(206, "bytes 10-49/*", "40") == 0
        assert self.skip(206, " bytes  10-99/100 ", None) == 0

    def test_a_whole_blob_is_read_up_to_the_place(self) -> None:
        assert self.skip(200, None, "100") == 10
        assert self.skip(200, None, None) == 10

    @pytest.mark.parametrize(
        ("status", "range", "length"),
        [
            (206, None, "90"),
            (206, "bytes 0-99/100", "100"),
            (206, "bytes 11-99/100", "89"),
            (206, "bytes 10-100/101", "91"),
            (206, "bytes 10-100/*", "91"),
            (206, "bytes 10-9/100", "0"),
            (206, "bytes 10-99/100", "80"),
            (206, "items 10-99/100", "90"),
            (206, "bytes */100", "90"),
            (206, "bytes 10-99/100, bytes 10-99/100", None),
            (206, "bytes \u0661\u0660-99/100", None),
            (200, None, "101"),
            (200, None, "99"),
        ],
    )
    def test_anything_else_is_refused(
        self, status: int, range: str | None, length: str | None
    ) -> None:
        with pytest.raises(MalformedError):
            self.skip(status, range, length)

    @given(st.sampled_from([200, 206]), st.none() | st.text(max_size=40), st.text(max_size=20))
    def test_arbitrary_headers_are_understood_or_refused(
        self, status: int, range: str | None, length: str
    ) -> None:
        try:
            assert self.skip(status, range, length) in (0, 10)
        except MalformedError:
            pass


def sources(conf: str, reference: str) -> list[str]:
    found = endpoints_of(Reference.parse(f"docker://{reference}"), parse_tables(conf, FILE))
    return [f"{e.host}/{e.path}" + (" insecure" if e.insecure else "") for e in found]


class TestEndpoints:
    def test_docker_hub_has_another_host(self) -> None:
        assert sources("", "alpine") == ["registry-1.docker.io/library/alpine"]

    def test_a_digest_and_a_tag_are_no_part_of_the_path(self) -> None:
        digest = "sha256:" + "a" * 64
        assert sources("", f"r.example:5000/a/b:c@{digest}") == ["r.example:5000/a/b"]

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [
            ("localhost:5000", True),
            ("127.0.0.1", True),
            ("127.1.2.3:80", True),
            ("[::1]:5000", True),
            ("localhost.example.com", False),
            ("10.0.0.1:5000", False),
            ("[::2]", False),
        ],
    )
    def test_plain_http_is_for_loopback(self, host: str, loopback: bool) -> None:
        assert endpoint(f"{host}/x").plain_allowed is loopback

    @pytest.mark.parametrize(
        "location",
        [
            "",
            "/x",
            "host:0/x",
            "host:70000/x",
            "ho st/x",
            "host/../x",
            "host//x",
            "host/X",
            "user@host/x",
            "[::g]/x",
            "host/x?y",
            "[:::::]/x",
        ],
    )
    def test_what_is_no_registry_is_refused(self, location: str) -> None:
        with pytest.raises(ConfigError, match="is not a registry"):
            endpoint(location)

    @given(st.text(max_size=40))
    def test_arbitrary_locations_are_taken_or_refused(self, location: str) -> None:
        try:
            assert isinstance(endpoint(location).plain_allowed, bool)
        except ConfigError:
            pass


class TestRegistriesConf:
    def test_mirrors_come_before_the_registry(self) -> None:
        conf = """
            [[registry]]
            location = "docker.io"
            [[registry.mirror]]
            location = "mirror.example/hub"
            [[registry.mirror]]
            location = "10.0.0.1:5000"
            insecure = true
        """
        assert sources(conf, "alpine") == [
            "mirror.example/hub/library/alpine",
            "10.0.0.1:5000/library/alpine insecure",
            "registry-1.docker.io/library/alpine",
        ]

    def test_a_prefix_is_replaced_by_its_location(self) -> None:
        conf = """
            [[registry]]
            prefix = "example.com/team"
            location = "internal.example:5000/images"
        """
        assert sources(conf, "example.com/team/app:1") == ["internal.example:5000/images/app"]
        assert sources(conf, "example.com/teamwork/app") == ["example.com/teamwork/app"]
        assert sources(conf, "example.com/other") == ["example.com/other"]

    def test_the_longest_prefix_wins(self) -> None:
        conf = """
            [[registry]]
            prefix = "example.com"
            location = "a.example"
            [[registry]]
            prefix = "example.com/x"
            location = "b.example"
            [[registry]]
            prefix = "*.com"
            location = "c.example"
        """
        assert sources(conf, "example.com/x/y") == ["b.example/y"]
        assert sources(conf, "example.com/z") == ["a.example/z"]
        assert sources(conf, "other.com/z") == ["c.example/z"]

    def test_a_port_makes_another_registry(self) -> None:
        conf = '[[registry]]\nprefix = "example.com"\nlocation = "a.example"'
        assert sources(conf, "example.com:5000/x") == ["example.com:5000/x"]

    def test_a_wildcard_covers_hosts_below_and_their_ports(self) -> None:
        conf = '[[registry]]\nprefix = "*.example.com"\ninsecure = true'
        assert sources(conf, "a.b.example.com:5000/x") == ["a.b.example.com:5000/x insecure"]
        assert sources(conf, "example.com/x") == ["example.com/x"]
        assert sources(conf, "badexample.com/x") == ["badexample.com/x"]

    def test_a_prefix_may_be_one_tag(self) -> None:
        conf = '[[registry]]\nprefix = "example.com/x:1"\nlocation = "a.example/y:1"'
        assert sources(conf, "example.com/x:1") == ["a.example/y"]
        assert sources(conf, "example.com/x:2") == ["example.com/x"]

    @pytest.mark.parametrize(
        ("key", "by_tag", "by_digest"),
        [
            ('pull-from-mirror = "digest-only"', 1, 2),
            ('pull-from-mirror = "tag-only"', 2, 1),
            ('pull-from-mirror = "all"', 2, 2),
            ("", 2, 2),
        ],
    )
    def test_a_mirror_may_be_for_tags_or_digests(
        self, key: str, by_tag: int, by_digest: int
    ) -> None:
        conf = f"""
            [[registry]]
            location = "example.com"
            [[registry.mirror]]
            location = "mirror.example"
            {key}
        """
        assert len(sources(conf, "example.com/x:1")) == by_tag
        assert len(sources(conf, "example.com/x@sha256:" + "0" * 64)) == by_digest

    def test_mirrors_of_a_registry_may_be_for_digests_only(self) -> None:
        conf = """
            [[registry]]
            location = "example.com"
            mirror-by-digest-only = true
            [[registry.mirror]]
            location = "mirror.example"
        """
        assert len(sources(conf, "example.com/x:1")) == 1
        assert len(sources(conf, "example.com/x@sha256:" + "0" * 64)) == 2

    def test_what_is_blocked_is_refused_by_the_name_of_the_file(self) -> None:
        conf = '[[registry]]\nlocation = "evil.example"\nblocked = true'
        with pytest.raises(RegistryError, match=r"registries\.conf blocks evil\.example"):
            sources(conf, "evil.example/x")
        assert sources(conf, "good.example/x")

    @pytest.mark.parametrize(
        ("conf", "why"),
        [
            ("registry = 1", "not a list"),
            ("[[registry]]\nlocation = 1", "not a string"),
            ('[[registry]]\nlocation = "a"\nblocked = "no"', "not true or false"),
            ("[[registry]]\n", "no location"),
            ('[[registry]]\nprefix = "a.example"', "no location"),
            ('[[registry]]\nlocation = "https://a"', "leave out the scheme"),
            ('[[registry]]\nlocation = "a b"', "is not HOST"),
            ('[[registry]]\nlocation = "a"\n[[registry.mirror]]\n', "mirror has no location"),
            (
                '[[registry]]\nlocation="a"\n[[registry.mirror]]\nlocation="b"\n'
                'pull-from-mirror="x"',
                "pull-from-mirror",
            ),
            ("[registries.search]\nregistries = []", "version 1"),
            ("[[registry", "not TOML"),
            ("a = " + "[" * 5000, "not TOML"),
        ],
    )
    def test_mistakes_are_named(self, conf: str, why: str) -> None:
        with pytest.raises(ConfigError, match=why) as caught:
            parse_tables(conf, FILE)
        assert "registries.conf" in str(caught.value)


def test_text_from_outside_cannot_drive_a_terminal() -> None:
    assert show_text("a\x1b[31m\r\n\tb\u202e\x00") == "a [31m b"
    assert len(show_text("x" * 10_000)) < 600
