"""The guest's agent as Python plays it, for machines that need no hypervisor."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import attrs
import trio

from trio_supermachine.agent import wire
from trio_supermachine.agent.greeting import HelloKind
from trio_supermachine.agent.wire import Frame, FrameDecoder, FrameType
from trio_supermachine.hv.fake import FakeGuest
from trio_supermachine.vsock.stream import VsockStream

OK = wire.frame(FrameType.OK)


@attrs.define(eq=False)
class PlayedAgent:
    """An agent that greets the host and says OK to each call; it runs no programs.

    Its guest powers off when the lifeline ends. A test changes ``answers`` for other behaviour.

    :ivar answers: by type of a request, a function that answers it on its connection.
    :ivar heard: the types of the frames that the host has sent, in order.
    """

    answers: dict[int, Callable[[FakeGuest, VsockStream], Awaitable[None]]] = attrs.Factory(dict)
    heard: list[int] = attrs.Factory(list)

    async def __call__(self, guest: FakeGuest) -> None:
        listener = guest.listen(wire.AGENT_PORT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hold_lifeline, guest)
            while True:
                nursery.start_soon(self._answer, guest, await listener.accept())

    async def _hold_lifeline(self, guest: FakeGuest) -> None:
        async with await guest.dial(wire.LIFELINE_PORT) as stream:
            kind = HelloKind.RESTORE if guest.restored else HelloKind.BOOT
            hello = struct.pack("<II", wire.VERSION, kind) + wire.string("6.1-fake")
            await stream.send_all(wire.frame(FrameType.HELLO, hello))
            await self._hear(stream)
            await stream.send_all(wire.frame(FrameType.READY))
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            guest.end("shutdown")

    async def _answer(self, guest: FakeGuest, stream: VsockStream) -> None:
        async with stream:
            try:
                frame = await self._hear(stream)
                if frame.type in self.answers:
                    await self.answers[frame.type](guest, stream)
                else:
                    await stream.send_all(OK)
            except trio.BrokenResourceError:
                pass  # the host has given the call up

    async def _hear(self, stream: VsockStream) -> Frame:
        decoder = FrameDecoder()
        while True:
            for frame in decoder.frames():
                self.heard.append(frame.type)
                return frame
            data = await stream.receive_some()
            if not data:
                raise trio.BrokenResourceError("the host has left")
            decoder.feed(data)
