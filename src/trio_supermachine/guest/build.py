"""Compile the guest program and the host's launcher with the Zig compiler's C front end.

``python src/trio_supermachine/guest/build.py [ARCH...]`` makes ``bin/init-ARCH`` and
``bin/launcher-ARCH`` for ``x86_64`` and ``aarch64``; what is up to date is left alone. The output
is the same, byte for byte, for the same sources and compiler: its digest is part of what a
snapshot depends on.

The guest program is all sources here but those of two rooms. ``host/`` is the launcher.
``bpf/hooks.c`` is compiled to BPF first, and becomes the header ``bpf_hooks.h``: for each section
``hook.NAME`` one array of instructions, ``NAME``. Includes are named from this directory on.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

ARCHITECTURES = ("x86_64", "aarch64")
_HERE = Path(__file__).resolve().parent
_BIN = _HERE / "bin"
_FLAGS = (
    *("-static", "-Os", "-s", "-g0", "-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror"),
    *("-fno-ident", "-Wl,--build-id=none"),  # nothing but what the sources say
    *("-I", "."),
)
_PROGRAMS = ("init", "launcher")
_NOT_OF_INIT = ("bpf/", "host/")

_HOOKS = "bpf/hooks.c"
_HOOKS_HEADER = "bpf_hooks.h"
_HOOK = b"hook."
_VARIABLES = (b".rodata", b".data", b".bss")
_BPF_FLAGS = (
    *("-target", "bpfel-freestanding", "-O2", "-g0", "-std=gnu11"),
    *("-Wall", "-Wextra", "-Werror", "-fno-ident"),
    *("-I", "."),
)
_REL = 9  # SHT_REL
_R_BPF_64_64 = 1
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


def build(architectures: Iterable[str] = ARCHITECTURES) -> list[Path]:
    """Compile what is out of date. Returns the paths of all programs asked for.

    :raises subprocess.CalledProcessError: the compiler failed; it has said why on stderr.
    """
    _BIN.mkdir(exist_ok=True)
    return [
        _build(program, architecture) for architecture in architectures for program in _PROGRAMS
    ]


def sources(program: str) -> list[str]:
    """Files that are compiled for this program, as paths from this directory on."""
    if program == "launcher":
        return _files("host/*.c")
    return [name for name in _files("**/*.c") if not name.startswith(_NOT_OF_INIT)]


def _files(pattern: str) -> list[str]:
    names = (path.relative_to(_HERE).as_posix() for path in _HERE.glob(pattern))
    return sorted(name for name in names if not name.startswith("bin/"))


def _build(program: str, architecture: str) -> Path:
    output = _BIN / f"{program}-{architecture}"
    stamp = _BIN / f".{output.name}.stamp"
    files = sources(program)
    read = [*files, *_files("**/*.h"), _HOOKS] if program == "init" else files
    # Relative names, in this directory: no path of this machine gets into the program.
    command = ["-target", f"{architecture}-linux-musl", *_FLAGS, *files]
    state = _digest([version("ziglang"), *command, *_BPF_FLAGS], read)
    if output.exists() and stamp.exists() and stamp.read_text() == state:
        return output
    with tempfile.TemporaryDirectory(dir=_BIN) as directory:
        fresh = Path(directory, output.name)
        if program == "init":
            _build_hooks(Path(directory))
        _compile(*command, "-I", directory, "-o", str(fresh))
        fresh.chmod(0o755)
        os.replace(fresh, output)
    stamp.write_text(state)
    return output


def _compile(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *arguments], cwd=_HERE, check=True)


def _build_hooks(directory: Path) -> None:
    compiled = directory / "hooks.o"
    _compile(*_BPF_FLAGS, "-c", _HOOKS, "-o", str(compiled))
    lines = []
    for name, code in hook_programs(compiled.read_bytes()):
        words = ", ".join(f"0x{word:016x}" for (word,) in struct.iter_unpack("<Q", code))
        lines.append(f"static const uint64_t {name}[] = {{{words}}};\n")
    (directory / _HOOKS_HEADER).write_text("".join(lines))


def hook_programs(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the programs in a BPF object file: names and instructions, in the order of the file.

    Each may refer to the one map, which the loader puts in. Such an instruction is marked as the
    kernel wants it (``BPF_PSEUDO_MAP_FD``).

    :raises ValueError: a program refers to anything else, as variables or functions.
    """
    sections = _sections(data)
    if any(name.startswith(_VARIABLES) and content for name, _, _, content in sections):
        raise ValueError("hooks have no variables and no constants in memory")
    for index, (name, _, _, content) in enumerate(sections):
        if not name.startswith(_HOOK):
            continue
        code = bytearray(content)
        for _, kind, target, relocations in sections:
            if kind == _REL and target == index:
                for offset, info in struct.iter_unpack("<QQ", relocations):
                    _refer_to_map(code, offset, info)
        yield name.removeprefix(_HOOK).decode(), bytes(code)


def _sections(data: bytes) -> list[tuple[bytes, int, int, bytes]]:
    """Read all sections: name, type, the section that it is about, and content."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQII", data, table + size * i) for i in range(count)]
    names = headers[names_index][4]
    return [
        (data[names + name : data.index(b"\0", names + name)], kind, info, data[at : at + length])
        for name, kind, _, _, at, length, _, info in headers
    ]


def _refer_to_map(code: bytearray, offset: int, info: int) -> None:
    if info & 0xFFFFFFFF != _R_BPF_64_64 or code[offset] != _LD_IMM64:
        raise ValueError("a hook refers to something other than the map")
    code[offset + 1] |= _PSEUDO_MAP_FD << 4


def _digest(words: Iterable[str], files: Iterable[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for name in files:
        content = (_HERE / name).read_bytes()
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _main() -> None:
    wanted = sys.argv[1:] or ARCHITECTURES
    if unknown := set(wanted) - set(ARCHITECTURES):
        sys.exit(f"unknown architecture: {', '.join(sorted(unknown))}")
    for path in build(wanted):
        print(path)


if __name__ == "__main__":
    _main()
