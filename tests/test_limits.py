"""What channels cost, and when they give up: memory, the budget, time; some in processes of their own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing

import msgspec
import numpy as np
import pytest

from aiordma import (
    Busy,
    Channel,
    ChannelConfig,
)
from aiordma.ring import BUDGET
from tests.foreign import nothing_left
from tests.harness import (
    LANE_PARAMS,
    at_rest,
    channel_pair,
    noise,
    program,
    round_trips,
    usable,
)

SLOT = 16 << 10
CONFIG = ChannelConfig(slot_bytes=SLOT, slots=4)
Pair = tuple[Channel, Channel]


# Many channels


async def test_64_channels_in_one_loop(loop_kind: str) -> None:
    config = ChannelConfig(slot_bytes=SLOT, slots=8)

    async def converse(channel: Channel, mine: int, theirs: int) -> None:
        into = np.zeros(30 * SLOT + theirs, np.uint8)
        for _ in range(2):
            into[:] = 0
            await asyncio.gather(
                channel.send_tensor(noise(30 * SLOT + mine, mine)),
                channel.recv_tensor(into=into),
                channel.send(mine),
            )
            assert np.array_equal(into, noise(30 * SLOT + theirs, theirs))
            assert await channel.recv() == theirs

    async with nothing_left(), AsyncExitStack() as stack:
        used_bytes = BUDGET.used_bytes
        pairs = [await stack.enter_async_context(channel_pair("tcp", config)) for _ in range(64)]
        assert BUDGET.used_bytes - used_bytes == 64 * 2 * 8 * SLOT
        async with asyncio.TaskGroup() as group:
            for i, (near, far) in enumerate(pairs):
                group.create_task(converse(near, 2 * i, 2 * i + 1))
                group.create_task(converse(far, 2 * i + 1, 2 * i))
        for near, far in pairs:
            await at_rest(near, far)


async def test_the_budget_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ChannelConfig(slot_bytes=SLOT, slots=64)
    async with nothing_left(), AsyncExitStack() as stack:
        used_bytes = BUDGET.used_bytes
        monkeypatch.setattr(BUDGET, "total_bytes", used_bytes + 256 * SLOT)
        pairs: list[tuple[Channel, Channel]] = []

        async def fill() -> None:
            while True:
                pairs.append(await stack.enter_async_context(channel_pair("memory", config)))

        with pytest.raises(Busy, match="a ring needs 4 slots"):
            await fill()
        assert len(pairs) > 5
        sizes = [port.ring.slots for pair in pairs for end in pair for port in end._link.ports]
        assert sizes == sorted(sizes, reverse=True)
        assert (sizes[0], sizes[-1]) == (64, 4)
        assert used_bytes + sum(sizes) * SLOT == BUDGET.used_bytes <= BUDGET.total_bytes
        for near, far in (pairs[0], pairs[-1]):
            await usable(near, far)


MANY = """
import asyncio, sys
import numpy as np
import aiordma
from contextlib import AsyncExitStack

def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

async def main():
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(aiordma.listen())
        async with aiordma.connect(*listener.address) as near, await listener.accept() as far:
            await asyncio.gather(near.send_tensor(np.zeros(9)), far.recv_tensor())
        before = resident_bytes()
        pairs = []
        for _ in range(64):
            near = await stack.enter_async_context(aiordma.connect(*listener.address))
            pairs.append((near, await stack.enter_async_context(await listener.accept())))
        await asyncio.gather(*(near.ping() for near, _ in pairs))
        idle = resident_bytes() - before
        tensors = np.arange(64 << 20, dtype=np.uint8).reshape(64, 1 << 20)
        into = np.zeros((64, 1 << 20), np.uint8)
        into += 1
        before = resident_bytes()
        for _ in range(3):
            await asyncio.gather(
                *(near.send_tensor(tensors[i]) for i, (near, _) in enumerate(pairs)),
                *(far.recv_tensor(into=into[i]) for i, (_, far) in enumerate(pairs)),
            )
            assert np.array_equal(tensors, into)
        print([idle, resident_bytes() - before])

asyncio.run(main())
"""


async def test_64_idle_channels_cost_less_than_64_mib() -> None:
    """Both ends of each live in that process; at work, they hold what lies in their rings and no more."""
    async with program(MANY) as process:
        assert process.stdout is not None
        idle_bytes, busy_bytes = msgspec.json.decode(await process.stdout.read())
    assert idle_bytes < 64 << 20
    assert busy_bytes < (64 << 20) + (16 << 20)  # one early chunk of 1 MiB each


# One large transfer


SENDER = """
import asyncio, sys
import numpy as np
import aiordma

async def main():
    array = np.zeros(1 << 30, np.uint8)
    array[:: (1 << 20) + 1] = 1 + np.arange(1024) % 255
    async with aiordma.connect("127.0.0.1", int(sys.argv[1])) as channel:
        await channel.send_tensor(array, confirm=True)

asyncio.run(main())
"""

RECEIVER = """
import asyncio, sys
import numpy as np
import aiordma

def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

async def main():
    async with aiordma.listen() as listener:
        print(listener.address[1], flush=True)
        async with await listener.accept() as channel:
            transfers = channel.incoming()
            transfer = await anext(transfers)
            before = highest = resident_bytes()
            seen = 0
            total = np.zeros((), np.uint64)
            async for chunk in transfer.chunks():
                with chunk:
                    for _, first, view in chunk.parts():
                        marks = view[-first % ((1 << 20) + 1) :: (1 << 20) + 1]
                        total += marks.sum(dtype=np.uint64)
                        assert np.count_nonzero(view) == marks.size
                        seen += view.size
                highest = max(highest, resident_bytes())
            print([seen, int(total), highest - before], flush=True)
            await transfers.aclose()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_1_gib_by_chunks_takes_a_ring_and_no_more() -> None:
    async with program(RECEIVER) as receiver:
        assert receiver.stdout is not None
        port = int(await receiver.stdout.readline())
        async with program(SENDER, port) as sender:
            seen, total, raised_bytes = msgspec.json.decode(await receiver.stdout.readline())
            assert await sender.wait() == 0
    assert seen == 1 << 30
    assert total == sum(1 + i % 255 for i in range(1024))
    assert raised_bytes <= (8 << 20) + (16 << 20)


# Slow consumers


@pytest.mark.parametrize("kind", LANE_PARAMS)
async def test_a_consumer_that_keeps_its_chunks_blocks_no_other(kind: str) -> None:
    config = ChannelConfig(slot_bytes=SLOT, slots=8)
    async with nothing_left(), channel_pair(kind, config) as (near, far):
        sending = asyncio.create_task(near.send_tensor(noise(100 * SLOT)))
        async with aclosing(far.incoming()) as transfers:
            slow = (await anext(transfers)).chunks()
            kept = [await anext(slow) for _ in range(6)]
            await round_trips(near, far)
            assert far.stats().received_chunks == 6  # its share, and it gets no more
            for i in range(5):
                other = asyncio.create_task(near.send_tensor(noise(20 * SLOT, i)))
                got = await (await anext(transfers)).arrays()
                assert np.array_equal(got["tensor"], noise(20 * SLOT, i))
                await other
            for chunk in kept:
                chunk.release()
            async for chunk in slow:
                chunk.release()
        await sending
        await usable(near, far)
