"""A Python web app, baked with a warm-up: it answers at once, wherever and as often as it is
restored.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_supermachine import Image, Vm, VmConfig

from ..support.debian_image import debian_layout
from ..support.guests import CLOCK

__all__ = ["debian_layout"]  # a fixture

pytestmark = [pytest.mark.vm, pytest.mark.long]

PORT = 8000

APP = f"""
import http.server, itertools, json, os, threading, time, uuid

served = itertools.count(1)
ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.05)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = {{
            "served": next(served), "ticks": ticks, "pid": os.getpid(), "time": time.time(),
            "uuid4": str(uuid.uuid4()), "urandom": os.urandom(16).hex(),
        }}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

threading.Thread(target=tick, daemon=True).start()
http.server.HTTPServer(("127.0.0.1", {PORT}), Handler).serve_forever()
""".encode()

#: One connection and no second try: whoever does not listen yet has failed.
REQUEST = rf"exec 3<>/dev/tcp/127.0.0.1/{PORT} && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && cat <&3"

IDENTITY = """
head -c 16 /dev/urandom | od -An -tx8
cat /proc/sys/kernel/random/uuid /etc/machine-id /proc/sys/kernel/random/boot_id
date +%s
"""


async def output(vm: Vm, script: str) -> str:
    done = await vm.run_process(["bash", "-c", script], capture_stdout=True)
    return done.stdout.decode()


async def ask(vm: Vm) -> dict[str, Any]:
    """Make one request to the app, in its guest."""
    head, _, body = (await output(vm, REQUEST)).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.0 200 OK")
    answer: dict[str, Any] = json.loads(body)
    return answer


async def warm_up(vm: Vm) -> None:
    assert (await ask(vm))["served"] == 1


@pytest.fixture
async def app(debian_layout: Path) -> Image:
    """The app's image; baked by the first test that wants it, and found by later runs."""
    builder = (
        Image.builder(f"oci:{debian_layout}:t")
        .with_extra_file("/srv/app.py", APP)
        .with_cmd(["python3", "/srv/app.py"])
        .with_guest_port(PORT)
        .with_warmup(warm_up)
    )
    return await builder.build()


async def test_a_baked_app_answers_from_a_restored_vm_at_once(app: Image) -> None:
    answers = []
    for _ in range(2):
        async with app.start(VmConfig(require_restore=True)) as vm:
            assert vm.started_by == "restore"
            answers.append(await ask(vm))
    one, other = answers
    # The one before was the warm-up's, and what one VM serves another does not know of.
    assert one["served"] == other["served"] == 2
    assert one["pid"] == other["pid"]


async def test_a_process_counts_on_after_a_snapshot_in_the_copy_and_in_the_source(
    app: Image, tmp_path: Path
) -> None:
    async with app.start() as source:
        before = await ask(source)
        image = await source.snapshot(tmp_path / "snapshot")
        async with image.start() as copy:
            for vm in (source, copy):
                last = before
                for _ in range(3):
                    answer = await ask(vm)
                    assert answer["pid"] == before["pid"]
                    assert answer["served"] == last["served"] + 1
                    last = await ticked(vm, answer)
    async with image.start() as later:
        answer = await ask(later)
        assert answer["served"] == before["served"] + 1
        await ticked(later, answer)


async def ticked(vm: Vm, before: dict[str, Any]) -> dict[str, Any]:
    """Ask until the app's own thread has counted on."""
    while (answer := await ask(vm))["ticks"] <= before["ticks"]:
        assert answer["ticks"] == before["ticks"]
    return answer


async def test_twenty_vms_of_one_snapshot_are_twenty_machines_and_know_the_time(
    app: Image, tmp_path: Path
) -> None:
    async with app.start() as vm:
        # Of an hour ago, as it were.
        await output(vm, f"date -s @{time.time() - 3600:.0f}")
        assert (await ask(vm))["time"] < time.time() - 3500
        image = await vm.snapshot(tmp_path / "old")

    drawn: list[list[str]] = []

    async def one() -> None:
        async with image.start(VmConfig(require_restore=True)) as copy:
            before = time.time()
            *identity, said = (await output(copy, IDENTITY)).splitlines()
            answer = await ask(copy)
            for there in (float(said), answer["time"]):
                assert before - CLOCK <= there <= time.time() + CLOCK
            drawn.append([*identity, answer["uuid4"], answer["urandom"]])

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert len(drawn) == 20
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == 20, values


async def test_a_pool_of_the_app_serves_thirty_requests_over_three_workers(app: Image) -> None:
    answers: list[dict[str, Any]] = []

    async def work() -> None:
        for _ in range(10):
            async with pool.acquire() as vm:
                assert not vm.reused
                answers.append(await ask(vm))

    async with app.pool().min(2).max(4).build() as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(work)
        stats = pool.stats()
    assert [answer["served"] for answer in answers] == [2] * 30
    assert len({answer["uuid4"] for answer in answers}) == 30
    assert stats.acquired_total == 30
    assert stats.died_total == stats.failed_total == 0
