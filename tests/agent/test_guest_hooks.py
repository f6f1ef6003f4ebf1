"""The hooks as programs of BPF: how they come out of the compiler's object file."""

from __future__ import annotations

import runpy
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trio_supermachine import guest

BUILD = runpy.run_path(str(Path(guest.__file__).parent / "build.py"))
hook_programs: Callable[[bytes], Iterator[tuple[str, bytes]]] = BUILD["hook_programs"]

HEAD = """
#define HOOK(name) __attribute__((section("hook." #name), used)) int name
extern char map;
"""

EXIT = bytes((0x95, 0, 0, 0, 0, 0, 0, 0))
LD_IMM64, PSEUDO_MAP_FD = 0x18, 1


def compiled(tmp_path: Path, source: str) -> bytes:
    (tmp_path / "hooks.c").write_text(HEAD + source)
    command = [sys.executable, "-m", "ziglang", "cc", *BUILD["_BPF_FLAGS"], "-c", "hooks.c"]
    subprocess.run([*command, "-o", "hooks.o"], cwd=tmp_path, check=True)
    return (tmp_path / "hooks.o").read_bytes()


def test_each_section_is_a_program_and_refers_to_the_map_as_the_kernel_wants_it(
    tmp_path: Path,
) -> None:
    source = """
    HOOK(one)(void *context) { return (void)context, 1; }
    static void *(*const lookup)(void *map, const void *key) = (void *)1;
    HOOK(two)(int *context) { int key = *context; return lookup(&map, &key) != 0; }
    int other(int a) { return a + 1; }
    """
    programs = dict(hook_programs(compiled(tmp_path, source)))
    assert list(programs) == ["one", "two"]
    for code in programs.values():
        assert len(code) % 8 == 0
        assert code.endswith(EXIT)
    references = [
        instruction[1] >> 4
        for (instruction,) in struct.iter_unpack("8s", programs["two"])
        if instruction[0] == LD_IMM64
    ]
    assert references == [PSEUDO_MAP_FD]


@pytest.mark.parametrize(
    "source",
    [
        "int counter; HOOK(one)(void *context) { return (void)context, ++counter; }",
        "static volatile const int table[2] = {3, 4};"
        "HOOK(one)(int *context) { return table[*context & 1]; }",
        "__attribute__((noinline)) int apart(int a) { return a * a; }"
        "HOOK(one)(int *context) { return apart(*context); }",
    ],
    ids=["variable", "constant", "function"],
)
def test_what_a_hook_cannot_have_fails_the_build(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match="hook"):
        list(hook_programs(compiled(tmp_path, source)))
