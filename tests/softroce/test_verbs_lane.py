"""Channels over verbs lanes, on the kernel's RDMA device: what they move, what it costs, what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig, TransferAborted
from aiordma.lanes.outbox import Frame
from tests.harness import cancel, noise, round_trips, turns, usable
from tests.softroce.lanes import CONFIG, SIZE, pair, resources

pytestmark = [pytest.mark.verbs, pytest.mark.usefixtures("loop_kind", "clean_device")]


async def test_tensors_arrive_whole_both_ways(record_property):
    async with pair(require="verbs") as (near, far):
        for channel in (near, far):
            (lane,) = channel.lanes
            assert lane.kind == "verbs"
            assert re.match(r"verbs: \S+/\d+, (RoCE v2|InfiniBand) \S+, MTU \d+$", lane.reason)
        for one, other in ((near, far), (far, near)):
            array = noise(SIZE, seed=3)
            _, got = await asyncio.gather(one.send_tensor(array, confirm=True), other.recv_tensor())
            assert np.array_equal(got, array)
        await usable(near, far)
        record_property("lane_bytes", near.stats().received_bytes + far.stats().received_bytes)


async def test_several_lanes_share_the_load(record_property):
    config = ChannelConfig(slot_bytes=1 << 15, lanes=3, probe_s=10)
    async with pair(config, require="verbs") as (near, far):
        array = noise(4 << 20)
        into = np.zeros_like(array)
        await asyncio.gather(near.send_tensor(array), far.recv_tensor(into=into))
        assert np.array_equal(into, array)
        shares = [lane.sent_bytes / array.nbytes for lane in near.stats().lanes]
        assert len(shares) == 3
        assert min(shares) >= 0.15
        assert sum(shares) == 1
        record_property("lane_bytes", far.stats().received_bytes)


async def test_registered_memory_is_sent_and_folded_without_a_copy(record_property):
    async with pair(require="verbs") as (near, far):
        array = noise(SIZE).view(np.int8)
        registration = near.register(array)
        assert registration.is_pinned
        assert registration.nbytes == SIZE
        total = 0

        async def fold() -> None:
            nonlocal total
            transfer = await anext(far.incoming())
            async for chunk in transfer.chunks():
                with chunk:
                    total += sum(int(values.sum(dtype=np.int64)) for _, _, values in chunk.parts())

        outgoing = aiordma.prepare({"w": array[100:]})  # a view of what is registered
        await asyncio.gather(near.send_tensors(outgoing), fold())
        assert total == int(array[100:].sum(dtype=np.int64))
        assert near.stats().copied_bytes == far.stats().copied_bytes == 0

        registration.release()
        await asyncio.gather(near.send_tensors(outgoing), fold())
        assert near.stats().copied_bytes == array.nbytes - 100
        assert far.stats().copied_bytes == 0
        record_property("lane_bytes", far.stats().received_bytes)


async def test_one_registration_serves_all_channels_and_ends_with_its_owner():
    async with pair() as (one, _), pair() as (other, _):
        before = resources()["mr"]
        array = noise(SIZE)
        assert one.register(array).is_pinned
        assert other.register(array).is_pinned
        assert resources()["mr"] == before + 1
        del array
        assert resources()["mr"] == before


async def test_a_cancelled_send_reads_nothing_more_and_the_channel_goes_on():
    """Whatever came was read before the call returned: afterwards the memory holds something else."""
    config = dataclasses.replace(CONFIG, checksum=False)
    async with pair(config, require="verbs") as (near, far):
        for is_registered in (False, True):
            for count in (0, 1, 3, 8, 20):
                truth = noise(SIZE, seed=count)
                array = truth.copy()
                if is_registered:
                    near.register(array)
                comparing = asyncio.create_task(compare(far, truth))
                sending = asyncio.create_task(near.send_tensor(array))
                await turns(count)
                await cancel(sending)
                array[:] = ~truth
                await round_trips(near, far)
                if comparing.done():
                    comparing.result()
                await cancel(comparing)
            await usable(near, far)


async def compare(channel: Channel, truth: np.ndarray) -> None:
    """Each chunk of the next transfer, as it comes."""
    transfer = await anext(channel.incoming())
    with contextlib.suppress(TransferAborted):
        async for chunk in transfer.chunks():
            with chunk:
                for _, first, values in chunk.parts():
                    assert np.array_equal(values, truth[first : first + values.size])


async def test_a_cancelled_receive_writes_nothing_more_and_the_channel_goes_on():
    async with pair(require="verbs") as (near, far):
        for turns in (0, 2, 10, 30):
            into = np.zeros(SIZE, np.uint8)
            sending = asyncio.create_task(near.send_tensor(noise(SIZE, seed=1)))
            receiving = asyncio.create_task(far.recv_tensor(into=into))
            for _ in range(turns):
                await asyncio.sleep(0)
            await cancel(receiving)
            before = into.copy()
            await cancel(sending)
            await usable(near, far)
            assert np.array_equal(into, before)


async def test_many_transfers_at_once():
    async with pair(ChannelConfig(slot_bytes=4096, probe_s=10), require="verbs") as (near, far):
        arrays = [noise(100 + 997 * i, seed=i) for i in range(40)]
        sends = [asyncio.create_task(near.send_tensor(array)) for array in arrays]
        got = await asyncio.gather(*(far.recv_tensor() for _ in arrays))
        await asyncio.gather(*sends)
        assert all(np.array_equal(a, b) for a, b in zip(got, arrays, strict=True))


async def test_at_most_one_completion_for_four_chunks_and_one_doorbell_a_batch():
    async with pair(require="verbs") as (near, far):
        batches: list[list[Frame]] = []
        queue_pair = near._link.ports[0].lane._qp  # type: ignore[attr-defined]
        submit = queue_pair.submit

        def count(batch: list[Frame]) -> None:
            batches.append(batch)
            submit(batch)

        queue_pair.submit = count
        array = noise(8 << 20)
        near.register(array)
        await asyncio.gather(near.send_tensor(array), far.recv_tensor())
        frames = [frame for batch in batches for frame in batch]
        chunks = [frame for frame in frames if frame.pieces]
        assert len(chunks) == 128
        assert sum(frame.is_signalled for frame in frames) <= len(chunks) / 4
        assert len(batches) <= len(chunks) / 2


async def test_more_queue_pairs_than_one_completion_queue_has_room_for(monkeypatch):
    """Overflow would be fatal to all of them: a second queue is added before."""
    monkeypatch.setattr("aiordma.lanes.verbs.device.COMPLETIONS", 256)
    before = resources()
    config = ChannelConfig(slot_bytes=4096, slots=4, lanes=3, probe_s=10)
    async with pair(config, require="verbs") as (near, far):
        assert resources()["qp"] == before["qp"] + 6
        assert resources()["cq"] >= before["cq"] + 2
        await usable(near, far)


async def test_two_event_loops_have_a_device_each():
    """One in a thread of its own: neither sees the other's completions."""

    async def converse() -> int:
        async with pair(require="verbs") as (near, far):
            await usable(near, far)
            return resources()["ctx"]

    async with pair(require="verbs") as (near, far):
        contexts = resources()["ctx"]
        assert await asyncio.to_thread(asyncio.run, converse()) == contexts + 1
        await usable(near, far)


async def test_event_loops_in_threads_open_and_close_devices_side_by_side():
    """Up to pyverbs 56 a completion channel's descriptor is known only by being the new one."""

    async def converse() -> None:
        async with pair(require="verbs") as (near, far):
            await usable(near, far)

    def again_and_again() -> None:
        for _ in range(5):
            asyncio.run(converse())

    await asyncio.gather(*(asyncio.to_thread(again_and_again) for _ in range(3)))


async def test_a_device_without_memory_windows(monkeypatch):
    """Each lane has a protection domain of its own, and all is sent through the ring."""
    monkeypatch.setattr("aiordma.lanes.verbs.device._has_windows", lambda attributes: False)
    before = resources()
    async with pair(require="verbs") as (near, far):
        assert resources()["pd"] == before["pd"] + 1 + 2
        array = noise(SIZE)
        assert not near.register(array).is_pinned
        _, got = await asyncio.gather(near.send_tensor(array), far.recv_tensor())
        assert np.array_equal(got, array)
        assert near.stats().copied_bytes == SIZE
        await usable(near, far)
