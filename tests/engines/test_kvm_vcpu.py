"""A vCPU's thread: exits reach its handlers whole; it stands or stops whatever the guest does."""

from __future__ import annotations

import os
import signal
import struct
import threading
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..support.tiny_guest import (
    CODE,
    DATA,
    ExitHandlers,
    Mode,
    Seen,
    VcpuExit,
    VcpuThread,
    code_out,
    enter_mode,
    halt_loop,
    open_kvm,
    out_loop,
    spin,
    tiny_guest,
)

pytestmark = pytest.mark.lab

MODES: tuple[Mode, ...] = ("real", "protected", "long")
HOLE = 0x1000_0000  # no memory there

# What a guest may do for ever.
STUBBORN = {
    "spins": spin,
    "halts": halt_loop,
    "resets": bytes.fromhex("b0 fe e6 64 eb fc"),  # mov al, 0xfe; out 0x64, al; again
    "sleeps with interrupts off": bytes.fromhex("fa f4 eb fc"),
}


def _left_behind() -> tuple[int, int, list[str]]:
    return (
        len(os.listdir("/proc/self/fd")),
        Path("/proc/self/maps").read_text().count("kvm-vcpu"),
        [thread.name for thread in threading.enumerate() if thread.name.startswith("vcpu")],
    )


async def _run(code: bytes, mode: Mode, last_port: int = 0xEE) -> Seen:
    """Run until the guest writes to ``last_port``; returns what it did before."""
    seen = Seen()
    with tiny_guest(code + code_out(last_port) + spin, mode) as guest:
        thread = VcpuThread(guest.vcpu, seen.handlers())
        seen.stop_at(last_port, thread.stop)
        with trio.fail_after(60):
            assert await thread.run() == VcpuExit("stopped")
    assert seen.calls.pop()[1] == last_port
    return seen


@pytest.mark.parametrize("mode", MODES)
async def test_port_accesses_of_every_size_have_their_values(mode: Mode) -> None:
    wide = b"" if mode == "real" else b"\x66"  # operand size: the other of 16 and 32 bits
    wider = b"\x66" if mode == "real" else b""
    code = b"\xe4\x70" + code_out(0x71)  # in al, 0x70
    code += wide + b"\xe5\x70" + wide + b"\xe7\x71"  # in ax; out ax
    code += wider + b"\xe5\x70" + wider + b"\xe7\x71"  # in eax; out eax
    seen = await _run(code, mode)
    assert seen.calls == [
        *(("in", 0x70, 1, 0x11), ("out", 0x71, 1, 0x11)),
        *(("in", 0x70, 2, 0x2211), ("out", 0x71, 2, 0x2211)),
        *(("in", 0x70, 4, 0x4433_2211), ("out", 0x71, 4, 0x4433_2211)),
    ]


@pytest.mark.parametrize(("size", "opcode"), [(1, b"\x6e"), (2, b"\x66\x6f"), (4, b"\x6f")])
async def test_a_repeated_output_is_one_call_for_each_item(size: int, opcode: bytes) -> None:
    count = 3000 // size  # of more than two pages of the shared buffer, in all sizes together
    code = b"\xbe" + struct.pack("<I", CODE) + b"\xb9" + struct.pack("<I", count)
    prefix, opcode = opcode[:-1], opcode[-1:]
    code += b"\x66\xba\x34\x12\xfc" + prefix + b"\xf3" + opcode  # mov dx, 0x1234; cld; rep outs
    seen = await _run(code, "long")
    program = code + code_out(0xEE) + spin
    expected = (program + bytes(3000))[:3000]
    assert all(call[:3] == ("out", 0x1234, size) for call in seen.calls)
    assert b"".join(c[3].to_bytes(size, "little") for c in seen.calls) == expected


@pytest.mark.parametrize(("size", "opcode"), [(1, b"\x6c"), (2, b"\x66\x6d"), (4, b"\x6d")])
async def test_a_repeated_input_fills_memory(size: int, opcode: bytes) -> None:
    count = 1000
    code = b"\xbf" + struct.pack("<I", DATA) + b"\xb9" + struct.pack("<I", count)
    prefix, opcode = opcode[:-1], opcode[-1:]
    code += b"\x66\xba\x34\x12\xfc" + prefix + b"\xf3" + opcode  # mov dx, 0x1234; cld; rep ins
    seen = Seen()
    with tiny_guest(code + code_out(0xEE) + spin) as guest:
        thread = VcpuThread(guest.vcpu, seen.handlers())
        seen.stop_at(0xEE, thread.stop)
        with trio.fail_after(60):
            await thread.run()
        item = bytes.fromhex("11223344")[:size]
        assert guest.memory[DATA : DATA + size * count] == item * count
    # KVM reads ahead, but never less than asked for.
    assert len(seen.calls) >= count


