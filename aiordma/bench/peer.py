"""One process of a benchmark, sender or receiver: orders on standard input, answers on standard output."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec

from aiordma import AiordmaError
from aiordma.bench import gauge, payload
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.gauge import Stopwatch, clock_s
from aiordma.bench.orders import Answer, Kind, Order, Ready, Setup
from aiordma.bench.ours import ChannelSide
from aiordma.bench.payload import Buffer
from aiordma.bench.raw import RawSide


class Side(Protocol):
    """One end of what is measured."""

    async def listen(self) -> int: ...
    async def accept(self) -> None: ...
    async def connect(self, port: int) -> None: ...
    async def send(self, source: Buffer, connections: int) -> None: ...
    async def receive(
        self, destination: Buffer, connections: int, ready: Callable[[], None]
    ) -> None: ...
    async def ping(self, count: int) -> list[float]: ...
    async def echo(self, count: int, ready: Callable[[], None]) -> None: ...
    def copied_bytes(self) -> int: ...
    async def aclose(self) -> None: ...


class Peer:
    """Carries out orders with one side and one buffer."""

    def __init__(self, side: Side, buffer: Buffer, ready: Callable[[], None]) -> None:
        self._side = side
        self._buffer = buffer
        self._ready = ready
        # The rings and all that a transfer takes come later, and count as extra.
        self._resident_bytes = gauge.resident_bytes()

    async def carry_out(self, order: Order) -> Answer:
        """Raises what the side raises, and `CorruptTransfer`."""
        side = self._side
        match order.do:
            case "listen":
                return Answer(port=await side.listen())
            case "accept":
                await side.accept()
            case "connect":
                await side.connect(order.port)
                return Answer(digest=payload.digest(self._buffer))
            case "send":
                watch = Stopwatch()
                await side.send(self._buffer, order.connections)
                return Answer(at_s=watch.started_at_s, cpu_s=watch.cpu_s())
            case "receive":
                return await self._receive(order)
            case "ping":
                return Answer(round_trips_s=await side.ping(order.count))
            case "echo":
                await side.echo(order.count, self._ready)
            case "memory":
                extra_bytes = gauge.peak_resident_bytes() - self._resident_bytes
                return Answer(extra_bytes=max(0, extra_bytes), copied_bytes=side.copied_bytes())
        return Answer()

    async def _receive(self, order: Order) -> Answer:
        payload.scrub(self._buffer)
        watch = Stopwatch()
        await self._side.receive(self._buffer, order.connections, self._ready)
        answer = Answer(at_s=clock_s(), cpu_s=watch.cpu_s())
        payload.verify(self._buffer, order.digest)
        return answer


def _say(answer: Answer | Ready) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


async def obey(setup: Setup) -> int:
    """Carry out orders until "quit" or the end of the input. Returns the exit status."""
    side: Side = RawSide(setup) if setup.kind == "raw" else ChannelSide(setup)
    make = payload.source if setup.role == "sender" else payload.scrubbed
    peer = Peer(side, make(setup.nbytes), lambda: _say(Ready()))
    loop = asyncio.get_running_loop()
    try:
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            order = msgspec.json.decode(line, type=Order)
            if order.do == "quit":
                break
            _say(await peer.carry_out(order))
    except (AiordmaError, BenchError, OSError) as exc:
        _say(Answer(error=f"{setup.role}: {exc}", is_corrupt=isinstance(exc, CorruptTransfer)))
        return 1
    finally:
        await side.aclose()
    return 0


def loop_factory(kind: Kind) -> Callable[[], asyncio.AbstractEventLoop]:
    """How to make the event loop that a kind is measured on."""
    if kind == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


def main() -> int:
    """Run the process that its one argument describes, a `Setup` as JSON."""
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    with asyncio.Runner(loop_factory=loop_factory(setup.kind)) as runner:
        return runner.run(obey(setup))


if __name__ == "__main__":
    sys.exit(main())
