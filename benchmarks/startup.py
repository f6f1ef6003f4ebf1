"""How long the command line takes, beside Python programs that do not use this library.

``run`` restores a baked image; its steps tell where that goes. They are of runs with a trace and
with stamps around ``trio.run``, so that imports which are put off until then count in the step that
needs them. Processor time says more than the clock on a busy machine. The tables after the first
tell what is imported, by the modules that take longest themselves, as ``-X importtime`` finds it,
which makes imports slower.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import attrs
import trio
from common import Unavailable, idle_builder, scratch, start
from table import Rows

from trio_supermachine.hv.kvm.probe import probe_kvm
from trio_supermachine.hv.select import choose_engine

PROGRAM = Path(sys.executable).with_name("trio-supermachine")
RUN = ("run", "builtin:busybox", "--", "true")
DAY = 86400

#: A program of click's, and one that runs a program by Trio.
HELLO = """
import click
@click.group()
def hello(): "Say it."
@hello.command()
def world(): "Say it to the world."
@hello.command()
def run():
    import trio
    trio.run(trio.run_process, ["true"])
hello(prog_name="hello")
"""
#: The command line, with stamps: its first line, and the begin and end of ``trio.run``.
STAMPED = """
import time
began = time.time()
import sys
import trio
run = trio.run
def stamped(*arguments, **options):
    called = time.time()
    try:
        return run(*arguments, **options)
    finally:
        print("stamps", began, called, time.time(), file=sys.stderr)
trio.run = stamped
from trio_supermachine.cli import main
main()
"""
PASS, TRIO, PACKAGE = "python -c pass", "import trio", "import trio_supermachine"
HELLO_HELP, HELLO_COMPLETION, HELLO_RUN = (
    "hello of click: --help",
    "hello of click: completion",
    "hello of click: trio.run_process(['true'])",
)
HELP, COMPLETION, WHOLE = "--help", "completion", "run of true"
PYTHON = "run: Python's start and imports"
STEPS = (
    "run: step: Python's start",
    "run: step: imports and command line",
    "run: step: engine choice and image lookup",
    "run: step: restore",
    "run: step: the program",
    "run: step: teardown of the VM",
    "run: step: Python's end",
)


#: As programs run that are installed: without this some development machines compile each module
#: in each run, which doubles the time.
CACHED = {"PYTHONDONTWRITEBYTECODE": ""}


@attrs.frozen
class Command:
    """A program to start.

    :ivar environment: what is added to this program's.
    """

    argv: Sequence[str | os.PathLike[str]]
    environment: Mapping[str, str] = attrs.field(factory=dict)

    def run(self) -> str:
        """What it writes to stderr."""
        done = subprocess.run(
            self.argv,
            env={**os.environ, **CACHED, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def time(self, name: str, rows: Rows, by: str) -> None:
        """Add how long it takes, by the clock and in processor time of it and its children."""
        before = children_ms()
        with rows.timed(name, by=by):
            self.run()
        rows.add(f"{name}: processor time", children_ms() - before, by=by)


def children_ms() -> float:
    """The processor time of all programs that have ended here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e3


def completion(argv: Sequence[str | os.PathLike[str]], name: str) -> Command:
    """What a shell starts when the user asks for the second word."""
    words = {"COMP_WORDS": name.lower().replace("_", "-"), "COMP_CWORD": "1"}
    return Command(argv, {f"_{name}_COMPLETE": "bash_complete", **words})


def commands(hello: Path, engine: str) -> dict[tuple[str, str], Command]:
    """What is timed, by what it is and who does it."""
    python = (sys.executable,)
    return {
        (PASS, "Python"): Command((*python, "-c", "pass")),
        (TRIO, "Python"): Command((*python, "-c", "import trio")),
        (PACKAGE, "ours"): Command((*python, "-c", "import trio_supermachine")),
        (HELLO_HELP, "Python"): Command((*python, hello, "--help")),
        (HELP, "ours"): Command((PROGRAM, "--help")),
        (HELLO_COMPLETION, "Python"): completion((*python, hello), "HELLO"),
        (COMPLETION, "ours"): completion((PROGRAM,), "TRIO_SUPERMACHINE"),
        (HELLO_RUN, "Python"): Command((*python, hello, "run")),
        (WHOLE, engine): Command((PROGRAM, *RUN)),
    }