@pytest.mark.parametrize("offset", [0, 1, 0xFFD, 0xFFF])
async def test_memory_accesses_of_every_size_have_their_values(offset: int) -> None:
    address = HOLE + offset
    at = address.to_bytes(8, "little")
    code = b""
    for load, store in (b"\xa0", b"\xa2"), (b"\x66\xa1", b"\x66\xa3"), (b"\xa1", b"\xa3"):
        code += load + at + store + at
    code += b"\x48\xa1" + at + b"\x48\xa3" + at  # 8 bytes
    seen = await _run(code, "long")
    # What crosses a page comes in two parts.
    touched: dict[str, dict[int, int]] = {"read": {}, "write": {}}
    for what, where, size, value in seen.calls:
        assert 1 <= size <= 8
        for at_byte, byte in enumerate(value.to_bytes(size, "little")):
            touched[what][where + at_byte] = byte
    assert set(touched["read"]) == set(touched["write"]) == set(range(address, address + 8))
    assert touched["read"] == touched["write"]


async def test_every_page_of_a_large_hole_can_be_touched() -> None:
    # mov ebx, HOLE; mov ecx, 300; again: mov [rbx], ecx; add ebx, 0x1000; dec ecx; jnz again
    code = b"\xbb" + struct.pack("<I", HOLE) + b"\xb9" + struct.pack("<I", 300)
    code += bytes.fromhex("89 0b 81 c3 00 10 00 00 ff c9 75 f4")
    seen = await _run(code, "long")
    assert seen.calls == [("write", HOLE + 0x1000 * n, 4, 300 - n) for n in range(300)]


@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STUBBORN)
async def test_a_stubborn_guest_stops(name: str, mode: Mode, how: str) -> None:
    seen = Seen()
    before = _left_behind()
    with tiny_guest(STUBBORN[name], mode, irqchip=True) as guest:
        thread = VcpuThread(guest.vcpu, seen.handlers())
        ends: list[VcpuExit] = []

        async def run() -> None:
            ends.append(await thread.run())

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                for _ in range(3):
                    await thread.pause()
                    thread.resume()
                if how == "stop":
                    thread.stop()
                else:
                    nursery.cancel_scope.cancel()
        assert ends == ([VcpuExit("stopped")] if how == "stop" else [])
    assert _left_behind() == before


@pytest.mark.parametrize("mode", ["protected", "long"])
async def test_a_triple_fault_ends_as_a_reset(mode: Mode) -> None:
    with tiny_guest(b"\x0f\x0b", mode) as guest, trio.fail_after(60):  # an undefined instruction
        sregs = guest.vcpu.get_sregs()
        sregs.idt.limit = 0  # no handler for it, nor for that fault, nor for the next
        guest.vcpu.set_sregs(sregs)
        thread = VcpuThread(guest.vcpu, Seen().handlers())
        assert await thread.run() == VcpuExit("reset", "triple fault")
        await thread.pause()  # it stands already
        thread.stop()


async def test_a_halt_that_nothing_can_end_is_an_end() -> None:
    with tiny_guest(halt_loop) as guest, trio.fail_after(60):
        assert (await VcpuThread(guest.vcpu, Seen().handlers()).run()).end == "halted"


async def test_code_outside_of_memory_is_an_end_and_no_exception() -> None:
    with tiny_guest(b"\xb8\x00\x00\x00\x10\xff\xe0") as guest, trio.fail_after(60):  # jmp HOLE
        assert (await VcpuThread(guest.vcpu, Seen().handlers()).run()).end == "failed"


async def test_a_paused_guest_does_nothing_and_goes_on_where_it_was() -> None:
    count = bytes.fromhex("ff 04 25") + struct.pack("<I", DATA) + b"\xeb\xf7"  # inc [DATA]; again
    with tiny_guest(count) as guest, trio.fail_after(60):
        thread = VcpuThread(guest.vcpu, Seen().handlers(), standing=True)

        def counted() -> int:
            return int.from_bytes(guest.memory[DATA : DATA + 4], "little")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.run)
            await thread.pause()
            await trio.testing.wait_all_tasks_blocked()
            assert counted() == 0
            for _ in range(20):
                before = counted()
                thread.resume()
                while counted() == before:
                    await trio.lowlevel.checkpoint()
                await thread.pause()
                await thread.pause()
                stood = counted(), guest.vcpu.get_regs().rip
                await trio.testing.wait_all_tasks_blocked()
                assert (counted(), guest.vcpu.get_regs().rip) == stood
            nursery.cancel_scope.cancel()


