"""The near end's way to the far one: it starts it, or finds it at its address, and opens channels to it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import aiordma
from aiordma import AiordmaError, Channel, ChannelConfig
from aiordma.bench import perftest
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.far import (
    CONTROL,
    PROBE_S,
    Accept,
    Answer,
    Close,
    EndYardstick,
    Open,
    Order,
    Receive,
    Report,
    ServeYardstick,
    allow,
)
from aiordma.bench.gauge import clock_s
from aiordma.bench.meter import Meter, Usage

LOOPBACK: Final = "127.0.0.1"
_END_S: Final = 10.0

Address = tuple[str, int]


class Sample(NamedTuple):
    """One delivery: from the sender's call until the receiver has consumed the last byte, and said so."""

    seconds: float
    sender: Usage
    receiver: Usage


class Far:
    """The far end. Made by `far_end`."""

    def __init__(self, control: Channel, host: str, stall_s: float) -> None:
        self._control = control
        self._host = host
        self._stall_s = stall_s

    async def ask(self, order: Order) -> Answer:
        """Raises `BenchError`, or `CorruptTransfer`, with what went wrong there."""
        await self._control.send(order)
        try:
            async with asyncio.timeout(self._stall_s):
                answer = await self._control.recv(type=Answer)
        except TimeoutError as exc:
            raise BenchError(f"the far end was silent for {self._stall_s:g} s") from exc
        if answer.error:
            raise (CorruptTransfer if answer.is_corrupt else BenchError)(answer.error)
        return answer

    @asynccontextmanager
    async def channel(self, ring: Open) -> AsyncIterator[Link]:
        """A channel whose far end has this ring, over lanes of this kind and no other."""
        port = (await self.ask(ring)).port
        allow(ring.slot_bytes)
        meter = Meter()
        config = ChannelConfig(
            slot_bytes=1 << 12,  # of the near end, which receives nothing
            slots=4,
            checksum=ring.checksum,
            probe_s=PROBE_S,
            idle_timeout_s=self._stall_s,
        )
        channel = await aiordma.connect(
            self._host,
            port,
            config=config,
            require="verbs" if ring.is_verbs else "tcp",
            timeout_s=self._stall_s,
        )
        async with channel:
            await self.ask(Accept())
            yield Link(self, channel, meter)
        await self.ask(Close())

    async def yardstick(self, link: Link, size: int, iterations: int) -> float:
        """Bytes a second of ib_write_bw, on the device and port of the link."""
        port = perftest.port_of(link.channel.lanes[0].reason)
        target = (await self.ask(ServeYardstick(size, iterations))).port
        rate = await perftest.write(port, size, iterations, (self._host, target), self._stall_s)
        await self.ask(EndYardstick())
        return rate


class Link(NamedTuple):
    """A channel to the far end that is measured."""

    far: Far
    channel: Channel
    meter: Meter

    async def deliver(
        self, send: Callable[[Link], Awaitable[None]], *, is_in_place: bool = False
    ) -> Sample:
        """Time `send`, which sends all that the far end expects, and returns when it was consumed.

        Consumed is what was compared in the ring, or, if `is_in_place`, what lies in registered memory of the far
        end's, which is compared then. Raises `CorruptTransfer` if other bytes came, else what `send` raises.
        """
        await self.far.ask(Receive(is_in_place))
        self.meter.start(self.channel)
        begun_s = clock_s()
        try:
            await send(self)
        except AiordmaError:
            await self.channel.aclose()
            await self.far.ask(Report())
            raise
        seconds = clock_s() - begun_s
        sender = self.meter.usage(self.channel)
        receiver = (await self.far.ask(Report())).usage
        assert receiver is not None
        return Sample(seconds, sender, receiver)


@asynccontextmanager
async def far_end(peer: Address | None, stall_s: float) -> AsyncIterator[Far]:
    """The one at this address, or a process of our own, which is gone afterwards."""
    if peer is not None:
        async with aiordma.connect(*peer, config=CONTROL, timeout_s=stall_s) as control:
            yield Far(control, peer[0], stall_s)
        return
    # A session of its own: Ctrl-C reaches this process only, which then ends the other.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiordma", "bench", "--serve", f"{LOOPBACK}:0"),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        address = LOOPBACK, await _announced_port(process, stall_s)
        async with aiordma.connect(*address, config=CONTROL, timeout_s=stall_s) as control:
            yield Far(control, LOOPBACK, stall_s)
    finally:
        await _reap(process)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """It ends by itself, when the control connection does; if it fails, its traceback is worth the time."""
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except BaseException as exc:
        process.kill()
        await process.wait()
        if not isinstance(exc, TimeoutError):
            raise


async def _announced_port(process: asyncio.subprocess.Process, stall_s: float) -> int:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(stall_s):
            line = (await process.stdout.readline()).decode()
    except TimeoutError as exc:
        raise BenchError(f"the far end's process said nothing for {stall_s:g} s") from exc
    found = re.search(r":(\d+)$", line.strip())
    if found is None:
        raise BenchError("the far end's process died; see its message above")
    return int(found[1])
