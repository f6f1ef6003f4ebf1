"""Layers that are legal, and as odd as the tools of the field make them.

Each case is a function of a directory's name, below which it keeps to itself, so that all of them
fit into one image. It gives its layers as the archives' entries without an end, the lowest first.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .image_files import member

DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
CHR, BLK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
Case = Callable[[str], list[bytes]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__] = make
    return make


def entries(members: Iterable[Any], format: int = tarfile.PAX_FORMAT) -> bytes:
    """The entries of an archive, without its end."""
    out = io.BytesIO()
    archive = tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8")  # noqa: SIM115
    for info, data in members:
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ended(data: bytes) -> bytes:
    """A whole archive of such entries."""
    return data + bytes(2 * tarfile.BLOCKSIZE)


def gnu_tar(files: dict[str, bytes], *options: str) -> bytes:
    """The entries that GNU tar writes for some files, sparse where they have holes."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            os.utime(path, (1_000_000_000, 1_000_000_000))
        Path(directory, "end").write_bytes(b"end")
        names = [*files, "end"]
        command = ["tar", "-C", directory, "--owner=7", "--group=8", "--mode=640", "-cf", "-"]
        made = subprocess.run(
            [*command, "--sparse", "--hole-detection=raw", *options, *names],
            check=True,
            capture_output=True,
        ).stdout
    # The last entry has a body, so what follows that body's block is the archive's end.
    end = made.rindex(b"end") // tarfile.BLOCKSIZE + 1
    return made[: end * tarfile.BLOCKSIZE]


def changed(data: bytes, at: int, field: bytes) -> bytes:
    """An entry with other bytes in its header, and the checksum mended."""
    header = bytearray(data[: tarfile.BLOCKSIZE])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[tarfile.BLOCKSIZE :]


@case
def all_kinds_of_files(top: str) -> list[bytes]:
    return [
        entries(
            [
                member(f"{top}/", DIR),
                member(f"{top}/dir", DIR, mode=0o2751, uid=1000, gid=1001),
                member(f"{top}/dir/file", data=b"content", mode=0o4755, uid=12, gid=34),
                member(f"{top}/sticky", DIR, mode=0o1777),
                member(f"{top}/empty", mode=0),
                member(f"{top}/block", data=bytes(512)),
                member(f"{top}/odd", data=os.urandom(100_001)),
                member(f"{top}/null", CHR, devmajor=1, devminor=3, mode=0o666),
                member(f"{top}/disk", BLK, devmajor=259, devminor=70_000, mode=0o660, gid=6),
                member(f"{top}/pipe", FIFO, mode=0o600),
                member(f"{top}/link", SYM, linkname="dir/file", uid=5, gid=6),
                member(f"{top}/outside", SYM, linkname="/../../etc/passwd"),
                member(f"{top}/dangling", SYM, linkname="x" * 1000),
                member(f"{top}/itself", SYM, linkname="itself"),
                member(f"{top}/before-posix", tarfile.AREGTYPE, data=b"old"),
                member(f"{top}/before-posix-dir/", tarfile.AREGTYPE),
            ]
        )
    ]


@case
def names(top: str) -> list[bytes]:
    odd = ["\N{SNOWMAN}", "new\nline", "back\\slash", "tab\t", " blank ", "-dash", "%2F", "a:b"]
    odd += ["n" * 255, "...", "..a", ".wh", "a.wh.b", "UPPER", "upper"]
    deep = "/".join(["d" * 100] * 15)
    found = [member(f"{top}/{name}", data=name.encode()) for name in odd]
    found += [
        member(f"./{top}/./dotted//name", data=b"d"),
        member(f"{top}/slashed/", data=b"a file, though its name ends in a slash"),
        member(f"/{top}/absolute", data=b"below the root all the same"),
        member(f"//{top}//absolute-dir/", DIR, mode=0o700),
        member(f"{top}/absolute-link", LNK, linkname=f"/{top}/absolute"),
        member(f"{top}/{deep}/end", data=b"deep"),
    ]
    raw = member(f"{top}/not-\udcff\udcfe-utf-8", data=b"bytes")
    return [
        entries(found[:15] + found[16:]) + entries([found[15]]) + entries([raw], tarfile.GNU_FORMAT)
    ]


