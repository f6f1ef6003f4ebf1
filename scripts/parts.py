"""Runs the parts of scripts/test and .ci/run side by side.

    scripts/parts.py [--ci] [--all]

Each part's output goes to .durations/PART.log and is shown when the part ends. A part that fails
fails the whole, at the end. An interrupt ends all parts. Last come a table of durations and the
tests of all parts, summed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs
import durations
import trio

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RESULTS = ROOT / ".durations"

#: What an interrupt leaves a part to end by itself, and how long parts may stay silent.
GRACE = 20
REPORT_EVERY = 60


@attrs.frozen
class Part:
    """A command, run beside the others: once the part ``after`` has ended, if that is said, and
    only if the part that it ``needs`` has ended well.
    """

    name: str
    command: str
    needs: str | None = None
    after: str | None = None
    nice: int = 0
    environment: Mapping[str, str] = attrs.field(factory=dict)


@attrs.define
class Ended:
    part: Part
    status: int
    wall: float
    cpu: float
    log: str

    def counts(self) -> Counter[str]:
        """The tests that passed, failed and were skipped, by the summaries of each pytest."""
        counts: Counter[str] = Counter()
        for line in self.log.splitlines():
            if re.search(r"\bin \d+\.\d+s\b", line):
                for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", line):
                    counts["failed" if kind == "error" else kind] += int(number)
        if self.status != 0 and not counts["failed"]:
            counts["failed"] = 1  # the part itself
        return counts


def plan(*, ci: bool, everything: bool) -> list[Part]:
    """What is run; the longest first."""
    pytest = "pytest -n 2 --dist loadfile --no-loadscope-reorder"
    parts = [
        Part("lab", "scripts/test-kvm" + " --all" * everything),
        Part(
            "tests",
            pytest,
            environment={"TRIO_SUPERMACHINE_TEST_KERNEL": "1"} if everything else {},
        ),
        Part("documentation", "sphinx-build -q -W --keep-going -b html docs docs/_build/html"),
        Part("types", "scripts/check-types"),
        Part("style", "ruff check . && ruff format --check ."),
    ]
    if ci or everything:
        # The other parts shall run on the stock kernel.
        home = {"TRIO_SUPERMACHINE_HOME": str(RESULTS / "small-kernel-home")}
        parts += [
            Part("kernel", "trio-supermachine kernel build", nice=19, environment=home),
            Part("small-kernel", f"{pytest} -m small_kernel", needs="kernel", environment=home),
        ]
        debian13 = "scripts/test-debian13" + " --subset" * (not everything)
        parts.append(Part("debian13", debian13, after="lab"))  # fewer at a time
    if everything:
        fuzz = "python -m tests.support.fuzz_virtio --seconds 600"
        parts.append(Part("fuzz", fuzz, nice=19))
    return parts


def say(text: str) -> None:
    print(f"parts: {text}", file=sys.stderr, flush=True)


def used_cpu(pid: int) -> float:
    """Seconds that a process which has ended, and what it has waited for, used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")


async def run(part: Part) -> Ended:
    """Run a part to its end; when that is cancelled, end it with all that it started."""
    (RESULTS / part.name).mkdir()
    log = RESULTS / f"{part.name}.log"
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TRIO_SUPERMACHINE_TEST_DURATIONS": str(RESULTS / part.name / "pytest.jsonl"),
        **part.environment,
    }
    began = trio.current_time()
    with log.open("w") as output:
        process = await trio.lowlevel.open_process(
            ["nice", f"-n{part.nice}", "bash", "-euc", part.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ended = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(ended)
        cpu = used_cpu(process.pid)
    except trio.Cancelled:
        with trio.CancelScope(shield=True):
            for signum in signal.SIGINT, signal.SIGTERM:
                os.killpg(process.pid, signum)
                with trio.move_on_after(GRACE) as patience:
                    await trio.lowlevel.wait_readable(ended)
                if not patience.cancelled_caught:
                    break
        raise
    finally:
        os.close(ended)
        os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its group
        with trio.CancelScope(shield=True):
            status = await process.wait()
    return Ended(part, status, trio.current_time() - began, cpu, log.read_text(errors="replace"))


def progress(name: str) -> str:
    """A part's name, and how far its pytest is."""
    log = (RESULTS / f"{name}.log").read_text(errors="replace")
    passed = re.findall(r"\[ *(\d+)%\]", log)
    return f"{name} ({passed[-1]}%)" if passed else name


async def run_all(parts: list[Part]) -> list[Ended]:
    running: set[str] = set()
    done: list[Ended] = []
    statuses: dict[str, int] = {}
    over = {part.name: trio.Event() for part in parts}

    async def one(part: Part) -> None:
        if part.after is not None:
            await over[part.after].wait()
        if part.needs is not None:
            await over[part.needs].wait()
            if statuses[part.needs] != 0:
                say(f"{part.name} does not run: {part.needs} failed")
                statuses[part.name] = 1
                over[part.name].set()
                return
        running.add(part.name)
        ended = await run(part)
        running.remove(part.name)
        done.append(ended)
        with (RESULTS / "parts.jsonl").open("a") as file:
            row = {"part": part.name, "wall": ended.wall, "cpu": ended.cpu, "status": ended.status}
            file.write(json.dumps(row) + "\n")
        print(f"\n===== {part.name}: {ended.wall:.0f} s, status {ended.status} =====")
        print(ended.log, end="", flush=True)
        statuses[part.name] = ended.status
        over[part.name].set()

    async def tell() -> None:
        while True:
            await trio.sleep(REPORT_EVERY)
            say("still running: " + ", ".join(map(progress, sorted(running))))

    async with trio.open_nursery() as telling:
        telling.start_soon(tell)
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(one, part)
        telling.cancel_scope.cancel()
    return done


async def main(parts: list[Part]) -> int:
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir()
    done: list[Ended] = []
    signalled = False

    async def heed_signals() -> None:
        nonlocal signalled
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                signalled = True
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heed_signals)
        done += await run_all(parts)
        nursery.cancel_scope.cancel()
    if signalled:
        say("ended by a signal")
        return 130
    print("\n" + durations.report(RESULTS) + "\n")
    for ended in done:
        if ended.status != 0:
            print(f"{ended.part.name} failed with status {ended.status}:")
            lines = [line for line in ended.log.splitlines() if re.match("(FAILED|ERROR) ", line)]
            print(*(lines or ended.log.splitlines()[-20:]), "", sep="\n")
    counts = sum((ended.counts() for ended in done), Counter())
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")))
    return int(any(ended.status != 0 for ended in done))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ci", action="store_true")
    parser.add_argument("--all", action="store_true", dest="everything")
    arguments = parser.parse_args()
    parts = plan(ci=arguments.ci, everything=arguments.everything)
    sys.exit(trio.run(partial(main, parts)))
