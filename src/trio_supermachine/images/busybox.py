"""The built-in image: a static BusyBox, and the few files that make a system of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import attrs
import trio

from .._util.process import run_process
from ..errors import AssetNotFound
from ..host import files as hostfiles
from ..host.locks import locked
from ..oci import tar
from ..oci.config import ImageConfig
from ..oci.layer import Sink
from ..oci.layer_info import DirectoryInfo
from ..oci.tar import Entry

CONFIG = ImageConfig(
    env=("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",), cmd=("sh",)
)
_VARIABLE = "TRIO_SUPERMACHINE_BUSYBOX"
_REMEDY = "apt-get install busybox-static"
_RECIPE = b"1"  # to be changed whenever another layer is made of the same program
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
_GROUP = b"root:x:0:\nnobody:x:65534:\n"
_DIRECTORIES = {
    **dict.fromkeys(("bin", "dev", "etc", "proc", "run", "sbin", "sys", "usr", "usr/bin"), 0o755),
    **dict.fromkeys(("usr/local", "usr/local/bin", "usr/local/sbin", "usr/sbin"), 0o755),
    **dict.fromkeys(("mnt", "var", "var/log"), 0o755),
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}


@attrs.frozen
class Busybox:
    """The program, its bytes and its applets, as paths without a leading slash."""

    path: Path
    data: bytes
    applets: tuple[str, ...]

    def fingerprint(self) -> str:
        """Compute a digest of everything that the image's layer is made of."""
        parts = (_RECIPE, hashlib.sha256(self.data).digest(), "\n".join(self.applets).encode())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def write(self, sink: Sink) -> None:
        """Write the image's only layer as a tar stream; its bytes are the same every time."""
        sink.begin(DirectoryInfo())
        for path, mode in sorted(_DIRECTORIES.items()):
            sink.write(tar.header(Entry(path.encode(), tar.DIRECTORY, mode)))
        self._file(sink, b"bin/busybox", self.data, 0o755)
        self._file(sink, b"etc/passwd", _PASSWD, 0o644)
        self._file(sink, b"etc/group", _GROUP, 0o644)
        for applet in self.applets:
            link = Entry(applet.encode(), tar.SYMLINK, 0o777, linkname=b"/bin/busybox")
            sink.write(tar.header(link))
        sink.write(bytes(2 * tar.BLOCK))

    @staticmethod
    def _file(sink: Sink, name: bytes, data: bytes, mode: int) -> None:
        sink.write(tar.header(Entry(name, tar.FILE, mode, size=len(data))))
        sink.write(data)
        sink.write(bytes(-len(data) % tar.BLOCK))


async def find_busybox(downloads: Path) -> Busybox:
    """Find a static BusyBox, or fetch Debian's into ``downloads`` without installing it.

    :raises AssetNotFound: there is none, and none can be fetched.
    """
    if explicit := os.environ.get(_VARIABLE):
        path = Path(explicit)
        if not is_static(path):
            reason = f"{_VARIABLE} is {path}, which is not a static program"
            raise AssetNotFound("busybox", reason, remedy=_REMEDY)
        return await trio.to_thread.run_sync(_load, path)
    fetched = downloads / "busybox"
    for path in (Path("/bin/busybox"), fetched):
        if is_static(path):
            return await trio.to_thread.run_sync(_load, path)
    async with locked(downloads / "lock"):
        if not is_static(fetched):
            hostfiles.sweep(downloads)
            await _fetch(fetched)
    return await trio.to_thread.run_sync(_load, fetched)


def is_static(path: Path) -> bool:
    """Give whether a file is an ELF program of 64 bits that needs no dynamic linker."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return False
            file.seek(int.from_bytes(header[32:40], "little"))
            size, count = (int.from_bytes(header[i : i + 2], "little") for i in (54, 56))
            table = file.read(size * count)
    except (OSError, OverflowError):
        return False
    kinds = {table[i : i + 4] for i in range(0, len(table), size or 1)} if size else set()
    return bool(kinds) and (3).to_bytes(4, "little") not in kinds  # PT_INTERP


def _load(path: Path) -> Busybox:
    try:
        listed = subprocess.run(
            [path, "--list-full"], capture_output=True, check=True, timeout=30, text=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{path} cannot list its applets: {error}"
        raise AssetNotFound("busybox", reason, remedy=_REMEDY) from None
    applets = set()
    for line in listed.split():
        parent, _, name = line.lstrip("/").rpartition("/")
        if parent not in ("bin", "sbin", "usr/bin", "usr/sbin"):
            parent = "bin"
        applets.add(f"{parent}/{name}")
    return Busybox(path, path.read_bytes(), tuple(sorted(applets - {"bin/busybox"})))


async def _fetch(dest: Path) -> None:
    if hostfiles.offline():
        reason = "it is not installed, and TRIO_SUPERMACHINE_OFFLINE forbids downloads"
        raise AssetNotFound("busybox", reason, remedy=_REMEDY)
    tools = [shutil.which("apt-get"), shutil.which("dpkg-deb")]
    if None in tools:
        reason = "it is not installed, and there is no apt-get to download it with"
        raise AssetNotFound(
            "busybox", reason, remedy=f"install a static busybox and set {_VARIABLE} to its path"
        )
    # As root, apt downloads as a user who cannot write here.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=dest.parent) as scratch:
        await _run(["apt-get", *sandbox, "download", "busybox-static"], scratch)
        packages = [name for name in os.listdir(scratch) if name.endswith(".deb")]
        if len(packages) != 1:
            raise AssetNotFound("busybox", "apt-get downloaded nothing", remedy=_REMEDY)
        await _run(["dpkg-deb", "-x", packages[0], "root"], scratch)
        # Where the program is depends on whether the package is from before Debian merged /bin
        # into /usr/bin.
        for place in ("bin", "usr/bin"):
            program = Path(scratch, "root", place, "busybox")
            if is_static(program):
                with hostfiles.new_file(dest) as new:
                    shutil.copy(program, new)
                return
    raise AssetNotFound("busybox", "the package has no static program", remedy=_REMEDY)


async def _run(command: list[str], cwd: str) -> None:
    done = await run_process(
        command, cwd=cwd, check=False, capture_stdout=True, capture_stderr=True
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        reason = f"{' '.join(command[:1])} could not fetch busybox-static: {said}"
        raise AssetNotFound("busybox", reason, remedy=_REMEDY)
