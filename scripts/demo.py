"""Two things to see: output that comes as it is written, and a cancellation that stops it all."""

from __future__ import annotations

import time

import trio

from trio_supermachine import Image, Vm

SECONDS_OF_SLEEP = "4321"  # recognisable among the guest's processes


async def stream(vm: Vm) -> None:
    print("\nA program's output, as it comes:")
    script = "for i in 1 2 3 4; do echo line $i; sleep 0.5; done"
    started = time.perf_counter()
    async with vm.exec(["sh", "-c", script]) as child:
        async for chunk in child.stdout:
            for line in chunk.decode().splitlines():
                print(f"  {time.perf_counter() - started:5.2f} s  {line}")


async def cancel(vm: Vm) -> None:
    print("\nA program with a child of its own, cancelled after a second:")
    script = f"sleep {SECONDS_OF_SLEEP} & echo started; wait"
    started = time.perf_counter()
    with trio.move_on_after(1) as scope:
        await vm.run_process(["sh", "-c", script])
    assert scope.cancelled_caught
    print(f"  {time.perf_counter() - started:5.2f} s  cancelled")
    listing = await vm.run_process(["ps", "-o", "pid,args"], capture_stdout=True)
    processes = listing.stdout.decode()
    left = [line for line in processes.splitlines() if SECONDS_OF_SLEEP in line]
    assert not left, left
    print("  None of it is left among the guest's user processes:")
    for line in processes.splitlines():
        if "[" not in line:  # kernel threads
            print(f"    {line}")


async def main() -> None:
    started = time.perf_counter()
    image = await Image.from_oci("builtin:busybox")
    async with Vm.start(image) as vm:
        print(f"A VM on {vm.engine} answered after {time.perf_counter() - started:.2f} s.")
        await stream(vm)
        await cancel(vm)
        leaving = time.perf_counter()
    print(f"\nThe VM was gone {time.perf_counter() - leaving:.2f} s after the end of its block.")


if __name__ == "__main__":
    trio.run(main)