async def test_an_access_is_complete_when_the_guest_stands() -> None:
    code = bytes.fromhex("e4 70 eb fe")  # in al, 0x70; jmp here
    with tiny_guest(code) as guest, trio.fail_after(60):
        handling, go_on = threading.Event(), threading.Event()

        def port_in(port: int, size: int) -> int:
            handling.set()
            go_on.wait()
            return 0x5A

        nothing = Seen().handlers()
        handlers = ExitHandlers(
            port_in=port_in,
            port_out=nothing.port_out,
            mmio_read=nothing.mmio_read,
            mmio_write=nothing.mmio_write,
        )
        thread = VcpuThread(guest.vcpu, handlers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.run)
            await trio.to_thread.run_sync(handling.wait)
            nursery.start_soon(thread.pause)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
            await thread.pause()
            regs = guest.vcpu.get_regs()
            assert (regs.rax & 0xFF, regs.rip) == (0x5A, CODE + 2)
            assert thread.exits["port"] == 1
            thread.stop()


async def test_a_handlers_exception_comes_out_as_itself() -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    before = _left_behind()
    seen = Seen(on_call=broken)
    with tiny_guest(out_loop) as guest, pytest.raises(RuntimeError, match="a bug"):
        await VcpuThread(guest.vcpu, seen.handlers()).run()
    assert len(seen.calls) == 1
    assert _left_behind() == before


async def test_all_vcpus_of_a_machine_run_at_once_and_stand_together() -> None:
    code = bytes.fromhex("f0 0f c1 04 25") + struct.pack("<I", DATA)  # lock xadd [DATA], eax
    code += bytes.fromhex("b8 01 00 00 00") + b"\xeb\xf0"
    code = b"\xb8\x01\x00\x00\x00" + code
    with tiny_guest(code, vcpus=3) as guest, trio.fail_after(60):
        for vcpu in guest.vcpus[1:]:
            enter_mode(vcpu, "long")
        threads = [VcpuThread(vcpu, Seen().handlers()) for vcpu in guest.vcpus]
        async with trio.open_nursery() as nursery:
            for thread in threads:
                nursery.start_soon(thread.run)
            for _ in range(10):
                async with trio.open_nursery() as pausing:
                    for thread in threads:
                        pausing.start_soon(thread.pause)
                stood = guest.memory[DATA : DATA + 4]
                await trio.testing.wait_all_tasks_blocked()
                assert guest.memory[DATA : DATA + 4] == stood
                for thread in threads:
                    thread.resume()
            nursery.cancel_scope.cancel()


async def test_other_signals_do_not_disturb_it() -> None:
    count = 200
    seen = Seen()
    handled = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with tiny_guest(out_loop) as guest, trio.fail_after(60):
            thread = VcpuThread(guest.vcpu, seen.handlers())

            def disturb() -> None:
                signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
                if len(seen.calls) == count:
                    thread.stop()

            seen.on_call = disturb
            assert await thread.run() == VcpuExit("stopped")
    finally:
        signal.signal(signal.SIGUSR1, handled)
    assert len(seen.calls) == count


def test_trio_need_not_run_in_the_main_thread() -> None:
    open_kvm().close()
    ends: list[VcpuExit] = []

    async def main() -> None:
        with tiny_guest(spin) as guest, trio.fail_after(60):
            thread = VcpuThread(guest.vcpu, Seen().handlers())

            async def run() -> None:
                ends.append(await thread.run())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await thread.pause()
                thread.stop()

    other = threading.Thread(target=trio.run, args=(main,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # it inherits that
    try:
        other.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    other.join()
    assert ends == [VcpuExit("stopped")]


async def test_a_cancellation_at_any_point_leaves_nothing() -> None:
    open_kvm().close()
    before = _left_behind()
    for point in range(60):
        seen = Seen()
        with tiny_guest(out_loop, irqchip=True) as guest, trio.fail_after(60):
            thread = VcpuThread(guest.vcpu, seen.handlers(), standing=point % 7 == 0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(thread.run)
                for step in range(point % 20):
                    await trio.lowlevel.checkpoint()
                    if step % 5 == point % 5:
                        await thread.pause()
                        thread.resume()
                if point % 3:
                    nursery.start_soon(thread.pause)
                nursery.cancel_scope.cancel()
        assert _left_behind() == before


@given(code=st.binary(min_size=1, max_size=200), mode=st.sampled_from(MODES))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_whatever_bytes_a_guest_runs_there_is_an_end(code: bytes, mode: Mode) -> None:
    seen = Seen()
    with tiny_guest(code, mode, irqchip=True) as guest, trio.fail_after(60):
        thread = VcpuThread(guest.vcpu, seen.handlers())
        seen.stop_after(100, thread.stop)
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.02):  # what it does in that time is enough
                assert (await thread.run()).end in ("stopped", "reset", "halted", "failed")
            nursery.cancel_scope.cancel()
    for what, _, size, value in seen.calls:
        assert size in ((1, 2, 4) if what in ("in", "out") else range(1, 9))
        assert 0 <= value < 1 << 8 * size
