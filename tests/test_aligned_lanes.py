"""The same bits over every lane, however many, with any chunks: aligned and staged."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import Aligned, Contribution, Staged, UpdateError
from tests.harness import LANE_PARAMS, at_rest, channel_pair, until
from tests.uplinks import committed, staged, update, weight_of


async def take(channel: Channel, place: Contribution) -> bool:
    return await place.receive(await anext(channel.incoming()))


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("kind", LANE_PARAMS)
@pytest.mark.parametrize("order", ["abc", "cab"])
@pytest.mark.parametrize("aggregate", [Staged, Aligned])
@pytest.mark.usefixtures("loop_kind")
async def test_lanes_chunks_and_order_do_not_show(
    kind: str, lanes: int, order: str, aggregate: type[Staged | Aligned]
):
    silos = {name: (weight_of(i), update(i, 3001)) for i, name in enumerate("abc")}
    slot_bytes = dict(zip(order, (4096, 64 * 37, 1 << 14), strict=True))
    aggregation = aggregate(silos["a"][1])
    async with AsyncExitStack() as stack:
        taking, sending, ends = [], [], []
        for name in order:
            config = ChannelConfig(
                slot_bytes=slot_bytes[name], slots=4, lanes=lanes, close_timeout_s=1.0
            )
            silo, server = await stack.enter_async_context(channel_pair(kind, config))
            ends += [silo, server]
            place = aggregation.begin(name, silos[name][0])
            taking.append(asyncio.ensure_future(take(server, place)))
        for silo, name in zip(ends[::2], order, strict=True):
            await asyncio.sleep(0)
            sending.append(asyncio.ensure_future(silo.send_tensors(silos[name][1], confirm=True)))
        async with asyncio.timeout(20):
            assert all(await asyncio.gather(*taking))
            await asyncio.gather(*sending)
        if aggregate is Aligned:  # folded where they lay
            assert all(server.stats().copied_bytes == 0 for server in ends[1::2])
        await at_rest(*ends)
    assert committed(aggregation) == staged(silos)


async def test_whoever_is_held_back_is_not_idle():
    config = ChannelConfig(slot_bytes=4096, slots=4)
    arrays = update(1, 3001)
    aligned = Aligned(arrays)
    async with channel_pair("tcp", config) as fast, channel_pair("tcp", config) as slow:
        places = {name: aligned.begin(name, 1.0) for name in ("fast", "slow")}
        taking = [
            asyncio.ensure_future(take(fast[1], places["fast"])),
            asyncio.ensure_future(take(slow[1], places["slow"])),
        ]
        sending = [asyncio.ensure_future(fast[0].send_tensors(arrays))]
        await until(lambda: not places["fast"].is_awaited)
        for _, server in (fast, slow):
            server._link.judge(asyncio.get_running_loop().time() + 1e6)
        sending.append(asyncio.ensure_future(slow[0].send_tensors(arrays)))
        async with asyncio.timeout(20):
            assert await asyncio.gather(*taking) == [True, True]
            await asyncio.gather(*sending)
    assert committed(aligned) == staged({"fast": (1.0, arrays), "slow": (1.0, arrays)})


async def test_a_restart_over_a_channel_leaves_it_at_rest():
    config = ChannelConfig(slot_bytes=4096, slots=4, close_timeout_s=1.0)
    arrays, bad = update(1, 3001), update(2, 3001)
    bad["float16"][-1, -1] = np.inf
    aligned = Aligned(arrays)
    async with channel_pair("tcp", config) as good, channel_pair("tcp", config) as evil:
        places = [aligned.begin("good", 1.0), aligned.begin("evil", 1.0)]
        taking = [
            asyncio.ensure_future(take(server, place))
            for (_, server), place in zip((good, evil), places, strict=True)
        ]
        sending = asyncio.gather(
            good[0].send_tensors(arrays), evil[0].send_tensors(bad), return_exceptions=True
        )
        async with asyncio.timeout(20):
            assert await taking[0] is False
            with pytest.raises(UpdateError, match=r"'float16' holds inf at \[3003, 2\]"):
                await taking[1]
            for error in await sending:
                assert isinstance(error, aiordma.TransferAborted | None)
            await at_rest(*good, *evil)
            again = asyncio.ensure_future(take(good[1], places[0]))
            await good[0].send_tensors(arrays)
            assert await again
    assert committed(aligned) == staged({"good": (1.0, arrays)})
