"""Registries that lie, leak, loop, stall and flood: each is a typed error, and soon."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from trio_supermachine.errors import (
    ImageCorrupt,
    ImageNotFound,
    NotSupported,
    RegistryError,
    SupermachineError,
)
from trio_supermachine.oci.reference import Reference
from trio_supermachine.oci.registry import (
    Credentials,
    Document,
    RegistrySettings,
    check_credentials,
    open_registry,
    store_credentials,
)

from ..support.hostile_server import Handler, HostileServer, Request, always, hostile_server, reply

QUICK = RegistrySettings(attempts=3, backoff=0.001, longest_wait=0.01)
DATA = bytes(range(256)) * 400
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
MANIFEST = json.dumps(
    {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
).encode()
MANIFEST_DIGEST = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()
BASIC = {"WWW-Authenticate": 'Basic realm="r"'}


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the host has a say."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRIO_SUPERMACHINE_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    (tmp_path / "registries.conf").write_text("")


@pytest.fixture
def idle_clock() -> trio.testing.MockClock:
    """Time jumps to the next deadline when nothing has moved for a moment."""
    return trio.testing.MockClock(autojump_threshold=0.1)


def reference(server: HostileServer) -> Reference:
    return Reference.parse(f"docker://{server.host}/some/image:tag")


async def manifest(
    server: HostileServer, name: str = "tag", settings: RegistrySettings = QUICK
) -> Document:
    async with open_registry(reference(server), settings=settings) as registry:
        return await registry.manifest(name)


async def resolve(server: HostileServer, settings: RegistrySettings = QUICK) -> str:
    async with open_registry(reference(server), settings=settings) as registry:
        return await registry.resolve("tag")


async def blob(
    server: HostileServer,
    size: int = len(DATA),
    start: int = 0,
    settings: RegistrySettings = QUICK,
) -> bytes:
    got = b""
    async with (
        open_registry(reference(server), settings=settings) as registry,
        registry.blob(DIGEST, size, start=start) as chunks,
    ):
        async for chunk in chunks:
            got += chunk
            assert len(got) <= size - start
    return got


class TestDocuments:
    async def test_one_with_another_digest_is_corrupt(self) -> None:
        async with hostile_server(always(reply("200 OK", body=MANIFEST))) as server:
            assert (await manifest(server, MANIFEST_DIGEST)).data == MANIFEST
            with pytest.raises(ImageCorrupt, match="came with the digest"):
                await manifest(server, DIGEST)

    async def test_a_registry_that_contradicts_itself_is_corrupt(self) -> None:
        headers = {"Docker-Content-Digest": DIGEST}
        async with hostile_server(always(reply("200 OK", headers, MANIFEST))) as server:
            with pytest.raises(ImageCorrupt, match="came with the digest"):
                await manifest(server)

    async def test_sha512_is_understood(self) -> None:
        digest = "sha512:" + hashlib.sha512(MANIFEST).hexdigest()
        async with hostile_server(always(reply("200 OK", body=MANIFEST))) as server:
            assert (await manifest(server, digest)).digest == digest
            with pytest.raises(ImageCorrupt):
                await manifest(server, "sha512:" + "0" * 128)

    async def test_a_hundred_megabytes_are_not_read(self) -> None:
        sent = 0

        async def flood(request: Request, stream: trio.abc.Stream) -> None:
            nonlocal sent
            await stream.send_all(reply("200 OK", {"Content-Length": str(100 << 20)}))
            for _ in range(100):
                await stream.send_all(bytes(1 << 20))
                sent += 1

        async with hostile_server(flood) as server:
            with pytest.raises(ImageCorrupt, match="more than 8 MiB"):
                await manifest(server)
        assert sent < 50

    async def test_one_that_is_cut_is_asked_for_again(self) -> None:
        async def cut(request: Request, stream: trio.abc.Stream) -> None:
            whole = reply("200 OK", body=MANIFEST)
            await stream.send_all(whole if len(server.of("manifests")) > 2 else whole[:-10])

        async with hostile_server(cut) as server:
            assert (await manifest(server)).data == MANIFEST

    async def test_the_media_type_inside_counts(self) -> None:
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        async with hostile_server(always(reply("200 OK", headers, MANIFEST))) as server:
            found = await manifest(server)
        assert found.media_type == "application/vnd.oci.image.manifest.v1+json"

    async def test_without_one_inside_the_header_does(self) -> None:
        headers = {"Content-Type": "Application/vnd.oci.image.index.v1+json; x=y"}
        async with hostile_server(always(reply("200 OK", headers, b"{}"))) as server:
            found = await manifest(server)
        assert found.media_type == "application/vnd.oci.image.index.v1+json"

    @pytest.mark.parametrize("body", [b"\xff\xfe", b"[" * 100_000, b"", b"[]", b'{"mediaType":1}'])
    async def test_what_is_no_manifest_is_the_readers_affair(self, body: bytes) -> None:
        async with hostile_server(always(reply("200 OK", body=body))) as server:
            found = await manifest(server)
        assert found.data == body
        assert found.digest == "sha256:" + hashlib.sha256(body).hexdigest()

    async def test_schema_1_is_refused_by_name(self) -> None:
        body = json.dumps({"schemaVersion": 1, "signatures": []}).encode()
        async with hostile_server(always(reply("200 OK", body=body))) as server:
            with pytest.raises(NotSupported, match="schema 1"):
                await manifest(server)

    @pytest.mark.parametrize("name", ["", "../../x", "a b", "sha256:1", "x" * 129, "a\r\nb"])
    async def test_impossible_names_are_not_asked_for(self, name: str) -> None:
        async with hostile_server(always(reply("200 OK"))) as server:
            with pytest.raises(SupermachineError, match="neither a tag nor a digest"):
                await manifest(server, name)
            assert not server.requests


class TestResolving:
    async def test_a_registry_without_head_is_asked_by_get(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            if request.method == "HEAD":
                await stream.send_all(reply("405 Method Not Allowed"))
            else:
                await stream.send_all(reply("200 OK", body=MANIFEST))

        async with hostile_server(handle) as server:
            assert await resolve(server) == MANIFEST_DIGEST

    @pytest.mark.parametrize("digest", ["", "sha256:xyz", "md5:" + "0" * 32, "sha256:" + "A" * 64])
    async def test_a_digest_that_is_none_is_not_taken(self, digest: str) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            body = b"" if request.method == "HEAD" else MANIFEST
            headers = {"Docker-Content-Digest": digest}
            await stream.send_all(reply("200 OK", headers, body))

        async with hostile_server(handle) as server:
            assert await resolve(server) == MANIFEST_DIGEST


class TestBlobs:
    async def test_a_connection_that_is_cut_goes_on_where_it_was(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            start = 0
            if given := request.headers.get("range"):
                assert given.endswith(f"-{len(DATA) - 1}")
                start = int(given[6:].partition("-")[0])
            headers = {"Content-Length": str(len(DATA) - start)}
            status = "200 OK"
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
                status = "206 Partial Content"
            await stream.send_all(reply(status, headers) + DATA[start : start + 5000])

        async with hostile_server(handle) as server:
            assert await blob(server) == DATA
            # Far more requests than attempts: each advanced.
            assert len(server.of("blobs")) == -(-len(DATA) // 5000)

    async def test_a_registry_without_ranges_is_read_from_the_beginning(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            end = 30_000 * len(server.of("blobs"))
            head = reply("200 OK", {"Content-Length": str(len(DATA))})
            await stream.send_all(head + DATA[:end])

        async with hostile_server(handle) as server:
            assert await blob(server, start=10_000) == DATA[10_000:]

    async def test_a_blob_that_is_all_there_is_not_asked_for(self) -> None:
        async with hostile_server(always(reply("500 No"))) as server:
            assert await blob(server, start=len(DATA)) == b""
            assert await blob(server, size=0) == b""
            assert not server.of("blobs")

    @pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
    async def test_another_length_is_corrupt_at_once(self, size: int) -> None:
        async with hostile_server(always(reply("200 OK", body=DATA))) as server:
            with pytest.raises(ImageCorrupt, match=f"not {size}"):
                await blob(server, size)
            assert len(server.of("blobs")) == 1

    async def test_an_endless_body_is_corrupt(self) -> None:
        async def endless(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                await stream.send_all(b"1000\r\n" + bytes(0x1000) + b"\r\n")

        async with hostile_server(endless) as server:
            with pytest.raises(ImageCorrupt, match="goes on after"):
                await blob(server)

    async def test_one_byte_too_many_is_corrupt(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            await stream.send_all(head + b"%x\r\n%b\r\n" % (len(DATA), DATA))
            await stream.send_all(b"1\r\nx\r\n0\r\n\r\n")

        async with hostile_server(handle) as server:
            with pytest.raises(ImageCorrupt, match="goes on after"):
                await blob(server)

    async def test_a_body_that_ends_early_and_well_is_corrupt(self) -> None:
        chunk = b"5\r\nhello\r\n0\r\n\r\n"
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
        async with hostile_server(always(answer)) as server:
            with pytest.raises(ImageCorrupt, match="ends after 5 of"):
                await blob(server)
            assert len(server.of("blobs")) == QUICK.attempts

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"},
            {"Content-Range": "bytes 100-200/200"},
            {"Content-Range": "garbage"},
        ],
    )
    async def test_a_wrong_range_is_corrupt(self, headers: dict[str, str]) -> None:
        async with hostile_server(always(reply("206 Partial Content", headers, DATA))) as server:
            with pytest.raises(ImageCorrupt):
                await blob(server, start=100)

    async def test_a_range_beyond_the_end_is_corrupt(self) -> None:
        async with hostile_server(always(reply("416 Range Not Satisfiable"))) as server:
            with pytest.raises(ImageCorrupt, match="has less than"):
                await blob(server, start=100)

    async def test_an_encoding_is_not_undone(self) -> None:
        # A bomb in an encoding nobody asked for must not be decompressed.
        answer = reply("200 OK", {"Content-Encoding": "gzip"}, DATA)
        async with hostile_server(always(answer)) as server:
            assert await blob(server) == DATA
            assert server.of("blobs")[0].headers["accept-encoding"] == "identity"

    async def test_stopping_early_closes_the_connection(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(reply("200 OK", {"Content-Length": str(1 << 30)}))
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                while True:
                    await stream.send_all(bytes(65536))
            closed.set()

        closed = trio.Event()
        async with hostile_server(handle) as server:
            async with (
                open_registry(reference(server), settings=QUICK) as registry,
                registry.blob(DIGEST, 1 << 30) as chunks,
            ):
                async for _ in chunks:
                    break
            await closed.wait()

    async def test_an_error_in_the_block_is_the_callers_own(self) -> None:
        async with hostile_server(always(reply("200 OK", body=DATA))) as server:
            with pytest.raises(ZeroDivisionError):
                async with (
                    open_registry(reference(server), settings=QUICK) as registry,
                    registry.blob(DIGEST, len(DATA)) as chunks,
                ):
                    async for _ in chunks:
                        raise ZeroDivisionError


class TestTime:
    async def test_silence_is_given_up(self, idle_clock: trio.testing.MockClock) -> None:
        async def silent(request: Request, stream: trio.abc.Stream) -> None:
            await trio.sleep_forever()

        async with hostile_server(silent) as server:
            began = trio.current_time()
            with pytest.raises(RegistryError, match="next to nothing for 30 s"):
                await manifest(server, settings=RegistrySettings(attempts=2))
            assert 60 <= trio.current_time() - began < 62

    async def test_silence_within_a_blob_is_given_up(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        async def stalls(request: Request, stream: trio.abc.Stream) -> None:
            head = reply("200 OK", {"Content-Length": str(len(DATA))})
            await stream.send_all(head + DATA[:100])
            await trio.sleep_forever()

        async with hostile_server(stalls) as server:
            with pytest.raises(RegistryError, match="next to nothing"):
                await blob(server, settings=RegistrySettings(attempts=2))
            assert [r.headers.get("range") for r in server.of("blobs")] == [
                None,
                f"bytes=100-{len(DATA) - 1}",
            ]

    async def test_a_trickle_is_as_good_as_silence(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        async def trickle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(reply("200 OK", {"Content-Length": str(len(DATA))}))
            for byte in DATA:
                await stream.send_all(bytes([byte]))
                await trio.sleep(5)

        async with hostile_server(trickle) as server:
            with pytest.raises(RegistryError, match="next to nothing"):
                await blob(server, settings=RegistrySettings(attempts=2))
            with pytest.raises(RegistryError, match="next to nothing"):
                await manifest(server, settings=RegistrySettings(attempts=2))

    async def test_a_trickle_into_the_last_moment_is_as_good_as_silence(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        async def trickle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(reply("200 OK", {"Content-Length": str(len(DATA))}))
            await trio.sleep(1)
            await stream.send_all(DATA[:1])
            idle_clock.jump(31)  # the byte is there, and so is the end of the time for it
            await trio.sleep_forever()

        async with hostile_server(trickle) as server:
            with pytest.raises(RegistryError, match="next to nothing"):
                await blob(server, settings=RegistrySettings(attempts=2))

    async def test_a_trickle_of_headers_is_as_good_as_silence(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        async def trickle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(b"HTTP/1.1 200 OK\r\n")
            while True:
                await stream.send_all(b"X: y\r\n")
                await trio.sleep(5)

        async with hostile_server(trickle) as server:
            with pytest.raises(RegistryError, match="next to nothing"):
                await manifest(server, settings=RegistrySettings(attempts=2))

    async def test_a_document_may_not_take_for_ever(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        async def slow(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(reply("200 OK", {"Content-Length": str(4 << 20)}))
            while True:
                await stream.send_all(bytes(2048))
                await trio.sleep(25)

        async with hostile_server(slow) as server:
            began = trio.current_time()
            with pytest.raises(RegistryError, match="for 600 s"):
                await manifest(server, settings=RegistrySettings(attempts=1))
            assert 600 <= trio.current_time() - began < 601

    @pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
    async def test_the_pause_that_a_server_asks_for_is_made(
        self, status: str, idle_clock: trio.testing.MockClock
    ) -> None:
        async def busy(request: Request, stream: trio.abc.Stream) -> None:
            first = len(server.of("manifests")) == 1
            answer = reply(status, {"Retry-After": "7"}) if first else reply("200 OK", {}, MANIFEST)
            await stream.send_all(answer)

        async with hostile_server(busy) as server:
            await manifest(server, settings=RegistrySettings())
            first, second = (request.at for request in server.of("manifests"))
            assert 7 <= second - first < 8

    async def test_a_pause_of_a_year_is_cut(self, idle_clock: trio.testing.MockClock) -> None:
        busy = reply("429 Too Many Requests", {"Retry-After": "31536000"})
        async with hostile_server(always(busy)) as server:
            began = trio.current_time()
            with pytest.raises(RegistryError, match="try later") as caught:
                await manifest(server, settings=RegistrySettings(attempts=3))
            assert caught.value.status == 429
            assert 120 <= trio.current_time() - began < 122

    async def test_waiting_can_be_cancelled(self) -> None:
        async def busy(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(reply("429 Too Many Requests", {"Retry-After": "50"}))
            asked.set()

        asked = trio.Event()
        async with hostile_server(busy) as server, trio.open_nursery() as nursery:
            nursery.start_soon(partial(manifest, server, settings=RegistrySettings()))
            await asked.wait()
            nursery.cancel_scope.cancel()


class TestStatuses:
    @pytest.mark.parametrize(
        ("status", "remedy"),
        [
            (400, "check the reference"),
            (401, "login"),
            (403, "login"),
            (408, "try later"),
            (429, "try later"),
            (500, "try later"),
            (599, "try later"),
        ],
    )
    async def test_each_is_an_error_with_a_remedy(self, status: int, remedy: str) -> None:
        body = json.dumps({"errors": [{"code": "X", "message": "it is\nraining\x1b[2J"}]}).encode()
        async with hostile_server(always(reply(f"{status} Oh", {}, body))) as server:
            for ask in (manifest, blob):
                with pytest.raises(RegistryError, match=remedy) as caught:
                    await ask(server)
                assert caught.value.status == status
                assert server.host in str(caught.value)
                assert "it is raining" in str(caught.value)
                assert "\x1b" not in str(caught.value)
            with pytest.raises(SupermachineError):
                await resolve(server)

    async def test_not_found_names_the_reference(self) -> None:
        body = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN"}]}).encode()
        async with hostile_server(always(reply("404 Not Found", {}, body))) as server:
            for ask in (manifest, blob, resolve):
                with pytest.raises(ImageNotFound) as caught:
                    await ask(server)
                assert str(reference(server)) in str(caught.value)

    @pytest.mark.parametrize(
        "body",
        [
            b"\xff",
            b"<html>",
            b"[]",
            b'{"errors": 1}',
            b'{"errors": [1, {"message": []}]}',
            b'{"errors": [{"message": "' + b"x" * 100_000,
        ],
    )
    async def test_a_body_that_makes_no_sense_is_left_out(self, body: bytes) -> None:
        async with hostile_server(always(reply("403 No", {}, body))) as server:
            with pytest.raises(RegistryError) as caught:
                await manifest(server)
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"\0" * 1000,
            b"HTTP/1.1 999999 x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
            b"HTTP/1.1 200 OK\r\nX" + b"x" * 200_000,
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"HTTP/1.1 302 Found\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
        ],
    )
    async def test_what_is_no_http_is_an_error(self, answer: bytes) -> None:
        async with hostile_server(always(answer)) as server:
            for ask in (manifest, blob, resolve):
                with pytest.raises(SupermachineError):
                    await ask(server)

    async def test_nobody_there(self) -> None:
        async with hostile_server(always(b"")) as server:
            pass
        with pytest.raises(RegistryError) as caught:
            await manifest(server)
        said = str(caught.value)
        image = f"{server.host}/some/image:tag"
        unreachable = f"its registry ({server.host}) cannot be reached ("
        assert said.startswith(f"{image} cannot be pulled: {unreachable}")
        assert "the network and HTTPS_PROXY" in said
        assert said.endswith(", or load it from a file: trio-supermachine load")
        assert caught.value.registry == server.host

    async def test_a_name_that_does_not_exist(self) -> None:
        nowhere = Reference.parse("docker://registry.invalid/x")
        with pytest.raises(RegistryError, match="cannot be reached"):
            async with open_registry(nowhere, settings=QUICK) as registry:
                await registry.manifest("latest")

    async def test_offline_nothing_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRIO_SUPERMACHINE_OFFLINE", "1")
        async with hostile_server(always(reply("200 OK"))) as server:
            with pytest.raises(RegistryError, match="TRIO_SUPERMACHINE_OFFLINE"):
                await manifest(server)
            with pytest.raises(RegistryError, match="TRIO_SUPERMACHINE_OFFLINE"):
                await check_credentials(server.host, Credentials())
            assert not server.requests


def redirect(target: str, **headers: str) -> bytes:
    return reply("307 Temporary Redirect", {"Location": target, **headers})


class TestRedirects:
    async def test_one_to_another_host_takes_no_password_along(self) -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(
                hostile_server(always(reply("200 OK", body=DATA)))
            )

            async def handle(request: Request, stream: trio.abc.Stream) -> None:
                if "authorization" not in request.headers:
                    await stream.send_all(reply("401 Unauthorized", BASIC))
                else:
                    await stream.send_all(redirect(f"http://{other.host}/x?signature=1"))

            server = await stack.enter_async_context(hostile_server(handle))
            await store_credentials(server.host, Credentials(username="me", password="secret"))
            assert await blob(server) == DATA
            wanted = "Basic " + base64.b64encode(b"me:secret").decode()
            assert server.of("blobs")[-1].headers["authorization"] == wanted
            [there] = other.requests
            assert "authorization" not in there.headers
            assert "cookie" not in there.headers
            assert "secret" not in repr(there)

    async def test_back_home_the_password_is_sent_again(self) -> None:
        async with AsyncExitStack() as stack:

            async def elsewhere(request: Request, stream: trio.abc.Stream) -> None:
                await stream.send_all(redirect(f"http://{server.host}/home"))

            async def handle(request: Request, stream: trio.abc.Stream) -> None:
                if "authorization" not in request.headers:
                    await stream.send_all(reply("401 Unauthorized", BASIC))
                elif request.target == "/home":
                    await stream.send_all(reply("200 OK", body=DATA))
                else:
                    await stream.send_all(redirect(f"http://{other.host}/x"))

            other = await stack.enter_async_context(hostile_server(elsewhere))
            server = await stack.enter_async_context(hostile_server(handle))
            await store_credentials(server.host, Credentials(username="me", password="secret"))
            assert await blob(server) == DATA
            assert "authorization" not in other.requests[0].headers

    async def test_a_challenge_from_elsewhere_gets_nothing(self) -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(
                hostile_server(always(reply("401 Unauthorized", BASIC)))
            )
            server = await stack.enter_async_context(
                hostile_server(always(redirect(f"http://{other.host}/x")))
            )
            for host in (server.host, other.host):
                await store_credentials(host, Credentials(username="me", password="secret"))
            with pytest.raises(RegistryError):
                await blob(server)
            assert all("authorization" not in request.headers for request in other.requests)

    async def test_a_loop_ends(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(redirect("/b" if request.target != "/b" else "/a"))

        async with hostile_server(handle) as server:
            with pytest.raises(RegistryError, match="in circles"):
                await manifest(server)
            assert len(server.requests) < 6

    async def test_an_endless_chain_ends(self) -> None:
        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            await stream.send_all(redirect(f"/{len(server.requests)}"))

        async with hostile_server(handle) as server:
            with pytest.raises(RegistryError, match="too often"):
                await manifest(server)
            assert len(server.requests) < 15

    @pytest.mark.parametrize(
        "target",
        [
            "file:///etc/passwd",
            "ftp://example.com/x",
            "",
            "http://",
            "http://[::z]/",
            "http://user:password@127.0.0.1/",
            "http://127.0.0.1:99999/",
            "javascript:1",
            "//",
            "http://" + "a" * 300 + ".invalid/",
            "http://\xff\xfe/",
        ],
    )
    async def test_impossible_targets_are_refused(self, target: str) -> None:
        answer = redirect(target).decode().encode("latin-1")
        async with hostile_server(always(answer)) as server:
            for ask in (manifest, blob, resolve):
                with pytest.raises(RegistryError):
                    await ask(server)


def bearer(realm: str, **more: str) -> dict[str, str]:
    parameters = ",".join(f'{k}="{v}"' for k, v in {"realm": realm, **more}.items())
    return {"WWW-Authenticate": f"Bearer {parameters}"}


class TestTokens:
    def server(self, tokens: Any, *, accept: str = "good", **challenge: str) -> Handler:
        """A registry that is its own token server; ``tokens`` gives the answer to a request."""

        async def handle(request: Request, stream: trio.abc.Stream) -> None:
            if request.path == "/token":
                await stream.send_all(tokens(request))
            elif request.headers.get("authorization") == f"Bearer {accept}":
                await stream.send_all(reply("200 OK", body=MANIFEST))
            else:
                realm = f"http://{request.headers['host']}/token"
                await stream.send_all(reply("401 Unauthorized", bearer(realm, **challenge)))

        return handle

    @staticmethod
    def token(text: object, **more: object) -> bytes:
        return reply("200 OK", body=json.dumps({"token": text, **more}).encode())

    async def test_a_token_is_asked_for_once(self) -> None:
        handler = self.server(lambda request: self.token("good"), service="s")
        async with hostile_server(handler) as server:
            async with open_registry(reference(server), settings=QUICK) as registry:
                for _ in range(3):
                    await registry.manifest("tag")
            [asked] = server.of("/token")
            assert asked.query == {"service": "s", "scope": "repository:some/image:pull"}
            assert "authorization" not in asked.headers

    async def test_many_tasks_ask_for_one_token(self) -> None:
        handler = self.server(lambda request: self.token("good"))
        async with hostile_server(handler) as server:
            async with (
                open_registry(reference(server), settings=QUICK) as registry,
                trio.open_nursery() as nursery,
            ):
                for _ in range(8):
                    nursery.start_soon(registry.manifest, "tag")
            assert len(server.of("/token")) == 1

    async def test_nothing_but_to_pull_is_ever_asked_for(self) -> None:
        scope = "repository:other/private:pull,push repository:x:delete"
        handler = self.server(lambda request: self.token("good"), scope=scope)
        async with hostile_server(handler) as server:
            await manifest(server)
            [asked] = server.of("/token")
            assert asked.query["scope"] == "repository:some/image:pull"

    async def test_one_that_has_expired_is_replaced(
        self, idle_clock: trio.testing.MockClock
    ) -> None:
        handler = self.server(lambda request: self.token("good", expires_in=300))
        async with hostile_server(handler) as server:
            async with open_registry(reference(server)) as registry:
                await registry.manifest("tag")
                await trio.sleep(200)
                await registry.manifest("tag")
                assert len(server.of("/token")) == 1
                await trio.sleep(200)
                await registry.manifest("tag")
                assert len(server.of("/token")) == 2
            # The new one was there before the registry could refuse the old.
            assert len(server.of("manifests")) == 4

    async def test_one_that_is_refused_early_is_replaced(self) -> None:
        tokens = iter(["stale", "good"])
        handler = self.server(lambda request: self.token(next(tokens)))
        async with hostile_server(handler) as server:
            assert (await manifest(server)).data == MANIFEST

    async def test_a_registry_that_is_never_content_is_refused(self) -> None:
        handler = self.server(lambda request: self.token("bad"))
        async with hostile_server(handler) as server:
            with pytest.raises(RegistryError, match="login") as caught:
                await manifest(server)
            assert caught.value.status == 401
            assert len(server.requests) < 10

    async def test_a_password_goes_to_the_token_server_alone(self) -> None:
        handler = self.server(lambda request: self.token("good"))
        async with hostile_server(handler) as server:
            await store_credentials(server.host, Credentials(username="me", password="secret"))
            await manifest(server)
            basic = "Basic " + base64.b64encode(b"me:secret").decode()
            assert [r.headers.get("authorization") for r in server.of("/token")] == [basic]
            sent = {r.headers.get("authorization") for r in server.of("manifests")}
            assert sent == {None, "Bearer good"}

    async def test_an_identity_token_goes_by_post(self) -> None:
        def tokens(request: Request) -> bytes:
            assert request.method == "POST"
            form = dict(pair.split("=") for pair in request.body.decode().split("&"))
            assert form["refresh_token"] == "identity"
            assert form["grant_type"] == "refresh_token"
            return reply("200 OK", body=b'{"access_token": "good", "refresh_token": "x"}')

        async with hostile_server(self.server(tokens)) as server:
            await store_credentials(server.host, Credentials(identity_token="identity"))
            assert (await manifest(server)).data == MANIFEST

    async def test_a_redirect_of_the_token_server_takes_no_password_along(self) -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(hostile_server(always(self.token("good"))))
            handler = self.server(lambda request: redirect(f"http://{other.host}/stolen"))
            server = await stack.enter_async_context(hostile_server(handler))
            await store_credentials(server.host, Credentials(username="me", password="secret"))
            await manifest(server)
            assert "authorization" not in other.requests[0].headers

    @pytest.mark.parametrize("code", [301, 307, 308])
    async def test_an_identity_token_is_not_redirected(self, code: int) -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(hostile_server(always(self.token("good"))))
            answer = reply(f"{code} Go", {"Location": f"http://{other.host}/stolen"})
            server = await stack.enter_async_context(
                hostile_server(self.server(lambda request: answer))
            )
            await store_credentials(server.host, Credentials(identity_token="identity"))
            with pytest.raises(RegistryError):
                await manifest(server)
            assert not other.requests

    @pytest.mark.parametrize(
        "realm",
        ["", "x", "file:///etc/passwd", "http://me:you@127.0.0.1/", "http://[::z]/", "https://"],
    )
    async def test_a_token_server_that_is_none_is_refused(self, realm: str) -> None:
        answer = reply("401 Unauthorized", bearer(realm))
        async with hostile_server(always(answer)) as server:
            with pytest.raises(RegistryError, match="token server"):
                await manifest(server)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"{}",
            b'{"token": 1}',
            b'{"token": "a\\r\\nX: y"}',
            b'{"token": "\\u00e9"}',
            b'{"token": ""}',
            b'{"token": "' + b"x" * 100_000 + b'"}',
            b"[" * 100_000,
            b" " * (2 << 20),
        ],
    )
    async def test_a_token_that_is_none_is_refused(self, body: bytes) -> None:
        handler = self.server(lambda request: reply("200 OK", body=body))
        async with hostile_server(handler) as server:
            with pytest.raises(RegistryError, match="gives no token"):
                await manifest(server)

    @pytest.mark.parametrize("life", [-5, 0, 1, "x", None, 1e300, True, [1]])
    async def test_any_stated_life_will_do(self, life: object) -> None:
        handler = self.server(lambda request: self.token("good", expires_in=life))
        async with hostile_server(handler) as server:
            assert (await manifest(server)).data == MANIFEST

    async def test_a_busy_token_server_is_tried_again(self) -> None:
        def tokens(request: Request) -> bytes:
            busy = len(server.of("/token")) < 3
            return reply("503 Busy") if busy else self.token("good")

        async with hostile_server(self.server(tokens)) as server:
            assert (await manifest(server)).data == MANIFEST

    async def test_wrong_passwords_are_said_to_be(self) -> None:
        handler = self.server(lambda request: reply("401 Unauthorized"))
        async with hostile_server(handler) as server:
            await store_credentials(server.host, Credentials(username="me", password="wrong"))
            with pytest.raises(RegistryError, match="credentials for it are wrong") as caught:
                await manifest(server)
            assert caught.value.status == 401
            assert "wrong:" not in str(caught.value)

    @pytest.mark.parametrize(
        "challenge", ["", "Basic", "Digest realm=x", "Bearer", "=", 'Bearer realm="', "Negotiate"]
    )
    async def test_challenges_that_cannot_be_met_are_refusals(self, challenge: str) -> None:
        answer = reply("401 Unauthorized", {"WWW-Authenticate": challenge})
        async with hostile_server(always(answer)) as server:
            with pytest.raises(RegistryError):
                await manifest(server)


class TestEncryption:
    @pytest.fixture
    def context(self, tmp_path: Path) -> ssl.SSLContext:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        return context

    def trust(self, server: HostileServer, tmp_path: Path) -> None:
        place = tmp_path / "config/containers/certs.d" / server.host
        place.mkdir(parents=True)
        (tmp_path / "ca.pem").rename(place / "ca.crt")

    async def test_an_unknown_authority_is_refused_without_a_password(
        self, context: ssl.SSLContext
    ) -> None:
        async with hostile_server(always(reply("200 OK", body=MANIFEST)), context) as server:
            with pytest.raises(RegistryError, match=r"certs\.d"):
                await manifest(server)
            assert not server.requests

    async def test_insecure_is_asked_for(self, context: ssl.SSLContext) -> None:
        settings = RegistrySettings(insecure=True)
        async with hostile_server(always(reply("200 OK", body=MANIFEST)), context) as server:
            assert (await manifest(server, settings=settings)).data == MANIFEST

    async def test_a_redirect_to_plain_http_is_refused(
        self, context: ssl.SSLContext, tmp_path: Path
    ) -> None:
        async with AsyncExitStack() as stack:
            plain = await stack.enter_async_context(
                hostile_server(always(reply("200 OK", body=DATA)))
            )
            server = await stack.enter_async_context(
                hostile_server(always(redirect(f"http://{plain.host}/x")), context)
            )
            self.trust(server, tmp_path)
            with pytest.raises(RegistryError, match="plain HTTP"):
                await blob(server)
            assert not plain.requests

    async def test_a_malformed_authority_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("nonsense")
        async with hostile_server(always(reply("200 OK"))) as server:
            self.trust(server, tmp_path)
            with pytest.raises(SupermachineError, match=r"ca\.crt is not a certificate"):
                await manifest(server)


class TestProxies:
    async def test_loopback_needs_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        async with hostile_server(always(reply("200 OK", body=MANIFEST))) as server:
            assert (await manifest(server)).data == MANIFEST

    async def test_others_are_asked_through_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def proxy(request: Request, stream: trio.abc.Stream) -> None:
            allowed = request.method != "CONNECT"
            await stream.send_all(reply("200 OK", {}, MANIFEST) if allowed else reply("403 No"))

        asked = Reference.parse("docker://registry.invalid/some/image:tag")
        async with hostile_server(proxy) as server:
            for name in ("HTTP_PROXY", "HTTPS_PROXY"):
                monkeypatch.setenv(name, f"http://{server.host}")
            with pytest.raises(RegistryError, match=r"through the proxy \(403 No\)"):
                async with open_registry(asked, settings=QUICK) as registry:
                    await registry.manifest("tag")
            insecure = '[[registry]]\nlocation = "registry.invalid"\ninsecure = true'
            (tmp_path / "registries.conf").write_text(insecure)
            async with open_registry(asked, settings=QUICK) as registry:
                assert (await registry.manifest("tag")).data == MANIFEST
            assert server.requests[-1].target.startswith("http://registry.invalid/v2/some/image/")

    @pytest.mark.parametrize("proxy", ["nonsense", "socks5://127.0.0.1:1", "http://[::z]"])
    async def test_one_that_is_none_is_an_error(
        self, proxy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ALL_PROXY", proxy)
        asked = Reference.parse("docker://registry.invalid/some/image:tag")
        with pytest.raises(SupermachineError):
            async with open_registry(asked, settings=QUICK) as registry:
                await registry.manifest("tag")
