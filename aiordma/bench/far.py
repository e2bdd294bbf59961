"""The far end of a measurement: another process of this machine, or one on the peer's. It receives, and verifies.

What it is told comes as messages over a channel of its own, over TCP; each is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

import aiordma
from aiordma import AiordmaError, Channel, ChannelConfig
from aiordma.bench import payload, perftest
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.meter import Meter, Usage
from aiordma.bench.payload import Buffer

CONTROL: Final = ChannelConfig(verbs=False)
PROBE_S: Final = 10.0
"""Emulated processors, and networks that lose packets, are given the time."""
_BUDGET_BYTES: Final = 1 << 30


class Open(msgspec.Struct, frozen=True, tag=True):
    """Be ready for a channel with this ring, and deliveries of `payload.source(nbytes)`; the answer has its port."""

    nbytes: int
    slot_bytes: int
    slots: int
    is_verbs: bool
    checksum: bool


class Accept(msgspec.Struct, frozen=True, tag=True):
    """Take that channel."""


class Receive(msgspec.Struct, frozen=True, tag=True):
    """Receive a delivery, by any number of transfers: the `meta` of each is where it begins."""

    is_in_place: bool = False
    """It is one transfer, and goes to registered memory, which is compared when it is consumed."""


class Report(msgspec.Struct, frozen=True, tag=True):
    """Answered when all of it was received and right, with what it took."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Close that channel."""


class ServeYardstick(msgspec.Struct, frozen=True, tag=True):
    """Start the end of perftest that is written to; the answer has its port."""

    size: int
    iterations: int


class EndYardstick(msgspec.Struct, frozen=True, tag=True):
    """Answered when it is done."""


Order = Open | Accept | Receive | Report | Close | ServeYardstick | EndYardstick
_ANY_ORDER: Final[Any] = Order  # to mypy a union is no type[T]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How it went. `error` is empty if it went well."""

    error: str = ""
    is_corrupt: bool = False
    port: int = 0
    usage: Usage | None = None


class FarEnd:
    """Carries orders out, one at a time."""

    def __init__(self, control: Channel, host: str, stall_s: float) -> None:
        self._control = control
        self._host = host
        self._stall_s = stall_s
        self._expected = payload.source(0)
        self._into = payload.source(0)
        self._listener: aiordma.Listener | None = None
        self._channel: Channel | None = None
        self._meter: Meter | None = None
        self._receiving: asyncio.Task[Usage] | None = None
        self._target: perftest.Target | None = None

    async def obey(self) -> None:
        """Until the near end closes the control channel."""
        try:
            while True:
                order: Order = await self._control.recv(type=_ANY_ORDER)
                try:
                    answer = await self._carry_out(order)
                except (AiordmaError, BenchError, OSError) as exc:
                    is_corrupt = isinstance(exc, CorruptTransfer)
                    answer = Answer(error=f"the far end: {exc}", is_corrupt=is_corrupt)
                await self._control.send(answer)
        except aiordma.ChannelClosed:
            pass
        finally:
            await self._close()

    async def _carry_out(self, order: Order) -> Answer:
        match order:
            case Open():
                return Answer(port=await self._listen(order))
            case Accept():
                assert self._listener is not None
                self._channel = await self._listener.accept()
            case Receive():
                assert self._channel is not None
                assert self._meter is not None
                receive = self._receive_in_place if order.is_in_place else self._receive
                self._receiving = asyncio.create_task(receive(self._channel, self._meter))
            case Report():
                assert self._receiving is not None
                return Answer(usage=await self._receiving)
            case Close():
                await self._close()
            case ServeYardstick():
                return Answer(port=await self._serve_yardstick(order))
            case EndYardstick():
                target, self._target = self._target, None
                assert target is not None
                await target.end(self._stall_s)
        return Answer()

    async def _listen(self, order: Open) -> int:
        await self._close()
        allow(order.slot_bytes)
        if self._expected.nbytes != order.nbytes:
            self._expected = payload.source(order.nbytes)
        self._meter = Meter()
        config = ChannelConfig(
            slot_bytes=order.slot_bytes,
            slots=order.slots,
            verbs=order.is_verbs,
            checksum=order.checksum,
            probe_s=PROBE_S,
            idle_timeout_s=self._stall_s,
        )
        self._listener = await listen(self._host, 0, config)
        return self._listener.address[1]

    async def _receive(self, channel: Channel, meter: Meter) -> Usage:
        meter.start(channel)
        left_bytes = self._expected.nbytes
        async with contextlib.aclosing(channel.incoming()) as transfers:
            async for transfer in transfers:
                start = msgspec.convert(transfer.meta, int)
                async with contextlib.aclosing(transfer.chunks()) as chunks:
                    async for chunk in chunks:
                        with chunk:
                            verify_part(self._expected, start + chunk.offset, chunk.view)
                        left_bytes -= chunk.nbytes
                if left_bytes <= 0:
                    return meter.usage(channel)
        raise BenchError(f"the channel ended {left_bytes} bytes too early")

    async def _receive_in_place(self, channel: Channel, meter: Meter) -> Usage:
        if self._into.nbytes != self._expected.nbytes:
            self._into = np.zeros_like(self._expected)
        channel.register(self._into)
        self._into[:] = 0
        meter.start(channel)
        await channel.recv_tensor(into=self._into)
        usage = meter.usage(channel)
        verify_part(self._expected, 0, self._into.data)
        return usage

    async def _serve_yardstick(self, order: ServeYardstick) -> int:
        assert self._channel is not None
        port = perftest.port_of(self._channel.lanes[0].reason)
        self._target = await perftest.serve(port, order.size, order.iterations, self._stall_s)
        return self._target.tcp_port

    async def _close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        if self._channel is not None:
            await self._channel.aclose()
        if self._listener is not None:
            await self._listener.aclose()
        if self._target is not None:
            await self._target.kill()
        self._receiving = self._channel = self._listener = self._target = None


def verify_part(expected: Buffer, start: int, view: memoryview) -> None:
    """Raises `CorruptTransfer` unless the view holds the bytes that are expected from `start` on."""
    got = np.frombuffer(view, np.uint8)
    want = expected[start : start + got.nbytes]
    words = got.nbytes & ~7
    is_right = want.nbytes == got.nbytes
    is_right = is_right and np.array_equal(
        got[:words].view(np.uint64), want[:words].view(np.uint64)
    )
    if not (is_right and np.array_equal(got[words:], want[words:])):
        raise CorruptTransfer(
            f"{got.nbytes} bytes arrived for offset {start}, but not those that were sent"
        )


def allow(slot_bytes: int) -> None:
    """Make room in the memory budget for rings of such slots, and for what is sent from."""
    aiordma.set_memory_budget(max(_BUDGET_BYTES, 64 * slot_bytes))


async def listen(host: str, port: int, config: ChannelConfig) -> aiordma.Listener:
    """On any address: whoever gives one that is not loopback was told what it means."""
    return await aiordma.listen(host, port, config=config, insecure=True)


async def serve(address: tuple[str, int], *, stall_s: float, say: Callable[[str], None]) -> None:
    """Be the far end of one measurement. `say` gets the line that the near end of this machine waits for."""
    host, port = address
    async with await listen(host, port, CONTROL) as listener:
        say(f"serving on {host}:{listener.address[1]}")
        async with await listener.accept() as control:
            await FarEnd(control, host, stall_s).obey()