@case
def gnu_names(top: str) -> list[bytes]:
    long = "/".join(["g" * 90] * 4)
    return [
        entries(
            [
                member(f"{top}/{long}/file", data=b"long"),
                member(f"{top}/link", LNK, linkname=f"{top}/{long}/file"),
                member(f"{top}/sym", SYM, linkname="t/" * 300 + "x"),
                member(f"{top}/{'s' * 60}/{'t' * 90}", data=b"fits into ustar's prefix"),
            ],
            tarfile.GNU_FORMAT,
        )
        + entries([member(f"{top}/{'s' * 70}/{'t' * 90}", data=b"prefix")], tarfile.USTAR_FORMAT)
    ]


@case
def numbers(top: str) -> list[bytes]:
    last = (1 << 32) - 2
    return [
        entries(
            [
                member(f"{top}/pax-owner", uid=last, gid=last - 1),
                member(f"{top}/pax-time", mtime=1234567890.75),
                member(f"{top}/year-2100", mtime=4102444800),
                member(f"{top}/epoch", mtime=0),
            ]
        )
        + entries(
            [
                member(f"{top}/gnu-owner", uid=last, gid=3_000_000),
                member(f"{top}/gnu-old", mtime=-5),
                member(f"{top}/gnu-far", mtime=1 << 40),
            ],
            tarfile.GNU_FORMAT,
        )
        + entries([member(f"{top}/pax-old", mtime=-86400.25)])
        + changed(entries([member(f"{top}/blanks")], tarfile.USTAR_FORMAT), 100, b"   644 \0")
    ]


@case
def sparse_files(top: str) -> list[bytes]:
    holes = bytes(1 << 20)
    files = {
        "ends": b"a" * 4096 + holes + b"z" * 100,
        "hole-last": b"a" * 4096 + holes,
        "hole-first": holes + b"z" * 4097,
        "only-hole": holes,
        "many": b"".join(os.urandom(4096) + bytes(4096 * (n % 5 + 1)) for n in range(40)),
    }
    made = b""
    for version in ("gnu", "0.0", "0.1", "1.0"):
        options = ["--format=gnu"]
        if version != "gnu":
            options = ["--format=posix", f"--sparse-version={version}"]
        options.append(f"--transform=s,^,{top}/{version}/,")
        made += gnu_tar(files, *options)
    return [made]


@case
def hard_links(top: str) -> list[bytes]:
    return [
        entries(
            [
                member(f"{top}/one", data=b"linked", uid=9),
                member(f"{top}/two", LNK, linkname=f"{top}/one"),
                member(f"{top}/d/three", LNK, linkname=f"./{top}/two"),
                member(f"{top}/sym", SYM, linkname="one"),
                member(f"{top}/sym-again", LNK, linkname=f"{top}/sym"),
                member(f"{top}/pipe", FIFO),
                member(f"{top}/pipe-again", LNK, linkname=f"{top}/pipe"),
                member(f"{top}/first", data=b"first"),
                member(f"{top}/second", LNK, linkname=f"{top}/first"),
                member(f"{top}/first", data=b"the second keeps what was first"),
                member(f"{top}/replaced", data=b"to be a link"),
                member(f"{top}/replaced", LNK, linkname=f"{top}/one"),
            ]
        ),
        entries(
            [
                member(f"{top}/.wh.one"),
                member(f"{top}/new", data=b"new"),
                member(f"{top}/newer", LNK, linkname=f"{top}/new"),
            ]
        ),
    ]