def stamps(words: str, text: str) -> list[float]:
    """The numbers that a line of the trace or of ``STAMPED`` has, as seconds of the day."""
    found = re.search(words, text, re.M)
    assert found is not None, text
    numbers = [[float(part) for part in word.split(":")] for word in found.groups()]
    seconds = [sum(n * 60**i for i, n in enumerate(reversed(parts))) for parts in numbers]
    return [one % DAY for one in seconds]


def add_steps(rows: Rows, engine: str) -> None:
    """Run the command once, and add its steps."""
    traced = {"TRIO_SUPERMACHINE_TRACE": "vm,exec", "TZ": "UTC"}
    begin = time.time() % DAY
    text = Command((sys.executable, "-c", STAMPED, *RUN), traced).run()
    end = time.time() % DAY
    began, called, returned = stamps(r"^stamps (\S+) (\S+) (\S+)$", text)
    (planned,) = stamps(r"^(\S+) vm +restore ", text)
    (started,) = stamps(r"^(\S+) exec +start ", text)
    (ended,) = stamps(r"^(\S+) exec +end ", text)
    times = (begin, began, called, planned, started, ended, returned, end)
    for name, one, two in zip(STEPS, times, times[1:], strict=False):
        rows.add(name, (two - one) % DAY * 1e3, by=engine)
    rows.add(PYTHON, (called - begin) % DAY * 1e3, by=engine)


def add_imports(command: Command, runs: Rows) -> None:
    """Add how long each module takes that a command imports, without those it imports itself."""
    text = Command(command.argv, {**command.environment, "PYTHONPROFILEIMPORTTIME": "1"}).run()
    for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", text, re.M):
        runs.add(name, int(own) / 1e3)


def imports(title: str, runs: Rows, most: int) -> Rows:
    """The modules that take longest, and in a note the packages.

    A busy machine only ever adds: of each module the fastest run counts.
    """
    least = {key[0]: min(values) for key, values in runs.values.items()}
    rows = Rows("import")
    rows.title = f"imports of {title}: {len(least)} modules, {sum(least.values()):.0f} ms"
    for name in sorted(least, key=lambda name: -least[name])[:most]:
        rows.add(name, least[name])
    packages: dict[str, float] = {}
    for name, value in least.items():
        top = name.partition(".")[0]
        packages[top] = packages.get(top, 0) + value
    first = sorted(packages.items(), key=lambda item: -item[1])[:most]
    rows.notes.append("by package: " + ", ".join(f"{top} {value:.0f}" for top, value in first))
    return rows


async def main(rounds: int, imports_shown: int) -> AsyncIterator[Rows]:
    if not os.path.exists(PROGRAM):  # noqa: ASYNC240
        raise Unavailable("needs the command line: pip install 'trio-supermachine[cli]'")
    engine = (await choose_engine()).name
    await idle_builder().build()
    rows = Rows(title=f"{rounds} rounds")
    rows.notes.append(f"targets: {HELP} and {COMPLETION} below 200 ms, {PYTHON} below 250 ms")
    for name, baseline in (
        (PACKAGE, TRIO),
        (HELP, HELLO_HELP),
        (COMPLETION, HELLO_COMPLETION),
        (WHOLE, HELLO_RUN),
    ):
        rows.compare(name, baseline)
        rows.compare(f"{name}: processor time", f"{baseline}: processor time")
    rows.compare(PYTHON, TRIO)
    rows.compare(STEPS[0], PASS)
    with scratch() as place:
        hello = place / "hello.py"
        hello.write_text(HELLO)
        timed = commands(hello, engine)
        for number in range(rounds + 1):
            one = rows if number else Rows()  # the first round fills caches
            for (name, by), command in timed.items():
                await trio.to_thread.run_sync(command.time, name, one, by)
            await trio.to_thread.run_sync(add_steps, one, engine)
            with one.timed("run: of the lookup, the probe of /dev/kvm", by=engine):
                await probe_kvm()
    yield rows
    if not imports_shown:
        return
    for key in ((PACKAGE, "ours"), (HELP, "ours"), (WHOLE, engine)):
        runs = Rows()
        for _ in range(-(-rounds // 2)):
            await trio.to_thread.run_sync(add_imports, timed[key], runs)
        yield imports(key[0], runs, imports_shown)


if __name__ == "__main__":
    start(main, __doc__, rounds=(20, 1), imports_shown=(20, 3))
