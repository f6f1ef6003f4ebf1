"""A pull that is killed, cancelled, or has no room: what it leaves is of use or is nothing."""
# ruff: noqa: ASYNC220, ASYNC240 (programs and files)

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trio_supermachine import DiskFull, PullPolicy
from trio_supermachine.images.content import ContentStore
from trio_supermachine.images.prepare import prepare_image

from ..support.fault_proxy import fault_proxy, through
from ..support.image_files import layer, verify
from ..support.registry_server import RegistryServer

pytestmark = pytest.mark.usefixtures("home")

PULL = """
import sys, trio
from trio_supermachine.images.prepare import prepare_image

async def tell(step):
    print(step.phase, step.item, step.done, flush=True)

trio.run(lambda: prepare_image(sys.argv[1], progress=tell))
"""


@pytest.fixture
def image(push: Callable[..., str]) -> str:
    """An image with layers that take a moment; its reference."""
    return push(layer("a", 3_000_000), layer("b", 200_000), layer("c", 3_000_000))


async def test_a_killed_pull_goes_on_where_it_was(
    image: str, registry: RegistryServer, home: Path
) -> None:
    for lines in range(1, 12):
        with subprocess.Popen(
            [sys.executable, "-c", PULL, image], stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            for _ in range(lines):
                program.stdout.readline()
            program.kill()
        await verify_blobs(home)
        if lines % 4 == 0:
            shutil.rmtree(home)
    here = {path.name for path in home.glob("content/blobs/sha256/*")}
    begun = {path.name: path.stat().st_size for path in home.glob("content/partial/*")}
    async with fault_proxy(registry.address) as proxy:
        await prepare_image(through(proxy, image))
        for digest in here:
            assert proxy.count(f"/blobs/sha256:{digest}") == 0
        for digest in begun:
            assert proxy.count(f"/blobs/sha256:{digest}") <= 1
    await ContentStore().collect()
    await verify(home)
    assert not list((home / "content/partial").glob("*"))


async def verify_blobs(home: Path) -> None:
    """Whatever has the name of a digest has the digest."""
    for blob in home.glob("content/blobs/sha256/*"):
        if not blob.name.startswith("."):
            assert await ContentStore().verify(f"sha256:{blob.name}")


async def test_the_partial_file_of_another_program_is_taken_up(
    image: str, registry: RegistryServer, home: Path
) -> None:
    async with fault_proxy(registry.address) as proxy:
        await prepare_image(through(proxy, image))
        largest = max(home.glob("content/blobs/sha256/*"), key=lambda path: path.stat().st_size)
        data = largest.read_bytes()
        shutil.rmtree(home)
        partial = home / "content/partial" / largest.name
        partial.parent.mkdir(parents=True)
        partial.write_bytes(data[:1_000_000])
        before = dict.fromkeys(proxy.requests)
        await prepare_image(through(proxy, image))
        assert before
    await verify(home)
    assert not partial.exists()


async def test_a_wrong_partial_file_fails_once(image: str, home: Path) -> None:
    await prepare_image(image)
    largest = max(home.glob("content/blobs/sha256/*"), key=lambda path: path.stat().st_size)
    shutil.rmtree(home)
    for wrong in (b"wrong" * 1000, os.urandom(5_000_000)):
        partial = home / "content/partial" / largest.name
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(wrong)
        try:
            await prepare_image(image)
        except Exception as error:
            assert type(error).__name__ == "ImageCorrupt"  # noqa: PT017
            assert not partial.exists()
        await prepare_image(image)
        await verify(home)
        shutil.rmtree(home)


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at a step of the program."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.scope = scope
        self.left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


async def test_a_pull_can_be_cancelled_at_any_moment(image: str, home: Path) -> None:
    counting = CancelAt(trio.CancelScope(), 0)
    trio.lowlevel.add_instrument(counting)
    await prepare_image(image)
    trio.lowlevel.remove_instrument(counting)
    steps = -counting.left
    source = random.Random(4)
    for step in sorted(source.sample(range(1, steps), 25)):
        shutil.rmtree(home, ignore_errors=True)
        with trio.CancelScope() as scope:
            instrument = CancelAt(scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                await prepare_image(image)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        await verify(home)
    await prepare_image(image)
    await ContentStore().collect()
    await verify(home)


FULL = """
import sys, trio
from trio_supermachine import DiskFull
from trio_supermachine.images.content import ContentStore
from trio_supermachine.images.prepare import prepare_image

try:
    trio.run(prepare_image, sys.argv[1])
except DiskFull as error:
    root = ContentStore().root
    assert str(root) in str(error), error
    assert not list(root.glob("partial/*")), list(root.glob("partial/*"))
    assert not ContentStore().records()
    print("full")
"""


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(image: str, home: Path) -> None:
    home.mkdir()
    script = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$4"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, str(home), sys.executable, FULL, image],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this host has no user namespaces")
    assert done.stdout == "full\n", done.stderr


async def test_what_a_pull_in_progress_has_is_not_pruned(image: str, home: Path) -> None:
    await prepare_image(image)
    store = ContentStore()
    name = store.records()[0].name
    async with store.lease() as lease:
        await lease.keep(*store.below(store.records()[0].top))
        await store.remove_records([name])
        assert not (await store.collect()).digests
    collected = await store.collect(dry_run=True)
    assert len(collected.digests) == 5
    assert await store.collect() == collected
    assert not list(home.glob("content/blobs/sha256/*"))
    # The layers that are run are other files.
    image_layers = list(home.glob("layers/sha256/*.squashfs"))
    assert len(image_layers) == 3


async def test_pulls_and_prunes_at_once_never_lose_a_blob(image: str, home: Path) -> None:
    done = trio.Event()

    async def prune() -> None:
        while not done.is_set():
            await ContentStore().collect()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(prune)
        for _ in range(4):
            await prepare_image(image)
            await prepare_image(image, pull=PullPolicy.NEVER)
            names = [record.name for record in ContentStore().records()]
            await ContentStore().remove_records(names)
        done.set()
    await verify(home)


def test_disk_full_says_what_to_do() -> None:
    assert "prune" in str(DiskFull("/somewhere"))
