"""The contender: a channel, used as its users do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiordma
from aiordma.bench.gauge import clock_s
from aiordma.bench.orders import Setup
from aiordma.bench.payload import Buffer, message, verify_message

HOST = "127.0.0.1"


class ChannelSide:
    """One end of a channel with `setup.lanes` lanes."""

    def __init__(self, setup: Setup) -> None:
        self._config = aiordma.ChannelConfig(
            lanes=setup.lanes, congestion=setup.congestion, checksum=setup.checksum
        )
        self._listener: aiordma.Listener | None = None
        self._opened: aiordma.Channel | None = None

    @property
    def _channel(self) -> aiordma.Channel:
        assert self._opened is not None
        return self._opened

    async def listen(self) -> int:
        """The port that `connect` takes."""
        self._listener = await aiordma.listen(HOST, config=self._config)
        return self._listener.address[1]

    async def accept(self) -> None:
        """Take the channel that `connect` opens."""
        assert self._listener is not None
        self._opened = await anext(aiter(self._listener))

    async def connect(self, port: int) -> None:
        """Open the channel."""
        self._opened = await aiordma.connect(HOST, port, config=self._config)

    async def send(self, source: Buffer, connections: int) -> None:
        """Returns when the receiver has acknowledged all bytes."""
        await self._channel.send_tensor(source)

    async def receive(
        self, destination: Buffer, connections: int, ready: Callable[[], None]
    ) -> None:
        """Returns when all bytes are in the destination."""
        receiving = asyncio.create_task(self._channel.recv_tensor(into=destination))
        await asyncio.sleep(0)  # so that the task stands in its call
        ready()
        await receiving

    async def ping(self, count: int) -> list[float]:
        """Seconds of each round trip of a small message."""
        channel, seconds = self._channel, []
        for index in range(count):
            request = message(index)
            start = clock_s()
            await channel.send(request)
            answer = await channel.recv()
            seconds.append(clock_s() - start)
            verify_message(index, answer)
        return seconds

    async def echo(self, count: int, ready: Callable[[], None]) -> None:
        """Send `count` messages back."""
        ready()
        for _ in range(count):
            await self._channel.send(await self._channel.recv())

    def copied_bytes(self) -> int:
        """Payload bytes that this end copied in user space."""
        return self._channel.stats().copied_bytes

    async def aclose(self) -> None:
        """Close the channel and its listener."""
        if self._opened is not None:
            await self._opened.aclose()
        if self._listener is not None:
            await self._listener.aclose()
