"""Manifests and blobs of one repository (OCI distribution specification 1.1, pull)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, NoReturn, final

import attrs
import trio

from ...errors import ImageCorrupt, ImageNotFound, NotSupported, ReferenceInvalid, RegistryError
from ...host.files import offline
from ..blobs import MAX_DOCUMENT
from ..names import show_text
from ..reference import Reference
from .attempts import Attempts
from .blob import BlobStream
from .credentials import Credentials, find_credentials
from .endpoints import Endpoint, endpoint, endpoints_of
from .failures import failure_of, said_by
from .host import Host
from .registries_conf import read_tables, sources_of
from .settings import RegistrySettings
from .tls import contexts_for
from .wire import Answer, open_wire

_ACCEPT: Final = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
_SCHEMA_1: Final = "application/vnd.docker.distribution.manifest.v1+"
_DIGEST = re.compile("sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.ASCII)
_TAG = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


@attrs.frozen
class Document:
    """A manifest or index as the registry gave it.

    :ivar digest: the digest of :attr:`data`.
    """

    media_type: str
    data: bytes = attrs.field(repr=False)
    digest: str


@final
class Registry:
    """A repository in a registry, and its mirrors; :func:`open_registry` makes one.

    Several tasks may call all methods at once, and be cancelled at any time. *Failures* below are
    :exc:`RegistryError` if the registry cannot be reached, refuses, or breaks the protocol;
    :exc:`ImageNotFound` if it does not have what is asked for; and :exc:`ConfigError` if
    credentials for it cannot be read.
    """

    def __init__(self, reference: Reference, hosts: list[Host], settings: RegistrySettings) -> None:
        self._reference = str(reference)
        self._hosts = hosts
        self._settings = settings

    async def resolve(self, tag_or_digest: str) -> str:
        """Ask for the digest that a tag stands for now. Errors are those of :meth:`manifest`."""
        self._check_name(tag_or_digest)
        found = await self._attempts().run(lambda host: self._head(host, tag_or_digest))
        if found is None:  # not all registries answer HEAD
            return (await self.manifest(tag_or_digest)).digest
        return found

    async def manifest(self, tag_or_digest: str) -> Document:
        """Fetch a manifest or index, of at most 8 MiB. It raises failures, too.

        Mirrors that did not have it are not asked for the blobs.

        :raises ImageCorrupt: it has another digest than was asked for, or is too large.
        :raises NotSupported: it is of Docker's schema 1.
        """
        self._check_name(tag_or_digest)
        attempts = self._attempts()
        document = await attempts.run(lambda host: self._get(host, tag_or_digest))
        if attempts.host in self._hosts:
            self._hosts = self._hosts[self._hosts.index(attempts.host) :]
        return document

    @asynccontextmanager
    async def blob(
        self, digest: str, size: int, *, start: int = 0
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Fetch a blob of ``size`` bytes, from ``start`` on, to be read within the block.

        A lost connection is made anew, and goes on from there. There are never more bytes than
        ``size``; the caller checks their digest. Iteration raises failures, and
        :exc:`ImageCorrupt` if the registry has a blob of another size.
        """
        if not _DIGEST.fullmatch(digest) or not 0 <= start <= size:
            raise ImageCorrupt(self._reference, f"{digest[:128]!r} cannot be read from {start} on")
        stream = BlobStream(
            self._attempts(), reference=self._reference, digest=digest, size=size, start=start
        )
        try:
            yield stream
        finally:
            await stream.aclose()

    def _attempts(self) -> Attempts:
        return Attempts(self._hosts, self._settings, self._reference.removeprefix("docker://"))

    def _check_name(self, name: str) -> None:
        if not _TAG.fullmatch(name) and not _DIGEST.fullmatch(name):
            raise ReferenceInvalid(name[:256], "it is neither a tag nor a digest")

    async def _head(self, host: Host, name: str) -> str | None:
        answer = await self._ask(host, "HEAD", name)
        try:
            if answer.status in (401, 403, 404, 408, 429) or answer.status >= 500:
                await self._fail(answer, host, name)
            digest = answer.header("Docker-Content-Digest") or ""
            if answer.status != 200 or not _DIGEST.fullmatch(digest):
                return None
            return name if ":" in name else digest
        finally:
            await answer.aclose()

    async def _get(self, host: Host, name: str) -> Document:
        answer = await self._ask(host, "GET", name)
        try:
            if answer.status != 200:
                await self._fail(answer, host, name)
            data = await answer.read(MAX_DOCUMENT)
            if data is None:
                raise ImageCorrupt(
                    self._reference, f"its manifest has more than {MAX_DOCUMENT >> 20} MiB"
                )
            stated = answer.header("Docker-Content-Digest") or ""
            digest = self._checked(data, name, stated)
            return Document(self._media_type(answer, data), data, digest)
        finally:
            await answer.aclose()

    async def _ask(self, host: Host, method: str, name: str) -> Answer:
        path = f"{host.endpoint.path}/manifests/{name}"
        return await host.request(method, path, {"Accept": _ACCEPT})

    async def _fail(self, answer: Answer, host: Host, name: str) -> NoReturn:
        wanted = f"{host.endpoint.path}{'@' if ':' in name else ':'}{name}"
        if answer.status == 404:
            said = await said_by(answer)
            reason = f"{host.endpoint.name} does not have {wanted}" + (f" ({said})" if said else "")
            raise ImageNotFound(self._reference, f"{reason}; check the reference")
        registry, known = host.endpoint.name, host.authorizer.has_credentials
        raise await failure_of(answer, wanted, registry=registry, known=known)

    def _checked(self, data: bytes, name: str, stated: str) -> str:
        """Check the digest of a document, and give it.

        It is the one by which the document was asked for; for a tag, the one that the registry
        states, or sha256.
        """
        wanted = name if ":" in name else stated if _DIGEST.fullmatch(stated) else ""
        algorithm = wanted.partition(":")[0] or "sha256"
        actual = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        if wanted and actual != wanted:
            raise ImageCorrupt(
                self._reference, f"the manifest {wanted} came with the digest {actual}"
            )
        return actual

    def _media_type(self, answer: Answer, data: bytes) -> str:
        said = (answer.header("Content-Type") or "").partition(";")[0].strip().lower()
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        inner = document.get("mediaType") if isinstance(document, dict) else None
        old = isinstance(document, dict) and document.get("schemaVersion") == 1
        if old or said.startswith(_SCHEMA_1):
            raise NotSupported(
                "docker schema 1",
                f"{self._reference}: its manifest is of Docker's schema 1, which ended in 2017;"
                " push the image anew by a present tool",
            )
        # If the two differ, the one in the document counts: the digest covers it.
        return show_text(inner, 128) if isinstance(inner, str) else show_text(said, 128)


