"""The ACPI tables are sound, in our own reading and in that of ACPI's reference compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_supermachine import ConfigError
from trio_supermachine.devices import power
from trio_supermachine.hv.kvm.x86 import aml, layout
from trio_supermachine.hv.kvm.x86.acpi import build_tables

U64 = (1 << 64) - 1


class Reader:
    """Decodes the terms that the encoder knows, into plain values."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.position : self.position + count]
        assert len(piece) == count
        self.position += count
        return piece

    def byte(self) -> int:
        return self.take(1)[0]

    def sized(self) -> Reader:
        """What follows with a length of its own, which counts itself."""
        start = self.position
        lead = self.byte()
        more = lead >> 6
        length = lead & 0x3F
        if more:
            assert not lead & 0x30
            length |= int.from_bytes(self.take(more), "little") << 4
            # The shortest form was chosen.
            assert length - more > 0x3F if more == 1 else length - 1 >= 1 << 4 + 8 * (more - 1)
        return Reader(self.take(length - (self.position - start)))

    def path(self) -> str:
        root = "\\" if self.data[self.position : self.position + 1] == b"\\" else ""
        self.position += len(root)
        lead = self.data[self.position]
        count = {0x00: 0, 0x2E: 2}.get(lead, 1)
        if lead in (0x00, 0x2E, 0x2F):
            self.position += 1
        if lead == 0x2F:
            count = self.byte()
        return root + ".".join(self.take(4).decode() for _ in range(count))

    def all(self) -> list[Any]:
        found = []
        while self.position < len(self.data):
            found.append(self.term())
        return found

    def term(self) -> Any:
        opcode = self.byte()
        if opcode in (0, 1):
            return opcode
        if opcode in (0x0A, 0x0B, 0x0C, 0x0E):
            return int.from_bytes(self.take({0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[opcode]), "little")
        if opcode == 0x0D:
            text = self.data[self.position : self.data.index(0, self.position)]
            self.position += len(text) + 1
            return text.decode()
        if opcode == 0x08:
            return ("name", self.path(), self.term())
        if opcode == 0x11:
            content = self.sized()
            size = content.term()
            data = content.take(len(content.data) - content.position)
            assert size == len(data)
            return data
        if opcode == 0x12:
            content = self.sized()
            count = content.byte()
            items = content.all()
            assert count == len(items)
            return items
        if opcode == 0x10:
            content = self.sized()
            return ("scope", content.path(), content.all())
        assert (opcode, self.byte()) == (0x5B, 0x82)
        content = self.sized()
        return ("device", content.path(), content.all())


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"
segments = st.tuples(
    st.sampled_from(_LETTERS), st.text(_LETTERS + "0123456789", min_size=3, max_size=3)
).map("".join)
paths = st.builds(
    lambda root, names: ("\\" if root else "") + ".".join(names),
    st.booleans(),
    st.lists(segments, min_size=1, max_size=5),
)
leaves = st.one_of(
    st.integers(0, U64).map(lambda value: (aml.integer(value), value)),
    st.text(st.characters(min_codepoint=1, max_codepoint=127)).map(
        lambda text: (aml.string(text), text)
    ),
    st.binary(max_size=80).map(lambda data: (aml.buffer(data), data)),
)
data_objects = st.recursive(
    leaves,
    lambda items: st.lists(items, max_size=6).map(
        lambda found: (aml.package(*(code for code, _ in found)), [value for _, value in found])
    ),
    max_leaves=8,
)
names = st.tuples(paths, data_objects).map(
    lambda pair: (aml.name(pair[0], pair[1][0]), ("name", pair[0], pair[1][1]))
)


def _block(kind: str) -> Any:
    encode = {"scope": aml.scope, "device": aml.device}[kind]

    def strategy(terms: Any) -> Any:
        return st.tuples(paths, st.lists(terms, max_size=5)).map(
            lambda pair: (
                encode(pair[0], *(code for code, _ in pair[1])),
                (kind, pair[0], [value for _, value in pair[1]]),
            )
        )

    return strategy


terms = st.recursive(
    names, lambda inner: _block("scope")(inner) | _block("device")(inner), max_leaves=8
)


@settings(deadline=None, max_examples=50)
@given(st.lists(terms, max_size=4))
def test_what_is_encoded_can_be_read_back(found: list[tuple[bytes, Any]]) -> None:
    code = b"".join(code for code, _ in found)
    assert Reader(code).all() == [value for _, value in found]


@settings(deadline=None)
@given(st.integers(0, (1 << 28) - 5))
def test_a_package_length_counts_itself_in_its_shortest_form(content: int) -> None:
    encoded = aml.package_length(content)
    more = encoded[0] >> 6
    total = (
        int.from_bytes(encoded[1:], "little") << 4 | encoded[0] & 0xF if more else encoded[0] & 0x3F
    )
    assert len(encoded) == 1 + more
    assert total == content + len(encoded)


@settings(deadline=None)
@given(st.integers(0, U64))
def test_integers_are_as_short_as_can_be(value: int) -> None:
    size = len(aml.integer(value))
    assert size == (1 if value < 2 else 2 if value < 256 else 3 if value < 1 << 16 else size)
    assert size <= (5 if value < 1 << 32 else 9)


def test_an_eisa_identifier_is_packed_as_the_specification_has_it() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c 41 d0 05 01")


@pytest.mark.parametrize("path", ["", "lower", "A.", "TOOLONG", "1ABC", "A\\B"])
def test_no_name(path: str) -> None:
    with pytest.raises(ValueError, match="name"):
        aml.name_path(path)


def test_what_cannot_be_encoded_is_refused() -> None:
    for encode, value in (
        (aml.integer, -1),
        (aml.integer, U64 + 1),
        (aml.package_length, 1 << 28),
        (aml.string, "\N{SNOWMAN}"),
        (aml.string, "a\0b"),
        (aml.eisa_id, "PNP050"),
    ):
        with pytest.raises(ValueError, match=r"integer|bytes|string|identifier"):
            encode(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="255 items"):
        aml.package(*(aml.integer(0),) * 256)


def tables(memory_mib: int = 256, vcpus: int = 1) -> dict[bytes, bytes]:
    """The tables by their signatures, found from the RSDP, each with its checksum verified."""
    blob = build_tables(memory_mib, vcpus)
    assert len(blob) <= layout.ACPI_TABLES_SIZE

    def at(address: int) -> bytes:
        start = address - layout.ACPI_TABLES
        assert address % 16 == 0
        assert 0 < start < len(blob)
        (size,) = struct.unpack_from("<I", blob, start + 4)
        table = blob[start : start + size]
        assert len(table) == size
        assert sum(table) & 0xFF == 0
        return table

    assert blob[:8] == b"RSD PTR "
    assert sum(blob[:20]) & 0xFF == 0
    assert sum(blob[:36]) & 0xFF == 0
    xsdt = at(struct.unpack_from("<Q", blob, 24)[0])
    found = {table[:4]: table for (address,) in struct.iter_unpack("<Q", xsdt[36:])
             for table in (at(address),)}  # fmt: skip
    found[b"XSDT"] = xsdt
    found[b"DSDT"] = at(struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


@settings(deadline=None)
@given(st.integers(16, 256 << 10), st.integers(1, layout.MAX_VCPUS))
def test_the_tables_are_found_and_sound_for_every_machine(memory_mib: int, vcpus: int) -> None:
    found = tables(memory_mib, vcpus)
    madt = found[b"APIC"]
    assert [madt[44 + 8 * index : 48 + 8 * index] for index in range(vcpus)] == [
        bytes((0, 8, index, index)) for index in range(vcpus)
    ]
    sleep, (kind, path, devices) = Reader(found[b"DSDT"][36:]).all()
    assert sleep == ("name", "\\_S5_", [power.SLEEP_TYPE_S5, 0, 0, 0])
    assert (kind, path) == ("scope", "\\_SB_")
    processors = [terms for _, name, terms in devices if name.startswith("C0")]
    assert processors == [
        [("name", "_HID", "ACPI0007"), ("name", "_UID", index)] for index in range(vcpus)
    ]
    (bridge,) = (terms for _, name, terms in devices if name == "PCI0")
    resources = {name: value for _, name, value in bridge}["_CRS"]
    low, high = layout.pci_window_64(memory_mib)
    assert struct.pack("<QQQQQ", 0, low, low + high - 1, 0, high) in resources


def test_the_machine_ends_by_port_registers() -> None:
    fadt = tables()[b"FACP"]
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags >> 20 & 1  # hardware-reduced
    assert flags >> 10 & 1  # has a reset register
    for offset, register in ((116, power.RESET), (244, power.SLEEP_CONTROL),
                             (256, power.SLEEP_STATUS)):  # fmt: skip
        space, width, _, _, address = struct.unpack_from("<BBBBQ", fadt, offset)
        assert (space, width, address) == (1, 8, layout.POWER_PORT + register)
    assert fadt[128] == power.RESET_VALUE


@pytest.mark.parametrize("vcpus", [0, layout.MAX_VCPUS + 1])
def test_there_is_a_place_for_so_many_vcpus(vcpus: int) -> None:
    with pytest.raises(ConfigError, match="vCPUs"):
        build_tables(256, vcpus)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs Debian's acpica-tools")
@pytest.mark.parametrize(("memory_mib", "vcpus"), [(256, 1), (128 << 10, 16)])
def test_the_reference_compiler_finds_nothing_wrong(
    tmp_path: Path, memory_mib: int, vcpus: int
) -> None:
    for signature, table in tables(memory_mib, vcpus).items():
        name = signature.decode()
        (tmp_path / f"{name}.dat").write_bytes(table)
        for arguments in (["-d", f"{name}.dat"], ["-oa", "-p", f"{name}.again", f"{name}.dsl"]):
            said = subprocess.run(
                ["iasl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            complaints = [
                line
                for line in (said.stdout + said.stderr).splitlines()
                if any(word in line.lower() for word in ("warning", "error", "invalid", "remark"))
                and "0 Errors, 0 Warnings, 0 Remarks" not in line
            ]
            assert complaints == []
        # Compiled again, the text gives the same table; but the compiler signs what it makes.
        again = (tmp_path / f"{name}.again").with_suffix(".aml").read_bytes()
        assert again[36:] == table[36:]
