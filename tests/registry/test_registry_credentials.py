"""Credentials: which file or helper has them, and what a login and a logout leave there."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.errors import ConfigError
from trio_supermachine.oci.registry import (
    Credentials,
    erase_credentials,
    find_credentials,
    store_credentials,
)
from trio_supermachine.oci.registry.auth_files import AuthFile, auth_files, normalise_key

ME = Credentials(username="me", password="se:cret")
HELPER = """#!/bin/sh
# A helper that keeps each secret in a file, and says what it was asked.
set -eu
read -r key || true
printf '%s %s\\n' "$1" "$key" >>"$STORE/log"
name() {{ printf '%s' "$1" | tr -c 'a-z0-9' _; }}
case $1 in
    get)
        file=$STORE/$(name "$key")
        [ -e "$file" ] || {{ echo 'credentials not found in native keychain'; exit 1; }}
        cat "$file" ;;
    store)
        server=$(printf '%s' "$key" | sed 's/.*"ServerURL": "\\([^"]*\\)".*/\\1/')
        printf '%s' "$key" >"$STORE/$(name "$server")" ;;
    erase) rm -f "$STORE/$(name "$key")" ;;
esac
"""


def encoded(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The places that are looked through, all of them empty; the first one's directory."""
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    for name in ("docker", "run/containers", "config/containers"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "docker"


def write(place: Path, **document: Any) -> Path:
    file = place / ("config.json" if place.name == "docker" else "auth.json")
    file.write_text(json.dumps(document))
    return file


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ``docker-credential-keep`` on the path; the directory where it keeps secrets."""
    store = tmp_path / "kept"
    store.mkdir()
    program = tmp_path / "bin/docker-credential-keep"
    program.parent.mkdir()
    program.write_text(HELPER.format())
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STORE", str(store))
    return store


class TestFinding:
    async def test_nothing_anywhere_is_nothing(self) -> None:
        assert await find_credentials("r.example") is None

    async def test_docker_comes_before_podman(self, places: Path) -> None:
        podman = places.parent / "run/containers"
        write(
            podman, auths={"r.example": encoded("podman", "x"), "other.example": encoded("p", "")}
        )
        write(places, auths={"r.example": encoded("docker", "x")})
        found = await find_credentials("r.example")
        assert found == Credentials(username="docker", password="x")
        assert (await find_credentials("other.example")) == Credentials(username="p")

    async def test_a_file_of_the_environment_is_the_only_one(
        self, places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        write(places, auths={"r.example": encoded("docker", "x")})
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "own.json"))
        assert await find_credentials("r.example") is None

    async def test_a_repository_may_have_its_own(self, places: Path) -> None:
        auths = {
            "r.example": encoded("all", "1"),
            "r.example/team": encoded("team", "2"),
            "r.example/team/app": encoded("app", "3"),
        }
        write(places, auths=auths)
        for repository, name in [
            ("r.example/team/app", "app"),
            ("r.example/team/other", "team"),
            ("r.example/teamwork", "all"),
            ("r.example", "all"),
        ]:
            found = await find_credentials(repository)
            assert found is not None
            assert found.username == name

    @pytest.mark.parametrize(
        "key",
        ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"],
    )
    async def test_docker_hub_has_many_names(self, key: str, places: Path) -> None:
        write(places, auths={key: encoded("me", "x")})
        assert await find_credentials("docker.io/library/alpine") == Credentials(
            username="me", password="x"
        )

    @pytest.mark.parametrize(
        "key", ["https://r.example:5000", "http://r.example:5000/v2/", "r.example:5000"]
    )
    async def test_a_key_may_be_an_address(self, key: str, places: Path) -> None:
        write(places, auths={key: encoded("me", "x")})
        assert await find_credentials("r.example:5000/a/b") is not None
        assert await find_credentials("r.example/a/b") is None

    async def test_a_password_may_have_colons_and_padding(self, places: Path) -> None:
        write(places, auths={"r.example": encoded("me", "a:b:c\0\0")})
        assert await find_credentials("r.example") == Credentials(username="me", password="a:b:c")

    async def test_identity_tokens(self, places: Path) -> None:
        write(places, auths={"r.example": {"identitytoken": "token"}})
        assert await find_credentials("r.example") == Credentials(identity_token="token")

    async def test_what_helpers_leave_in_the_file_is_nothing(self, places: Path) -> None:
        write(places, auths={"r.example": {}, "b.example": None, "c.example": {"auth": ""}})
        for host in ("r.example", "b.example", "c.example"):
            assert await find_credentials(host) is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            "[" * 100_000,
            '{"auths": [1]}',
            '{"auths": {"r.example": {"auth": "%"}}}',
            '{"auths": {"r.example": {"auth": "/w=="}}}',
            '{"auths": {"r.example": {"auth": 5}}}',
            '{"auths": {"r.example": {"username": 5}}}',
            '{"auths": {"r.example": {"identitytoken": [1]}}}',
            '{"credHelpers": 1}',
            '{"credHelpers": {"r.example": "../../bin/sh"}}',
            '{"credsStore": "a b"}',
        ],
    )
    async def test_a_malformed_file_is_an_error(self, text: str, places: Path) -> None:
        (places / "config.json").write_text(text)
        with pytest.raises(ConfigError):
            await find_credentials("r.example")

    async def test_a_secret_is_not_in_what_is_printed(self) -> None:
        assert "se:cret" not in repr(ME)
        assert "token" not in repr(Credentials(identity_token="token")).replace(
            "identity_token", ""
        )

    @given(st.text(max_size=40))
    def test_any_key_has_a_normal_form(self, key: str) -> None:
        assert not normalise_key(key).endswith("/")


class TestStoring:
    async def test_what_is_stored_is_found_and_can_be_erased(self, places: Path) -> None:
        for host in ("r.example:5000", "docker.io", "[::1]:5000"):
            assert await store_credentials(host, ME) == places / "config.json"
            assert await find_credentials(f"{host}/x") == ME
            assert await erase_credentials(host)
            assert await find_credentials(host) is None
            assert not await erase_credentials(host)

    async def test_docker_finds_it_under_its_own_key(self, places: Path) -> None:
        await store_credentials("docker.io", ME)
        document = json.loads((places / "config.json").read_text())
        assert list(document["auths"]) == ["https://index.docker.io/v1/"]

    async def test_any_name_of_docker_hub_will_do(self) -> None:
        await store_credentials("index.docker.io", ME)
        assert await find_credentials("docker.io/library/alpine") == ME
        assert await erase_credentials("registry-1.docker.io")
        assert await find_credentials("docker.io") is None

    async def test_identity_tokens_too(self) -> None:
        await store_credentials("r.example", Credentials(identity_token="token"))
        assert await find_credentials("r.example") == Credentials(identity_token="token")

    async def test_the_rest_of_the_file_stays(self, places: Path) -> None:
        other = encoded("you", "x")
        file = write(places, auths={"b.example": other}, psFormat="x", HttpHeaders={"A": "b"})
        await store_credentials("r.example", ME)
        await erase_credentials("r.example")
        document = json.loads(file.read_text())
        assert document == {
            "auths": {"b.example": other},
            "psFormat": "x",
            "HttpHeaders": {"A": "b"},
        }

    async def test_another_spelling_is_replaced(self, places: Path) -> None:
        file = write(places, auths={"https://r.example/v1/": encoded("old", "x")})
        await store_credentials("r.example", ME)
        assert list(json.loads(file.read_text())["auths"]) == ["r.example"]

    async def test_only_the_owner_can_read_it(self, places: Path) -> None:
        await store_credentials("r.example", ME)
        assert stat.S_IMODE((places / "config.json").stat().st_mode) == 0o600

    async def test_a_symbolic_link_stays_one(self, places: Path, tmp_path: Path) -> None:
        (places / "config.json").symlink_to(tmp_path / "dotfiles.json")
        await store_credentials("r.example", ME)
        assert (places / "config.json").is_symlink()
        assert "r.example" in (tmp_path / "dotfiles.json").read_text()

    async def test_tasks_that_store_at_once_all_do(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(store_credentials, f"r{number}.example", ME)
        for number in range(8):
            assert await find_credentials(f"r{number}.example") == ME

    async def test_a_malformed_file_is_not_overwritten(self, places: Path) -> None:
        (places / "config.json").write_text("precious")
        with pytest.raises(ConfigError, match=r"config\.json"):
            await store_credentials("r.example", ME)
        assert (places / "config.json").read_text() == "precious"

    async def test_a_place_that_cannot_be_written_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REGISTRY_AUTH_FILE", "/proc/none/auth.json")
        with pytest.raises(ConfigError, match="cannot be written"):
            await store_credentials("r.example", ME)

    async def test_a_logout_forgets_in_all_places(self, places: Path) -> None:
        for place in (places, places.parent / "run/containers"):
            write(place, auths={"r.example": encoded("me", "x")})
        assert await erase_credentials("r.example")
        assert await find_credentials("r.example") is None
        assert len(auth_files()) == 3


class TestHelpers:
    async def test_one_for_a_registry(self, places: Path, helper: Path) -> None:
        write(places, credHelpers={"r.example": "keep"})
        assert await find_credentials("r.example/team/app") is None
        assert await store_credentials("r.example", ME) == "keep"
        assert await find_credentials("r.example/team/app") == ME
        assert await find_credentials("b.example") is None
        assert "se:cret" not in (places / "config.json").read_text()
        assert await erase_credentials("r.example")
        assert await find_credentials("r.example") is None
        log = (helper / "log").read_text().splitlines()
        assert log[0] == "get r.example"
        assert log[-2] == "erase r.example"

    async def test_one_for_everything(self, places: Path, helper: Path) -> None:
        write(places, credsStore="keep", auths={"b.example": encoded("file", "x")})
        await store_credentials("docker.io", ME)
        assert await find_credentials("docker.io/library/alpine") == ME
        assert "get https://index.docker.io/v1/" in (helper / "log").read_text()
        assert await find_credentials("b.example") == Credentials(username="file", password="x")

    async def test_an_identity_token(self, places: Path, helper: Path) -> None:
        write(places, credsStore="keep")
        token = Credentials(identity_token="token")
        await store_credentials("r.example", token)
        assert '"Username": "<token>"' in (helper / "r_example").read_text()
        assert await find_credentials("r.example") == token

    async def test_one_that_is_missing_is_named(self, places: Path) -> None:
        write(places, credsStore="no-such-helper")
        with pytest.raises(ConfigError, match="docker-credential-no-such-helper cannot be run"):
            await find_credentials("r.example")

    @pytest.mark.parametrize(
        ("script", "why"),
        [
            ("echo went wrong >&2; exit 3", r"failed \(3\): went wrong"),
            ("echo '[]'", "makes no sense"),
            ('echo \'{"Username": 5, "Secret": ""}\'', "makes no sense"),
            ("true", "makes no sense"),
            ("printf '\\033[2Jbad' >&2; exit 1", r"failed \(1\): \[2Jbad"),
        ],
    )
    async def test_one_that_fails_says_why(
        self, script: str, why: str, places: Path, helper: Path
    ) -> None:
        program = places.parent / "bin/docker-credential-bad"
        program.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
        program.chmod(0o755)
        write(places, credsStore="bad")
        with pytest.raises(ConfigError, match=why):
            await find_credentials("r.example")

    async def test_cancelling_ends_the_program(self, places: Path, helper: Path) -> None:
        program = places.parent / "bin/docker-credential-slow"
        program.write_text('#!/bin/sh\necho >"$STORE/fifo"\nexec sleep 1000\n')
        program.chmod(0o755)
        os.mkfifo(helper / "fifo")
        write(places, credsStore="slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(find_credentials, "r.example")
            await trio.to_thread.run_sync((helper / "fifo").read_text)
            nursery.cancel_scope.cancel()


def test_a_file_that_is_read_and_written_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"a": {}}, "x": ["\u00e9", 1.5, None]}))
    before = json.loads(file.read_text())
    AuthFile.read(file).write()
    assert json.loads(file.read_text()) == before
