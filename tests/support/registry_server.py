"""Debian's ``docker-registry`` on loopback, in four forms that serve the same images.

All registries of one :class:`RegistryPlace` serve what one of them has been pushed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import trustme

USER, PASSWORD = "reader", "secret"
# bcrypt of PASSWORD, the one kind that docker-registry takes.
_HTPASSWD = "$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
_PATIENCE = 60


@attrs.frozen
class RegistryServer:
    """A running registry: ``host`` is ``127.0.0.1:PORT``."""

    host: str
    storage: Path
    ca: Path | None = None

    @property
    def address(self) -> tuple[str, int]:
        name, _, port = self.host.rpartition(":")
        return name, int(port)

    def push(self, source: str, name: str) -> str:
        """Copy an image, such as ``oci:DIR:TAG``, to ``NAME:TAG`` here; give its reference."""
        assert self.ca is None, "push to the plain registry: they share their images"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--all", "--preserve-digests"]
        target = f"docker://{self.host}/{name}"
        subprocess.run([*command, "--dest-tls-verify=false", source, target], check=True)
        return target

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        algorithm, _, text = digest.partition(":")
        blobs = self.storage / "docker/registry/v2/blobs"
        return blobs / algorithm / text[:2] / text / "data"

    def trust(self, config_home: Path) -> None:
        """Have programs with this ``XDG_CONFIG_HOME`` trust the registry's CA."""
        assert self.ca is not None
        place = config_home / "containers/certs.d" / self.host
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.ca, place / "ca.crt")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server from when it listens on ``port`` until the block ends."""
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        yield
    finally:
        server.kill()
        server.wait()


@attrs.frozen
class RegistryPlace:
    """A directory that registries share, and the CA that vouches for them."""

    path: Path
    authority: trustme.CA

    @classmethod
    def new(cls, path: Path) -> RegistryPlace:
        place = cls(path, trustme.CA())
        place.authority.cert_pem.write_to_path(str(place.ca))
        issued = place.authority.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(str(path / "key.pem"))
        (path / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return place

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    @contextmanager
    def plain(self) -> Iterator[RegistryServer]:
        """Serve plain HTTP, to anybody. :meth:`RegistryServer.push` puts an image there."""
        with self._run("plain", tls=False) as server:
            yield server

    @contextmanager
    def tls(self) -> Iterator[RegistryServer]:
        """Serve HTTPS by a private CA, whose certificate is :attr:`RegistryServer.ca`."""
        with self._run("tls", tls=True) as server:
            yield server

    @contextmanager
    def basic(self) -> Iterator[RegistryServer]:
        """Serve HTTPS to who knows :data:`USER` and :data:`PASSWORD`."""
        file = self.path / "htpasswd"
        file.write_text(f"{USER}:{_HTPASSWD}\n")
        auth = {"htpasswd": {"realm": "tests", "path": str(file)}}
        with self._run("basic", tls=True, auth=auth) as server:
            yield server

    @contextmanager
    def token(self) -> Iterator[RegistryServer]:
        """Serve HTTPS to who has a token of a separate server, which knows the same user."""
        port = free_port()
        program = Path(__file__).with_name("token_server.py")
        command = [sys.executable, os.fspath(program), str(port), os.fspath(self.path)]
        auth = {
            "realm": f"https://127.0.0.1:{port}/token",
            "service": "tests",
            "issuer": "token_server",
            "rootcertbundle": str(self.ca),
        }
        with (
            serving(command, port, self.path / "tokens.log"),
            self._run("token", tls=True, auth={"token": auth}) as server,
        ):
            yield server

    @contextmanager
    def _run(self, name: str, *, tls: bool, auth: Any = None) -> Iterator[RegistryServer]:
        port = free_port()
        http: dict[str, Any] = {"addr": f"127.0.0.1:{port}", "secret": "shared"}
        if tls:
            key = {"certificate": str(self.path / "cert.pem"), "key": str(self.path / "key.pem")}
            http["tls"] = key
        storage = self.path / "storage"
        config = {
            "version": 0.1,
            "log": {"accesslog": {"disabled": True}, "level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(storage)}},
            "http": http,
        }
        if auth is not None:
            config["auth"] = auth
        file = self.path / f"{name}.yml"
        file.write_text(json.dumps(config))  # YAML contains JSON
        command = ["docker-registry", "serve", str(file)]
        with serving(command, port, self.path / f"{name}.log"):
            yield RegistryServer(f"127.0.0.1:{port}", storage, self.ca if tls else None)
