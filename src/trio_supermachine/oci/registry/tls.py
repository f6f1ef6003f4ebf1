"""TLS contexts, with the certificates that Docker and Podman keep for each registry.

``HOST[:PORT]/`` below ``certs.d`` has ``*.crt`` files of authorities that are trusted beside the
system's, and pairs ``NAME.cert`` and ``NAME.key`` to show to the registry.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Final

import attrs
import httpx

from ...errors import ConfigError
from .registries_conf import config_home

_SYSTEM: Final = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))


@attrs.frozen
class Contexts:
    """TLS contexts for one registry.

    :ivar own: for the registry itself.
    :ivar others: for servers that it redirects to. They are not shown our certificate.
    """

    own: ssl.SSLContext
    others: ssl.SSLContext


def contexts_for(host: str, *, insecure: bool) -> Contexts:
    """Make the contexts for ``HOST[:PORT]``. This reads files.

    :raises ConfigError: a certificate cannot be used.
    """
    directory = _directory(host)
    authorities = [] if directory is None else _named(directory, ".crt")
    ours = [] if directory is None else _named(directory, ".cert")
    own = others = _context(authorities, insecure)
    if ours:
        others = _context(authorities, insecure)
    for file in ours:
        _show(own, file, file.with_suffix(".key"))
    return Contexts(own, others)


def _directory(host: str) -> Path | None:
    for place in (config_home() / "containers/certs.d", *_SYSTEM):
        if (place / host).is_dir():
            return place / host
    return None


def _named(directory: Path, suffix: str) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == suffix)
    except OSError as exc:
        raise ConfigError(f"{directory} cannot be read: {exc.strerror}") from exc


def _context(authorities: list[Path], insecure: bool) -> ssl.SSLContext:
    paths = ssl.get_default_verify_paths()  # SSL_CERT_FILE and SSL_CERT_DIR are in it
    if paths.cafile or (paths.capath and os.listdir(paths.capath)):
        context = ssl.create_default_context()
    else:  # a host without any authorities, such as a small container
        context = httpx.create_ssl_context(trust_env=False)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for file in authorities:
        _load(context, file)
    return context


def _load(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"{file} is not a certificate to trust (PEM): {exc}") from exc


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        # An empty password, or OpenSSL would ask for it on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError, ValueError) as exc:
        raise ConfigError(f"{certificate} and {key} are no certificate and key: {exc}") from exc
