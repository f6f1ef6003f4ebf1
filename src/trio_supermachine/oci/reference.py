"""Image references, in the syntax of containers-transports(5)."""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from pathlib import Path

import attrs

from ..errors import ReferenceInvalid

_MAX = 4096

# Docker's grammar (distribution/reference).
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = (
    rf"(?:{_DOMAIN_COMPONENT}(?:\.{_DOMAIN_COMPONENT})*|\[(?P<address>[0-9a-fA-F:]+)\])"
    r"(?::(?P<port>[0-9]+))?"
)
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DOCKER = re.compile(
    rf"(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>{_TAG}))?(?:@(?P<digest>[^@]+))?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")
#: The names of images in an OCI layout that containers-transports(5) allows.
_LAYOUT_TAG = re.compile(r"[A-Za-z0-9]+(?:[-._:@+/][A-Za-z0-9]+|--[A-Za-z0-9]+)*")
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")


class Transport(StrEnum):
    """A kind of place that images come from. The value is the prefix of its references."""

    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    ROOTFS = "rootfs"
    BUILTIN = "builtin"
    DOCKER = "docker"


LOCAL = tuple(transport for transport in Transport if transport is not Transport.DOCKER)


@attrs.frozen
class Reference:
    """A parsed reference.

    A reference of the transport ``docker`` has the parts of a name as Docker understands it, with
    all defaults.

    :ivar path: for ``docker`` the repository; for a local transport the absolute path, or the
        name of a builtin.
    :ivar tag: for ``docker`` the tag; for a local transport the part behind the path.
    :ivar domain: for ``docker`` the registry, ``HOST[:PORT]``.
    :ivar digest: for ``docker`` the digest.
    """

    transport: Transport
    path: str
    tag: str | None = None
    domain: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse ``text``. Relative paths are taken from the current directory.

        :raises ReferenceInvalid: it does not follow the syntax of any transport.
        """
        if not text or len(text) > _MAX or "\0" in text:
            raise ReferenceInvalid(text[:100], "it is empty, too long or has a NUL")
        prefix, colon, rest = text.partition(":")
        local = {transport.value: transport for transport in LOCAL}.get(prefix)
        if not colon or local is None:
            return _docker(text, rest[2:] if text.startswith("docker://") else text)
        if local is Transport.BUILTIN:
            if rest != "busybox":
                raise ReferenceInvalid(text, "the one builtin image is builtin:busybox")
            return cls(local, rest)
        tag = None
        if local is not Transport.ROOTFS:
            # The path ends at the first colon, as in containers/image.
            rest, colon, tag_text = rest.partition(":")
            tag = tag_text or None
            if colon and tag is None:
                raise ReferenceInvalid(text, "nothing follows the path's colon")
        if not rest:
            raise ReferenceInvalid(text, "the path is missing")
        if tag is not None:
            tag = _local_tag(text, local, tag)
        return cls(local, str(Path(rest).absolute()), tag)

    def __str__(self) -> str:
        if self.transport is not Transport.DOCKER:
            tag = "" if self.tag is None else f":{self.tag}"
            return f"{self.transport.value}:{self.path}{tag}"
        tag = "" if self.tag is None else f":{self.tag}"
        digest = "" if self.digest is None else f"@{self.digest}"
        return f"docker://{self.domain}/{self.path}{tag}{digest}"

    @property
    def familiar(self) -> str:
        """The shortest text that means the same, such as ``alpine:3.20``."""
        text = str(self).removeprefix("docker://")
        for prefix in ("docker.io/library/", "docker.io/"):
            short = text.removeprefix(prefix)
            try:
                if short != text and Reference.parse(short) == self:
                    return short
            except ReferenceInvalid:
                pass
        return text


def normalise_name(name: str) -> str:
    """Give a Docker name with all defaults.

    :raises ReferenceInvalid: it is no name.
    """
    return str(_docker(name, name)).removeprefix("docker://")


def _local_tag(text: str, transport: Transport, tag: str) -> str:
    if transport is Transport.DOCKER_ARCHIVE:
        if tag.startswith("@"):
            if not tag[1:].isdecimal() or not tag.isascii() or len(tag) > 6:
                raise ReferenceInvalid(text, "what follows the @ is not an index")
            return tag
        named = _docker(text, tag)
        if named.digest is not None:
            raise ReferenceInvalid(text, "an archive's image is named by a tag, not by a digest")
        return str(named).removeprefix("docker://")
    if not _LAYOUT_TAG.fullmatch(tag):
        raise ReferenceInvalid(text, f"{tag!r} is not a proper name in a layout")
    return tag


def _is_host(domain: str) -> bool:
    match = re.fullmatch(_DOMAIN, domain)
    if match is None:
        return False
    if match["address"] is not None:
        try:
            ipaddress.IPv6Address(match["address"])
        except ValueError:
            return False
    # Docker's grammar allows ports of any number. Nobody can listen on most of them.
    return match["port"] is None or (len(match["port"]) < 6 and 0 < int(match["port"]) < 65536)


def _docker(text: str, name: str) -> Reference:
    if _IDENTIFIER.fullmatch(name):
        raise ReferenceInvalid(text, "it is an image identifier, not a name")
    domain, slash, rest = name.partition("/")
    if slash and domain in ("", ".", ".."):
        raise ReferenceInvalid(text, "a path is written as oci:DIR, rootfs:DIR or oci-archive:FILE")
    if domain in ("http:", "https:"):
        raise ReferenceInvalid(text, f"names of images begin with a host, without {domain}//")
    if not slash or not (
        "." in domain or ":" in domain or domain == "localhost" or domain != domain.lower()
    ):
        domain, rest = "docker.io", name
    elif not _is_host(domain):
        raise ReferenceInvalid(text, f"{domain!r} is not a registry's host")
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in rest:
        rest = "library/" + rest
    match = _DOCKER.fullmatch(rest)
    if match is None:
        if re.fullmatch(r"[^:@]*[A-Z][^:@]*(?:[:@].*)?", rest):
            raise ReferenceInvalid(text, "repository names are lower case")
        raise ReferenceInvalid(text, "it does not have the form [HOST[:PORT]/]NAME[:TAG][@DIGEST]")
    path, tag, digest = match["path"], match["tag"], match["digest"]
    if len(domain) + 1 + len(path) > 255:
        raise ReferenceInvalid(text, "the repository's name has more than 255 characters")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise ReferenceInvalid(text, f"{digest!r} is not a digest")
    if tag is None and digest is None:
        tag = "latest"
    return Reference(Transport.DOCKER, path, tag, domain, digest)
