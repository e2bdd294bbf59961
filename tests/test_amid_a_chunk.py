"""A call that ends while a chunk is half sent or half received: its memory is left alone, and the lane in step."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from aiordma import ChannelConfig, TransferAborted, TransferTimeout
from aiordma.wire import frames
from aiordma.wire.control import Abort, Acked, Open
from aiordma.wire.frames import ChunkHeader, CreditHeader
from aiordma.wire.hello import Limits
from tests.foreign import CONFIG as FOREIGN, connected, nothing_left
from tests.harness import CANARY, LARGE, cancel, channel_pair, noise, round_trips, until, usable


async def test_a_send_that_the_peer_acknowledges_before_it_has_it(loop_kind: str) -> None:
    """The memory is the caller's again all the same: no peer's word makes us read what changed since."""
    limits = Limits(4, LARGE, 8, 1 << 14, 8, 1 << 17)
    async with nothing_left(), connected("server", limits=limits) as (channel, foreign):
        memory = noise(LARGE)
        sending = asyncio.create_task(channel.send_tensor(memory))
        transfer = (await foreign.hear(Open)).transfer
        await foreign.say(Acked(transfer))
        await sending
        memory[:] = ~noise(LARGE)
        frame = await foreign.lane_frame()
        assert not isinstance(frame, CreditHeader)
        assert frame[1] == noise(LARGE).tobytes()


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("is_awake", [False, True])
async def test_a_receive_amid_a_chunk(loop_kind: str, chunk: int, is_awake: bool) -> None:
    truth = np.resize(noise(LARGE), 4 * LARGE)
    config = ChannelConfig(slot_bytes=LARGE, slots=4)
    async with nothing_left(), channel_pair("tcp", config) as (near, far):
        into = np.zeros_like(truth)
        first = asyncio.create_task(far.recv_tensor(into=into))
        await round_trips(far)
        if is_awake:  # it has the transfer, and waits for the chunks
            near._link._post = lambda port: False  # type: ignore[method-assign]
        sending = asyncio.create_task(near.send_tensor(truth))
        if is_awake:
            await round_trips(near, far)
            del near._link._post
            near._link._fill_all()
        count = far.stats
        await until(lambda: chunk <= (n := count().received_chunks) and into[n * LARGE :].any())
        assert chunk or not count().received_chunks
        await cancel(first)
        into[:] = CANARY
        if chunk:
            with pytest.raises(TransferAborted, match="the receiver was cancelled"):
                await sending
            sending = asyncio.create_task(near.send_tensor(truth))
        else:
            await until(lambda: count().received_chunks)
            await round_trips(near, far, count=20)
            assert far.stats().received_chunks <= 2, "nobody claims them"
            assert far.stats().lanes[0].held_slots == 0, "other transfers need the slots"
        assert np.array_equal(await far.recv_tensor(), truth)
        await sending
        await usable(near, far)
        assert (into == CANARY).all(), "written after the call returned"


@pytest.mark.parametrize("end", ["timeout", "abort"])
async def test_a_transfer_that_fails_in_the_middle_of_a_chunk(end: str) -> None:
    """The rest of the chunk goes where it does no harm, and the lane stays in step."""
    config = dataclasses.replace(FOREIGN, idle_timeout_s=0.1 if end == "timeout" else 60)
    async with nothing_left(), connected("client", config) as (channel, foreign):
        into = np.zeros(8192, np.uint8)
        receiving = asyncio.create_task(channel.recv_tensor(into=into))
        transfer = await foreign.open(8192)
        await foreign.chunk(transfer, noise(4096).tobytes())
        header = ChunkHeader(foreign.free[0].pop(), 4096, transfer, 4096, None)
        data = frames.encode_chunk(header, foreign.count()) + bytes(4096)
        await foreign.lanes[0].write(data[:1000])
        await until(lambda: into[:4096].any())
        if end == "abort":
            await foreign.say(Abort(transfer, True, "aborted", "changed my mind"))
        else:
            assert (await foreign.hear(Abort)).cause == "timeout"
        with pytest.raises(TransferTimeout if end == "timeout" else TransferAborted):
            await receiving
        into[:] = 7
        await foreign.lanes[0].write(data[1000:])
        again = asyncio.create_task(channel.recv_tensor())
        await foreign.chunk(await foreign.open(64), bytes(range(64)))
        assert (await again).tolist() == list(range(64))
        assert (into == 7).all(), "written after the call returned"
