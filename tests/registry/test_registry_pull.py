"""Debian's own registry, plain and with TLS, passwords and tokens; and a bad network before it."""

from __future__ import annotations

import gc
import hashlib
import json
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trio_supermachine.errors import ImageCorrupt, ImageNotFound, RegistryError
from trio_supermachine.oci.reference import Reference
from trio_supermachine.oci.registry import (
    Credentials,
    Document,
    Registry,
    RegistrySettings,
    check_credentials,
    find_credentials,
    open_registry,
    store_credentials,
)

from ..support.fault_proxy import Answer, Drop, Fault, Flip, Stall, Trickle, fault_proxy
from ..support.hostile_server import always, hostile_server, reply
from ..support.image_files import Layout, digest_of, make_tar, member
from ..support.registry_server import PASSWORD, USER, RegistryServer
from ..support.token_server import IDENTITY

QUICK = RegistrySettings(attempts=3, backoff=0.001, longest_wait=0.01)
FORMS = ["plain", "tls", "basic", "token"]
LAYER = make_tar([member("data", data=bytes(range(256)) * 8192)])
LAYER_DIGEST = digest_of(LAYER)


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the host has a say."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(tmp_path / "home"))
    configure(tmp_path, monkeypatch, "")


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Write registries.conf."""
    (tmp_path / "registries.conf").write_text(text)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))


@pytest.fixture(scope="session")
def pushed(registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """An image that is ``public/image:one`` and ``private/image:one`` in all registries."""
    layout = Layout(tmp_path_factory.mktemp("layout"))
    image = layout.manifest([LAYER], compress=bytes, **layout.tagged("one"))
    layout.write(image)
    for name in ("public/image:one", "private/image:one"):
        registry.push(f"oci:{layout.path}:one", name)
    small = Layout(tmp_path_factory.mktemp("small"))
    small.write(small.manifest([make_tar([member("x")])], **small.tagged("one")))
    registry.push(f"oci:{small.path}:one", "public/small:one")
    return layout


def digest_in(layout: Layout) -> str:
    """The digest of the layout's one image."""
    index = json.loads((layout.path / "index.json").read_text())
    digest: str = index["manifests"][0]["digest"]
    return digest


def reference(host: str, name: str = "public/image:one") -> Reference:
    return Reference.parse(f"docker://{host}/{name}")


async def read(registry: Registry, digest: str, size: int, start: int = 0) -> bytes:
    got = bytearray()
    async with registry.blob(digest, size, start=start) as chunks:
        async for chunk in chunks:
            got += chunk
    return bytes(got)


async def pull(
    host: str, name: str = "public/image:one", settings: RegistrySettings = QUICK
) -> tuple[Document, list[bytes]]:
    """All of an image: by its tag, the digest of that, and the blobs of that; digests checked."""
    asked = reference(host, name)
    async with open_registry(asked, settings=settings) as registry:
        digest = await registry.resolve(asked.tag or "")
        document = await registry.manifest(digest)
        assert document.digest == digest
        manifest = json.loads(document.data)
        blobs = []
        for described in [manifest["config"], *manifest["layers"]]:
            data = await read(registry, described["digest"], described["size"])
            assert digest_of(data) == described["digest"]
            blobs.append(data)
        return document, blobs


async def log_in(server: RegistryServer) -> None:
    await store_credentials(server.host, Credentials(username=USER, password=PASSWORD))