@case
def duplicates(top: str) -> list[bytes]:
    return [
        entries(
            [
                member(f"{top}/file", data=b"first"),
                member(f"{top}/file", data=b"second", mode=0o600),
                member(f"{top}/file-then-dir", data=b"f"),
                member(f"{top}/file-then-dir", DIR, mode=0o700),
                member(f"{top}/file-then-dir/in", data=b"in"),
                member(f"{top}/dir-then-file", DIR),
                member(f"{top}/dir-then-file", data=b"f"),
                member(f"{top}/dir-again", DIR, mode=0o700, uid=1),
                member(f"{top}/dir-again/in", data=b"in"),
                member(f"{top}/dir-again", DIR, mode=0o711, uid=2),
                member(f"{top}/link-then-file", SYM, linkname="file"),
                member(f"{top}/link-then-file", data=b"f"),
                member(f"{top}/link-then-dir", SYM, linkname="dir-again"),
                member(f"{top}/link-then-dir", DIR, mode=0o750),
                member(f"{top}/link-then-dir/in", data=b"in"),
                member(f"{top}/null-then-file", CHR, devmajor=1, devminor=3),
                member(f"{top}/null-then-file", data=b"f"),
            ]
        )
    ]


@case
def whiteouts(top: str) -> list[bytes]:
    lower = [member(f"{top}/{name}", data=name.encode()) for name in ("file", "kept", "again")]
    for directory in ("gone", "replaced", "re-created", "opaque", "emptied", "is-file"):
        lower += [
            member(f"{top}/{directory}", DIR, mode=0o710, uid=3),
            member(f"{top}/{directory}/old", data=b"old"),
            member(f"{top}/{directory}/sub/old", data=b"old"),
        ]
    lower += [member(f"{top}/link", SYM, linkname="kept"), member(f"{top}/a/b/c", data=b"c")]
    upper = [
        member(f"{top}/.wh.file"),
        member(f"{top}/.wh.never-was"),
        member(f"{top}/.wh.gone"),
        member(f"{top}/.wh.re-created"),
        member(f"{top}/re-created", DIR, mode=0o700),
        member(f"{top}/re-created/new", data=b"new"),
        member(f"{top}/replaced", DIR, mode=0o755),
        member(f"{top}/replaced/.wh.old"),
        member(f"{top}/replaced/sub/new", data=b"new"),
        member(f"{top}/opaque", DIR, mode=0o701),
        member(f"{top}/opaque/before", data=b"b"),
        member(f"{top}/opaque/.wh..wh..opq"),
        member(f"{top}/opaque/after", data=b"a"),
        member(f"{top}/emptied/.wh..wh..opq"),
        member(f"{top}/.wh.is-file"),
        member(f"{top}/is-file", data=b"a file now"),
        member(f"{top}/.wh.again"),
        member(f"{top}/again", data=b"new"),
        member(f"{top}/.wh.link"),
        member(f"{top}/a/.wh.b"),
    ]
    highest = [
        member(f"{top}/gone/back", data=b"back again"),
        member(f"{top}/file", DIR),
        member(f"{top}/opaque/.wh.before"),
        member(f"{top}/re-created/.wh.new"),
    ]
    return [entries(lower), entries(upper), entries(highest)]


@case
def kinds_that_change_between_layers(top: str) -> list[bytes]:
    kinds: dict[str, dict[str, Any]] = {
        "file": {"data": b"file"},
        "dir": {"kind": DIR, "mode": 0o711},
        "link": {"kind": SYM, "linkname": "nowhere"},
        "null": {"kind": CHR, "devmajor": 1, "devminor": 3},
        "pipe": {"kind": FIFO},
    }
    lower, upper = [], []
    for old in kinds:
        for new in kinds:
            lower.append(member(f"{top}/{old}-{new}", **kinds[old]))
            if old == "dir":
                lower.append(member(f"{top}/{old}-{new}/below", data=b"below"))
            upper.append(member(f"{top}/{old}-{new}", uid=1, **kinds[new]))
    return [entries(lower), entries(upper)]


