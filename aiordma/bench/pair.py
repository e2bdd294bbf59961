"""A sender and a receiver process, and what is asked of them together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec

from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.orders import Answer, Order, Ready, Setup

_END_S = 5.0
_LINE_BYTES = 1 << 22
"""More than the longest answer: some thousand round trips."""


class Sample(NamedTuple):
    """One transfer: from the sender's call until the last byte is in its place at the receiver."""

    seconds: float
    sender_cpu_s: float
    receiver_cpu_s: float


class Extra(NamedTuple):
    """What the transfers took beside the tensor, at each end, since set-up."""

    sender_bytes: int
    receiver_bytes: int
    copied_bytes: int


class _Process:
    def __init__(self, process: asyncio.subprocess.Process, stall_s: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._stall_s = stall_s

    def order(self, order: Order) -> None:
        self._stdin.write(msgspec.json.encode(order) + b"\n")

    async def answer(self) -> Answer:
        answer = msgspec.json.decode(await self._line(), type=Answer)
        if answer.error:
            raise (CorruptTransfer if answer.is_corrupt else BenchError)(answer.error)
        return answer

    async def ready(self) -> None:
        msgspec.json.decode(await self._line(), type=Ready)

    async def _line(self) -> bytes:
        try:
            async with asyncio.timeout(self._stall_s):
                line = await self._stdout.readline()
        except TimeoutError as exc:
            raise BenchError(f"a process of the benchmark stalled for {self._stall_s:g} s") from exc
        if not line:
            raise BenchError("a process of the benchmark died; see its traceback above")
        return line


class Pair:
    """Both processes, connected. Made by `open_pair`."""

    def __init__(self, sender: _Process, receiver: _Process) -> None:
        self._sender = sender
        self._receiver = receiver
        self._digest = 0

    async def connect(self) -> None:
        """Connect the sender to the receiver."""
        self._receiver.order(Order("listen"))
        port = (await self._receiver.answer()).port
        self._receiver.order(Order("accept"))
        self._sender.order(Order("connect", port=port))
        self._digest = (await self._sender.answer()).digest
        await self._receiver.answer()

    async def transfer(self, connections: int = 1) -> Sample:
        """Move the tensor once, and verify it. `connections` counts for raw sockets only."""
        self._receiver.order(Order("receive", connections=connections, digest=self._digest))
        await self._receiver.ready()
        self._sender.order(Order("send", connections=connections))
        sent = await self._sender.answer()
        received = await self._receiver.answer()
        return Sample(received.at_s - sent.at_s, sent.cpu_s, received.cpu_s)

    async def round_trips(self, count: int) -> list[float]:
        """Seconds of each of `count` round trips of a small message, each verified."""
        self._receiver.order(Order("echo", count=count))
        await self._receiver.ready()
        self._sender.order(Order("ping", count=count))
        seconds = (await self._sender.answer()).round_trips_s
        await self._receiver.answer()
        return seconds

    async def extra(self) -> Extra:
        """What all transfers so far took beside the tensor."""
        self._sender.order(Order("memory"))
        self._receiver.order(Order("memory"))
        sender, receiver = await self._sender.answer(), await self._receiver.answer()
        copied_bytes = sender.copied_bytes + receiver.copied_bytes
        return Extra(sender.extra_bytes, receiver.extra_bytes, copied_bytes)


@asynccontextmanager
async def open_pair(setup: Setup, *, stall_s: float) -> AsyncIterator[Pair]:
    """Two connected processes like `setup`, whose role is replaced; both are gone afterwards."""
    async with AsyncExitStack() as stack:
        sender, receiver = [
            await stack.enter_async_context(
                _process(msgspec.structs.replace(setup, role=role), stall_s)
            )
            for role in ("sender", "receiver")
        ]
        pair = Pair(sender, receiver)
        await pair.connect()
        yield pair
        for process in (sender, receiver):
            process.order(Order("quit"))


@asynccontextmanager
async def _process(setup: Setup, stall_s: float) -> AsyncIterator[_Process]:
    # A session of its own: Ctrl-C reaches this process only, which then ends the other.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiordma.bench.peer", msgspec.json.encode(setup).decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
        start_new_session=True,
    )
    is_good = False
    try:
        yield _Process(process, stall_s)
        is_good = True
    finally:
        if not is_good and process.returncode is None:
            process.kill()
        await _reap(process)


async def _reap(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