async def admitted(
    registries: dict[str, RegistryServer], form: str, tmp_path: Path
) -> RegistryServer:
    """Give the registry of this form, when its certificate is trusted and its password stored."""
    server = registries[form]
    if server.ca is not None:
        server.trust(tmp_path / "config")
    if form in ("basic", "token"):
        await log_in(server)
    return server


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    async def test_an_image_is_pulled_whole(
        self,
        form: str,
        registries: dict[str, RegistryServer],
        pushed: Layout,
        tmp_path: Path,
    ) -> None:
        server = await admitted(registries, form, tmp_path)
        document, blobs = await pull(server.host, "private/image:one")
        assert document.digest == digest_in(pushed)
        assert document.data == pushed.file_of(document.digest).read_bytes()
        assert document.media_type == "application/vnd.oci.image.manifest.v1+json"
        assert blobs[-1] == LAYER

    @pytest.mark.parametrize("form", FORMS)
    async def test_what_is_not_there_is_not_found(
        self, form: str, registries: dict[str, RegistryServer], pushed: Layout, tmp_path: Path
    ) -> None:
        server = await admitted(registries, form, tmp_path)
        asked = reference(server.host)
        async with open_registry(asked, settings=QUICK) as registry:
            nothing = "sha256:" + "0" * 64
            for missing in ("two", nothing):
                with pytest.raises(ImageNotFound, match="public/image:one"):
                    await registry.manifest(missing)
                with pytest.raises(ImageNotFound, match="public/image:one"):
                    await registry.resolve(missing)
            with pytest.raises(ImageNotFound, match="does not have its blob"):
                await read(registry, nothing, 10)
        for ask in (pull(server.host, "public/no-such-image:one"),):
            with pytest.raises(ImageNotFound):
                await ask

    async def test_an_index_and_its_media_type(
        self, registry: RegistryServer, tmp_path: Path
    ) -> None:
        layout = Layout(tmp_path / "layout")
        parts = [
            layout.manifest([LAYER], architecture=a, **platform(a)) for a in ("amd64", "arm64")
        ]
        media_type = "application/vnd.oci.image.index.v1+json"
        index = {"schemaVersion": 2, "mediaType": media_type, "manifests": parts}
        layout.write(layout.blob(json.dumps(index).encode(), media_type, **layout.tagged("both")))
        registry.push(f"oci:{layout.path}:both", "public/index:both")
        asked = reference(registry.host, "public/index:both")
        async with open_registry(asked, settings=QUICK) as client:
            found = await client.manifest("both")
            assert found.media_type == index["mediaType"]
            assert json.loads(found.data) == index
            for part in parts:
                assert (await client.manifest(part["digest"])).digest == part["digest"]

    async def test_docker_schema_2_as_skopeo_makes_it(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        target = f"docker://{registry.host}/public/docker:v2s2"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--format=v2s2"]
        source = f"oci:{pushed.path}:one"
        await trio.run_process([*command, "--dest-tls-verify=false", source, target])
        document, _ = await pull(registry.host, "public/docker:v2s2")
        assert document.media_type == "application/vnd.docker.distribution.manifest.v2+json"


def platform(architecture: str) -> dict[str, Any]:
    return {"platform": {"os": "linux", "architecture": architecture}}


class TestAccess:
    async def test_public_images_need_no_password(
        self,
        token_registry: RegistryServer,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
    ) -> None:
        token_registry.trust(tmp_path / "config")
        await pull(token_registry.host, "public/image:one")

    @pytest.mark.parametrize("form", ["basic", "token"])
    async def test_private_ones_do(
        self, form: str, registries: dict[str, RegistryServer], pushed: Layout, tmp_path: Path
    ) -> None:
        server = registries[form]
        server.trust(tmp_path / "config")
        with pytest.raises(RegistryError, match=f"for .*login {server.host}") as caught:
            await pull(server.host, "private/image:one")
        assert caught.value.status == 401

    @pytest.mark.parametrize("form", ["basic", "token"])
    async def test_a_login_is_checked(
        self, form: str, registries: dict[str, RegistryServer], tmp_path: Path
    ) -> None:
        server = registries[form]
        server.trust(tmp_path / "config")
        await check_credentials(server.host, Credentials(username=USER, password=PASSWORD))
        with pytest.raises(RegistryError, match="credentials for it are wrong") as caught:
            await check_credentials(server.host, Credentials(username=USER, password="no"))
        assert caught.value.status == 401

    async def test_an_identity_token_is_as_good_as_a_password(
        self,
        token_registry: RegistryServer,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
    ) -> None:
        token_registry.trust(tmp_path / "config")
        await store_credentials(token_registry.host, Credentials(identity_token=IDENTITY))
        await pull(token_registry.host, "private/image:one")

    @pytest.mark.parametrize("place", ["user", "environment"])
    async def test_a_private_authority_is_trusted_where_it_is_named(
        self,
        place: str,
        tls_registry: RegistryServer,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with pytest.raises(RegistryError, match="not trusted"):
            await pull(tls_registry.host)
        if place == "user":
            tls_registry.trust(tmp_path / "config")
        else:
            monkeypatch.setenv("SSL_CERT_FILE", str(tls_registry.ca))
        await pull(tls_registry.host)

    async def test_insecure_registries_are_those_of_the_configuration(
        self,
        tls_registry: RegistryServer,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        table = f'[[registry]]\nlocation = "{tls_registry.host}"\ninsecure = true\n'
        configure(tmp_path, monkeypatch, table)
        await pull(tls_registry.host)

    async def test_a_client_certificate_is_shown_to_its_registry_alone(
        self, tls_registry: RegistryServer, tmp_path: Path
    ) -> None:
        # Debian's registry shares its certificate and its authority with this server, which
        # wants one of clients, too.
        assert tls_registry.ca is not None
        files = tls_registry.ca.parent
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls_registry.ca))
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        async with hostile_server(always(reply("200 OK", body=b"{}")), context) as server:
            attrs.evolve(tls_registry, host=server.host).trust(tmp_path / "config")
            asked = reference(server.host)
            with pytest.raises(RegistryError):
                async with open_registry(asked, settings=QUICK) as client:
                    await client.manifest("one")
            place = tmp_path / "config/containers/certs.d" / server.host
            (place / "client.cert").write_bytes((files / "cert.pem").read_bytes())
            (place / "client.key").write_bytes((files / "key.pem").read_bytes())
            async with open_registry(asked, settings=QUICK) as client:
                assert (await client.manifest("one")).data == b"{}"


class TestMirrors:
    def conf(self, location: str, *mirrors: str) -> str:
        tables = [f'[[registry]]\nlocation = "{location}"\n']
        tables += [f'[[registry.mirror]]\nlocation = "{mirror}"\n' for mirror in mirrors]
        return "".join(tables)

    async def test_a_mirror_serves_instead_of_the_registry(
        self,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        conf = self.conf("registry.invalid/team", f"{registry.host}/public")
        configure(tmp_path, monkeypatch, conf)
        document, _ = await pull("registry.invalid", "team/image:one")
        assert document.digest == digest_in(pushed)

    async def test_what_a_mirror_lacks_the_registry_gives(
        self,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with AsyncExitStack() as stack:
            lying = await stack.enter_async_context(
                hostile_server(always(reply("200 OK", body=b"{}")))
            )
            broken = await stack.enter_async_context(hostile_server(always(reply("500 Oh"))))
            mirrors = (f"{registry.host}/empty", lying.host, broken.host, "127.0.0.1:1")
            configure(tmp_path, monkeypatch, self.conf(registry.host, *mirrors))
            asked = reference(registry.host, f"public/image@{digest_in(pushed)}")
            async with open_registry(asked, settings=QUICK) as client:
                document = await client.manifest(digest_in(pushed))
                assert document.digest == digest_in(pushed)
                assert await read(client, LAYER_DIGEST, len(LAYER)) == LAYER
            assert lying.of("manifests")
            assert broken.of("manifests")
            assert not lying.of("blobs")

    async def test_a_blob_begun_at_a_mirror_is_finished_by_the_registry(
        self,
        registry: RegistryServer,
        pushed: Layout,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refuse = Answer(on="blobs", status="404 Not Found")
        plan = [Drop(on="blobs", after=100_000), refuse]
        async with (
            fault_proxy(registry.address, plan) as mirror,
            fault_proxy(registry.address) as proxy,
        ):
            configure(tmp_path, monkeypatch, self.conf(proxy.host, mirror.host))
            async with open_registry(reference(proxy.host), settings=QUICK) as client:
                await client.manifest("one")
                assert await read(client, LAYER_DIGEST, len(LAYER)) == LAYER
            assert mirror.count("blobs") == 2
            assert proxy.count("blobs") == 1
            assert proxy.count("manifests") == 0

    async def test_the_last_error_is_the_registrys_own(
        self, registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configure(tmp_path, monkeypatch, self.conf(registry.host, "127.0.0.1:1"))
        with pytest.raises(ImageNotFound, match=registry.host):
            await pull(registry.host, "public/nothing:one")


class TestNetwork:
    @pytest.mark.parametrize(
        "fault",
        [
            Drop(),
            Drop(after=1),
            Drop(after=100),
            Drop(after=1000),
            Answer(status="429 Too Many Requests", headers=("Retry-After: 0",)),
            Answer(status="503 Service Unavailable"),
            Answer(status="502 Bad Gateway", body=b"<html>"),
            Answer(status="408 Request Timeout"),
            Answer(status="500 Internal Server Error"),
        ],
    )
    @pytest.mark.parametrize("on", ["HEAD", "manifests/sha256", "blobs"])
    async def test_one_fault_is_nothing(
        self, on: str, fault: Fault, registry: RegistryServer, pushed: Layout
    ) -> None:
        fault = attrs.evolve(fault, on=on)
        async with fault_proxy(registry.address, [fault]) as proxy:
            document, _ = await pull(proxy.host)
            assert not proxy.plan
            assert document.digest == digest_in(pushed)

    async def test_a_blob_in_a_hundred_pieces_is_whole(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        step = len(LAYER) // 100
        plan = [Drop(on="blobs", after=step) for _ in range(110)]
        async with (
            fault_proxy(registry.address, plan) as proxy,
            open_registry(reference(proxy.host), settings=QUICK) as client,
        ):
            assert await read(client, LAYER_DIGEST, len(LAYER)) == LAYER
            assert proxy.count("blobs") > 90

    async def test_too_many_faults_without_an_advance_are_an_error(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        plan = [Drop(on="blobs", after=10) for _ in range(50)]
        async with fault_proxy(registry.address, plan) as proxy:
            with pytest.raises(RegistryError, match="broke the connection"):
                await pull(proxy.host)
            assert proxy.count("blobs") == QUICK.attempts

    @pytest.mark.parametrize("on", ["HEAD", "manifests/sha256", "blobs"])
    @pytest.mark.parametrize("after", [0, 50, 600])
    async def test_a_stall_is_given_up_and_made_good(
        self, on: str, after: int, registry: RegistryServer, pushed: Layout
    ) -> None:
        patient = attrs.evolve(QUICK, stall_timeout=1)
        async with fault_proxy(registry.address, [Stall(on=on, after=after)]) as proxy:
            document, _ = await pull(proxy.host, settings=patient)
            assert document.digest == digest_in(pushed)

    async def test_a_changed_manifest_is_corrupt(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        # The head of the answer has less than 600 bytes; a byte of the body is another one.
        plan = [Flip(on="manifests/sha256", after=650)]
        async with fault_proxy(registry.address, plan) as proxy:
            with pytest.raises(ImageCorrupt, match="came with the digest"):
                await pull(proxy.host)

    async def test_a_changed_blob_is_given_as_it_came(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        plan = [Flip(on="blobs", after=100_000)]
        async with (
            fault_proxy(registry.address, plan) as proxy,
            open_registry(reference(proxy.host), settings=QUICK) as client,
        ):
            got = await read(client, LAYER_DIGEST, len(LAYER))
        assert len(got) == len(LAYER)
        assert hashlib.sha256(got).hexdigest() != LAYER_DIGEST[7:]

    async def test_a_slow_network_is_no_fault(
        self, registry: RegistryServer, pushed: Layout
    ) -> None:
        plan = [Trickle(on="manifests/sha256", piece=50), Trickle(on="blobs", piece=50)]
        async with fault_proxy(registry.address, plan) as proxy:
            await pull(proxy.host)
            assert proxy.count("blobs") == 2

    async def test_a_reader_that_takes_its_time_is_no_stall(
        self, registry: RegistryServer, pushed: Layout, autojump_clock: trio.testing.MockClock
    ) -> None:
        autojump_clock.autojump_threshold = 0.3
        async with open_registry(reference(registry.host)) as client:
            got = bytearray()
            async with client.blob(LAYER_DIGEST, len(LAYER)) as chunks:
                async for chunk in chunks:
                    got += chunk
                    if len(got) == len(chunk):
                        await trio.sleep(1000)
        assert bytes(got) == LAYER

    @pytest.mark.parametrize("start", [1, 1000, len(LAYER) - 1])
    async def test_a_part_that_is_there_is_not_pulled_again(
        self, start: int, registry: RegistryServer, pushed: Layout
    ) -> None:
        async with open_registry(reference(registry.host), settings=QUICK) as client:
            assert await read(client, LAYER_DIGEST, len(LAYER), start) == LAYER[start:]

    async def test_blobs_come_at_once(self, registry: RegistryServer, pushed: Layout) -> None:
        async with open_registry(reference(registry.host), settings=QUICK) as client:
            got: list[bytes] = []

            async def one() -> None:
                got.append(await read(client, LAYER_DIGEST, len(LAYER)))

            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(one)
        assert got == [LAYER] * 6

    @pytest.mark.parametrize("form", ["plain", "token"])
    async def test_cancelling_anywhere_leaves_nothing_behind(
        self, form: str, registries: dict[str, RegistryServer], pushed: Layout, tmp_path: Path
    ) -> None:
        # The claim is that of the fixture which looks for files that stay open. The garbage
        # collector would complain, too: about sockets and generators.
        server = await admitted(registries, form, tmp_path)
        finished = False
        for steps in range(2000):
            with trio.CancelScope() as scope, _countdown(scope, steps):
                await pull(server.host, "public/small:one")
                finished = True
            if finished:
                break
        gc.collect()
        assert finished


class _Countdown(trio.abc.Instrument):
    """Cancels a scope when a task has been scheduled some times."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, steps: int) -> None:
        self._task = task
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left < 0:
                self._scope.cancel()


@contextmanager
def _countdown(scope: trio.CancelScope, steps: int) -> Iterator[None]:
    countdown = _Countdown(trio.lowlevel.current_task(), scope, steps)
    trio.lowlevel.add_instrument(countdown)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(countdown)


async def test_credentials_are_looked_for_only_when_they_are_asked_for(
    registry: RegistryServer, pushed: Layout, tmp_path: Path
) -> None:
    (tmp_path / "auth.json").write_text("nonsense")
    with pytest.raises(Exception, match="not a JSON object"):
        await find_credentials(registry.host)
    await pull(registry.host)
