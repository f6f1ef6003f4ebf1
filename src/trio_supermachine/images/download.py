"""Download of one image's layers from a registry into the content store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from .._util.nursery import open_flat_nursery
from .._util.progress import ProgressCallback, report
from ..errors import DiskFull, ImageNotFound
from ..oci.decompress import Blob
from ..oci.documents import Descriptor, foreign_missing
from .arrival import Arrival
from .content import ContentStore

if TYPE_CHECKING:
    from ..oci.registry import Registry

_PARALLEL: Final = 3  # layers at once, as Docker has it
_INTERVAL: Final = 0.1  # seconds between reports of progress


class Download:
    """The download of some layers, a few at a time, in their order.

    :meth:`blob` gives a layer that can be read while it comes. Whoever owns the download calls
    :meth:`close` when nobody opens these any more.

    :ivar failure: the error that ended :meth:`run`.
    """

    def __init__(
        self,
        store: ContentStore,
        registry: Registry,
        layers: Sequence[Descriptor],
        progress: ProgressCallback | None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._layers = {layer.digest: layer for layer in layers}
        self._arrivals = {digest: Arrival() for digest in self._layers}
        self._progress = progress
        self._told: dict[str, int] = {}
        self._done = trio.Event()
        self.failure: Exception | None = None

    def blob(self, layer: Descriptor) -> Blob:
        """Give a layer as a blob, whose reader waits for what has not come yet."""
        arrival = self._arrivals.get(layer.digest)
        return Blob(self._store.path(layer.digest), 0, layer.size, arrival)

    def discard(self) -> None:
        """Keep no partial file: the layers are damaged, or there is no room for them."""
        for arrival in self._arrivals.values():
            arrival.discarded = True

    def close(self) -> None:
        """Close the layers' files."""
        for arrival in self._arrivals.values():
            arrival.close()

    async def run(self) -> None:
        """Download until all layers are in the store.

        The first layer that fails ends the download with its error, which becomes
        :attr:`failure`. A task of its own tells the progress, so that a slow callback does not
        slow the download.
        """
        waiting = list(reversed(self._layers.values()))
        async with open_flat_nursery() as nursery:
            nursery.start_soon(self._tell)
            async with trio.open_nursery() as workers:
                for _ in range(min(_PARALLEL, len(waiting))):
                    workers.start_soon(self._work, waiting, workers.cancel_scope)
            if self.failure is not None:
                raise self.failure
            self._done.set()

    async def _work(self, waiting: list[Descriptor], others: trio.CancelScope) -> None:
        while waiting:
            try:
                await self._download(waiting.pop())
            except Exception as error:
                # What stops one layer, such as a full disk, stops others at the same moment: the
                # first error counts.
                self.failure = self.failure or error
                if isinstance(error, DiskFull):
                    self.discard()
                others.cancel()
                return

    async def _download(self, layer: Descriptor) -> None:
        arrival = self._arrivals[layer.digest]
        async with self._store.receiving(layer.digest, layer.size, arrival) as writer:
            if writer is None or writer.done == layer.size:
                return
            try:
                blob = self._registry.blob(layer.digest, layer.size, start=writer.done)
                async with blob as chunks:
                    async for chunk in chunks:
                        await writer.write(chunk)
            except ImageNotFound:
                if layer.foreign:
                    raise foreign_missing(layer) from None
                raise

    async def _tell(self) -> None:
        if self._progress is None:
            return
        while not self._done.is_set():
            await self._tell_news()
            with trio.move_on_after(_INTERVAL):
                await self._done.wait()
        await self._tell_news()

    async def _tell_news(self) -> None:
        for digest, layer in self._layers.items():
            there = self._arrivals[digest].there
            if self._told.get(digest) != there:
                self._told[digest] = there
                await report(self._progress, "download", digest, there, layer.size)
