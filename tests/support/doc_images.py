"""The images that the documentation speaks of, in a registry that stands for Docker's.

Their names are those of the real ones, and their content is Debian's: what the documentation shows
goes through the same doors.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from trio_supermachine.host import files as hostfiles

from .image_files import Layout, digest_of, make_tar, member
from .registry_server import RegistryPlace

_POSTGRES = """\
#!/bin/bash
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
export LC_ALL=C
install -d -o postgres /srv/data /run/postgresql
runuser -u postgres -- initdb --auth=trust --no-sync --encoding=UTF8 /srv/data
exec runuser -u postgres -- postgres -D /srv/data -c listen_addresses=0.0.0.0
"""

_WEB = """\
#!/bin/sh
echo it works >/srv/index.html
exec httpd -f -p {port} -h /srv
"""

#: Images in the registry: those of Docker's, and one of a company's own.
_IN_THE_REGISTRY = {
    "alpine": "library/alpine:3.20",
    "python": "library/python:3.12-slim",
    "postgres": "library/postgres:16",
    "web": "library/nginx:1.27",
    "tool": "team/app:1.4",
}

_REGISTRIES = """\
[[registry]]
location = "docker.io"

[[registry.mirror]]
location = "{host}"

[[registry]]
prefix = "registry.example.com"
location = "{host}"
"""

_OCI = "application/vnd.oci.image"


@attrs.frozen
class Surroundings:
    """What the documentation's programs find: images by name, and directories of their own."""

    layouts: Path
    home: Path
    registries_conf: Path

    def enter(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Go to ``directory`` in these surroundings."""
        for layout in self.layouts.iterdir():
            (directory / layout.name).symlink_to(layout)
        monkeypatch.chdir(directory)
        monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(self.home))
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(self.registries_conf))
        (directory / ".docker").mkdir()
        (directory / ".docker/config.json").write_text("{}")
        monkeypatch.setenv("DOCKER_CONFIG", str(directory / ".docker"))
        programs = Path(shutil.which("trio-supermachine") or sys.executable).parent
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def _applets() -> list[str]:
    listed = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split() if name != "busybox"]


def _busybox(path: Path, config: dict[str, object], script: str = "") -> Path:
    """An image of busybox, the same bytes each time."""
    members = [member(name, tarfile.DIRTYPE) for name in ("bin", "etc", "root", "srv", "tmp")]
    members.append(member("bin/busybox", data=Path("/bin/busybox").read_bytes(), mode=0o755))
    for name in _applets():
        members.append(member(f"bin/{name}", tarfile.SYMTYPE, linkname="busybox"))
    members.append(member("etc/os-release", data=b'PRETTY_NAME="Small Linux"\n'))
    members.append(member("etc/passwd", data=b"root:x:0:0::/root:/bin/sh\n"))
    members.append(member("bin/serve", data=script.encode(), mode=0o755))
    layout = Layout(path)
    manifest = layout.manifest([make_tar(members)], config=config, **layout.tagged("latest"))
    layout.write(manifest)
    return path


def _debian(base: Path, path: Path, config: dict[str, object], script: str = "") -> Path:
    """The Debian of :mod:`network_images` with another configuration, and a script of its own."""
    source, layout = Layout(base), Layout(path)
    index = json.loads((base / "index.json").read_bytes())
    manifest = json.loads(source.file_of(index["manifests"][0]["digest"]).read_bytes())
    document = json.loads(source.file_of(manifest["config"]["digest"]).read_bytes())
    (path / "blobs/sha256").mkdir(parents=True)
    for layer in manifest["layers"]:
        os.link(source.file_of(layer["digest"]), layout.file_of(layer["digest"]))
    tar = make_tar([member("usr/local/bin/serve", data=script.encode(), mode=0o755)])
    layer = layout.blob(gzip.compress(tar, mtime=0), f"{_OCI}.layer.v1.tar+gzip")
    document["config"] = config
    document["rootfs"]["diff_ids"].append(digest_of(tar))
    document.pop("history", None)
    manifest["layers"].append(layer)
    manifest["config"] = layout.blob(json.dumps(document).encode(), f"{_OCI}.config.v1+json")
    described = layout.blob(
        json.dumps(manifest).encode(), f"{_OCI}.manifest.v1+json", **layout.tagged("latest")
    )
    layout.write(described)
    return path


def _make_layouts(directory: Path, debian: Path) -> None:
    serve: dict[str, object] = {"Cmd": ["serve"]}
    _busybox(directory / "alpine", {"Cmd": ["sh"]})
    _busybox(directory / "web", {**serve, "ExposedPorts": {"80/tcp": {}}}, _WEB.format(port=80))
    _busybox(directory / "webapp", serve, _WEB.format(port=8000))
    _busybox(directory / "tool", serve, "#!/bin/sh\nexec sleep 1000000\n")
    _debian(debian, directory / "python", {"Cmd": ["python3"]})
    _debian(debian, directory / "postgres", {**serve, "ExposedPorts": {"5432/tcp": {}}}, _POSTGRES)


@pytest.fixture(scope="session")
def surroundings(
    network_layout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Surroundings]:
    """A data directory that is kept from run to run as long as the images are the same."""
    kept = hostfiles.home() / "test-docs"
    layouts = kept / "layouts"
    shutil.rmtree(layouts, ignore_errors=True)
    layouts.mkdir(parents=True)
    _make_layouts(layouts, network_layout)
    digest = hashlib.sha256()
    for layout in sorted(layouts.iterdir()):
        digest.update((layout / "index.json").read_bytes())
    home = kept / digest.hexdigest()[:12]
    for other in kept.iterdir():
        if other not in (layouts, home):
            shutil.rmtree(other)
    if not home.exists():
        home.mkdir()
        (home / "kernels").symlink_to(hostfiles.home() / "kernels")
    conf = tmp_path_factory.mktemp("containers") / "registries.conf"
    with RegistryPlace.new(tmp_path_factory.mktemp("registry")).plain() as registry:
        for stored, name in _IN_THE_REGISTRY.items():
            registry.push(f"oci:{layouts / stored}:latest", name)
        conf.write_text(_REGISTRIES.format(host=registry.host))
        yield Surroundings(layouts, home, conf)