@asynccontextmanager
async def open_registry(
    reference: Reference, *, settings: RegistrySettings | None = None
) -> AsyncIterator[Registry]:
    """Prepare to ask for ``reference``, whose transport is ``docker``. Nothing is sent yet.

    The mirrors of registries.conf are asked in order, then the registry itself. Certificates come
    from ``certs.d``, proxies from the environment, and credentials, once a host asks for them, from
    :func:`find_credentials`. All connections end with the block.

    :raises RegistryError: ``TRIO_SUPERMACHINE_OFFLINE`` or the configuration forbids to ask.
    :raises ConfigError: the configuration is malformed.
    """
    settings = settings or RegistrySettings()
    _refuse_offline(reference.domain or "")
    tables = await trio.to_thread.run_sync(read_tables)
    places = endpoints_of(reference, tables, insecure=settings.insecure)
    async with AsyncExitStack() as stack:
        hosts = [await _open_host(stack, place, settings) for place in places]
        yield Registry(reference, hosts, settings)


async def check_credentials(
    registry: str, credentials: Credentials, *, settings: RegistrySettings | None = None
) -> None:
    """Show ``credentials`` to the registry ``HOST[:PORT]``, as a login does.

    :raises RegistryError: the registry does not take them, or cannot be asked.
    :raises ConfigError: ``registry`` has another form, or the configuration is malformed.
    """
    settings = settings or RegistrySettings()
    _refuse_offline(registry)
    tables = await trio.to_thread.run_sync(read_tables)
    sources, _ = sources_of(registry, tables, by_digest=False)
    place = endpoint(registry, insecure=settings.insecure or sources[-1].insecure)

    async def ask(host: Host) -> None:
        answer = await host.request("GET", "", {})
        try:
            if answer.status != 200:
                raise await failure_of(answer, "the credentials", registry=place.name, known=True)
        finally:
            await answer.aclose()

    async with AsyncExitStack() as stack:
        host = await _open_host(stack, place, settings, credentials)
        await Attempts([host], settings).run(ask)


async def _open_host(
    stack: AsyncExitStack,
    place: Endpoint,
    settings: RegistrySettings,
    credentials: Credentials | None = None,
) -> Host:
    contexts = await trio.to_thread.run_sync(
        lambda: contexts_for(place.name, insecure=place.insecure)
    )
    wire = await stack.enter_async_context(
        open_wire(contexts, stall_timeout=settings.stall_timeout, loopback=place.loopback)
    )
    scope = f"repository:{place.path}:pull" if place.path else None

    async def find() -> Credentials | None:
        return credentials or await find_credentials(f"{place.name}/{place.path}")

    return Host(place, wire, find, scope)


def _refuse_offline(registry: str) -> None:
    if offline():
        raise RegistryError(
            f"TRIO_SUPERMACHINE_OFFLINE forbids to ask {registry}; unset it, or use an image that"
            " is there already",
            registry=registry,
        )
