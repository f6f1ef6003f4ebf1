"""What a fresh machine costs, by a bake, a restore and a pool; then streams and a cancellation."""

from __future__ import annotations

import time
from statistics import median

import trio

from trio_supermachine import Image, Progress, Vm, VmConfig

SECONDS_OF_SLEEP = "4321"  # recognisable among the guest's processes


class Clock:
    """Says how long it has been."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __str__(self) -> str:
        seconds = self.seconds
        return f"{seconds:6.2f} s " if seconds >= 1 else f"{seconds * 1e3:6.1f} ms"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


async def output(vm: Vm, *argv: str) -> str:
    done = await vm.run_process(argv, capture_stdout=True)
    return done.stdout.decode().strip()


async def warm_up(vm: Vm) -> None:
    await vm.write_file("/tmp/warm", b"written once, before the capture\n")


async def bake() -> Image:
    print("A bake boots the image, runs a warm-up in it, and captures it; once:")
    clock = Clock()
    baked_now = False

    async def show(step: Progress) -> None:
        nonlocal baked_now
        baked_now = baked_now or step.phase == "boot"
        print(f"  {clock}  {step.phase}: {step.item}")

    builder = Image.builder("builtin:busybox").with_cmd([]).with_name("demo").with_warmup(warm_up)
    image = await builder.build(show)
    print(f"  {clock}  {'done' if baked_now else 'found: an earlier run of this has baked it'}")
    return image


async def boot_and_restore(image: Image) -> None:
    print("\nFrom nothing to the first answer of a program:")
    for config in (VmConfig(memory_mib=320), VmConfig()):
        times = []
        for _ in range(1 if config.memory_mib else 5):
            clock = Clock()
            async with Vm.start(image, config) as vm:
                release = await output(vm, "uname", "-r")
                times.append(clock.seconds)
        name = "a boot" if vm.started_by == "boot" else "a restore"
        of = f"median of {len(times)}" if len(times) > 1 else "for comparison"
        print(f"  {median(times) * 1e3:6.0f} ms  {name} ({of})")
    if release.endswith("-supermachine"):
        print(f"  The guest's kernel is the small one, {release}.")
    else:
        print(f"  The guest's kernel is {release}. A smaller one makes all this quicker:")
        print("    .venv/bin/trio-supermachine kernel build    # once, five minutes")


async def pool(image: Image) -> None:
    print("\nA pool keeps two VMs warm; each acquire gets one that nobody has used:")
    clock = Clock()
    async with image.pool().min(2).max(4).build() as pool:
        print(f"  {clock}  two are ready")
        for _ in range(2):
            clock = Clock()
            async with pool.acquire() as vm:
                handed_over = str(clock)
                random = await output(vm, "od", "-An", "-N8", "-tx8", "/dev/urandom")
                took = str(clock)
                warm = await output(vm, "cat", "/tmp/warm")
            print(f"  {handed_over}  handed over; {took.strip()} with a program: random {random}")
        print(f"  In each copy /tmp/warm was {warm!r}.")


async def stream(vm: Vm) -> None:
    print("\nA program's output, as it comes:")
    script = "for i in 1 2 3 4; do echo line $i; sleep 0.5; done"
    clock = Clock()
    async with vm.exec(["sh", "-c", script]) as child:
        async for chunk in child.stdout:
            for line in chunk.decode().splitlines():
                print(f"  {clock}  {line}")


async def cancel(vm: Vm) -> None:
    print("\nA program with a child of its own, cancelled after a second:")
    script = f"sleep {SECONDS_OF_SLEEP} & echo started; wait"
    clock = Clock()
    with trio.move_on_after(1) as scope:
        await vm.run_process(["sh", "-c", script])
    assert scope.cancelled_caught
    print(f"  {clock}  cancelled")
    processes = (await output(vm, "ps", "-o", "pid,args")).splitlines()
    left = [line for line in processes if SECONDS_OF_SLEEP in line]
    assert not left, left
    print("  None of it is left among the guest's user processes:")
    for line in processes:
        if "[" not in line:  # kernel threads
            print(f"    {line}")


async def main() -> None:
    image = await bake()
    await boot_and_restore(image)
    await pool(image)
    async with Vm.start(image) as vm:
        await stream(vm)
        await cancel(vm)
        clock = Clock()
    print(f"\nThe VM was gone {str(clock).strip()} after the end of its block.")


if __name__ == "__main__":
    trio.run(main)
