"""A pytest plugin that notes how long each phase of each test takes, and what CPU time it uses.

``TRIO_SUPERMACHINE_TEST_DURATIONS`` names the file, one JSON object a line; without it, that is
``.durations/pytest.jsonl``. A worker of pytest-xdist has a file of its own beside it.
``scripts/durations.py`` prints what is in such files.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from .processes import children_of

VARIABLE = "TRIO_SUPERMACHINE_TEST_DURATIONS"
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_time() -> float:
    """Seconds of CPU that this process and all below it have used.

    A child counts while it lives, and after its parent has waited for it. One that outlives its
    parent is lost.
    """
    used = 0.0
    for who in resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN:
        usage = resource.getrusage(who)
        used += usage.ru_utime + usage.ru_stime
    return used + sum(map(_family_time, children_of(os.getpid())))


def _family_time(pid: int) -> float:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    # utime, stime, cutime and cstime are the fields 14 to 17; the third comes first here.
    return sum(map(int, after_name[11:15])) / _TICK + sum(map(_family_time, children_of(pid)))


class _Recorder:
    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._began = time.monotonic()

    def _write(self, **fields: object) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()  # a run that is ended still tells what it did

    def _phase(self, item: pytest.Item, phase: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), cpu_time()
        try:
            return (yield)
        finally:
            self._write(
                test=item.nodeid,
                phase=phase,
                wall=round(time.monotonic() - wall, 4),
                cpu=round(max(0.0, cpu_time() - cpu), 4),
            )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase(item, "teardown"))

    def pytest_unconfigure(self) -> None:
        self._write(
            phase="session",
            wall=round(time.monotonic() - self._began, 2),
            cpu=round(cpu_time(), 2),
        )
        self._file.close()


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None and config.getoption("numprocesses", None):
        return  # the workers run the tests
    # A pytest that a test starts has a file of its own.
    path = config.rootpath / os.environ.pop(VARIABLE, ".durations/pytest.jsonl")
    if worker is not None:
        path = path.with_name(f"{path.stem}-{worker}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.pluginmanager.register(_Recorder(path.open("w")), "durations-recorder")