@case
def extended_attributes(top: str) -> list[bytes]:
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0).decode("latin-1")
    several = {f"SCHILY.xattr.user.{n}": "v" * n for n in range(1, 20)}
    return [
        entries(
            [
                member(f"{top}/", DIR, pax_headers={"SCHILY.xattr.user.top": "dir"}),
                member(f"{top}/user", data=b"u", pax_headers={"SCHILY.xattr.user.a": "ö"}),
                member(f"{top}/empty", data=b"u", pax_headers={"SCHILY.xattr.user.none": ""}),
                member(f"{top}/several", data=b"u", pax_headers=several),
                member(f"{top}/trusted", DIR, pax_headers={"SCHILY.xattr.trusted.t": "t"}),
                member(
                    f"{top}/ping",
                    data=b"p",
                    pax_headers={"SCHILY.xattr.security.capability": capability},
                ),
                member(f"{top}/bsdtar", pax_headers={"LIBARCHIVE.xattr.user.b": "dg=="}),
                member(f"{top}/lower", data=b"l", pax_headers={"SCHILY.xattr.user.l": "1"}),
                member(f"{top}/linked", LNK, linkname=f"{top}/user"),
            ]
        ),
        entries(
            [
                member(f"{top}/lower", data=b"no attributes any more"),
                member(f"{top}/trusted/implied", data=b"i"),
            ]
        ),
    ]


@case
def empty_layers(top: str) -> list[bytes]:
    return [entries([member(f"{top}/file", data=b"f")]), b"", entries([])]


@case
def implied_directories(top: str) -> list[bytes]:
    return [
        entries(
            [
                member(f"{top}/given", DIR, mode=0o2770, uid=11, gid=12),
                member(f"{top}/given/file", data=b"f"),
                member(f"{top}/never/given/file", data=b"f"),
                member(f"{top}/late/file", data=b"f"),
                member(f"{top}/late", DIR, mode=0o700, uid=4),
            ]
        ),
        entries(
            [
                member(f"{top}/given/more", data=b"m"),
                member(f"{top}/late/deeper/more", data=b"m"),
            ]
        ),
    ]


@case
def below_links_of_lower_layers(top: str) -> list[bytes]:
    return [
        entries(
            [
                member(f"{top}/usr/bin", DIR, mode=0o751, uid=9),
                member(f"{top}/usr/bin/sh", data=b"sh"),
                member(f"{top}/bin", SYM, linkname="usr/bin"),
                member(f"{top}/far", SYM, linkname=f"/{top}/bin/../lib"),
                member(f"{top}/out", SYM, linkname=f"../../../../{top}/usr/out"),
                member(f"{top}/replaced", SYM, linkname="usr"),
                member(f"{top}/removed", SYM, linkname="usr"),
                member(f"{top}/later", SYM, linkname="usr"),
            ]
        ),
        entries(
            [
                member(f"{top}/bin/tool", data=b"through a link"),
                member(f"{top}/far/away/file", data=b"through two"),
                member(f"{top}/out/file", data=b"never above the root"),
                member(f"{top}/bin/tool-again", LNK, linkname=f"{top}/bin/tool"),
                member(f"{top}/replaced", DIR),
                member(f"{top}/replaced/in", data=b"a directory of its own"),
                member(f"{top}/.wh.removed"),
                member(f"{top}/.wh.later"),
            ]
        ),
        entries(
            [
                member(f"{top}/bin/.wh.sh"),
                member(f"{top}/replaced/more", data=b"m"),
                member(f"{top}/removed/in", data=b"what it led to is not touched"),
            ]
        ),
    ]


def image_layers(top: str, only: Iterable[str] = ()) -> list[bytes]:
    """The layers of one image with all cases, or some, each below its own directory."""
    made = [CASES[name](f"{top}/{name}") for name in (only or CASES)]
    count = max(map(len, made))
    return [ended(b"".join(layers[n] for layers in made if n < len(layers))) for n in range(count)]
