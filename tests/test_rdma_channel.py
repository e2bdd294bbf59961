"""Channels over a device: what a chunk costs there, and when memory that it reads is the caller's again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from unittest import mock

import numpy as np
import pytest

from aiordma import Channel, ChannelConfig, Chunk, TransferAborted
from aiordma.errors import ChannelBroken
from aiordma.lanes.rdma import RdmaLane
from tests.fake_device import queue_pair
from tests.foreign import nothing_left
from tests.harness import cancel, channel_pair, noise, round_trips, turns, until, usable

pytestmark = pytest.mark.usefixtures("loop_kind")

CHUNKS = 256
SLOT = 4096
Pair = tuple[Channel, Channel]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with nothing_left():
        async with channel_pair("rdma", ChannelConfig(slot_bytes=SLOT)) as (near, far):
            yield near, far
            if not near.is_closed:
                await usable(near, far)


async def fold(channel: Channel) -> int:
    """Sum what comes up, chunk by chunk, from where it lies."""
    total = 0
    async with aclosing(channel.incoming()) as transfers:
        transfer = await anext(transfers)
        async for chunk in transfer.chunks():
            with chunk:
                total += sum(int(view.sum(dtype=np.int64)) for _, _, view in chunk.parts())
    return total


# What it costs


async def test_the_cost_of_256_chunks_by_reference(loop_kind: str) -> None:
    """Slots of 1 MiB, 8 of them: the defaults."""
    async with nothing_left(), channel_pair("rdma") as (near, far):
        array = np.resize(noise(8 << 20), CHUNKS << 20)
        assert near.register(array).is_pinned
        _, total = await asyncio.gather(near.send_tensor(array), fold(far))
        assert total == int(array.sum(dtype=np.int64))
        sender, receiver = queue_pair(near).counts, queue_pair(far).counts
        assert near.stats().sent_chunks == CHUNKS
        assert near.stats().copied_bytes == far.stats().copied_bytes == 0
        assert sender.read_bytes == array.nbytes
        assert sender.send_completions <= CHUNKS / 4
        assert sender.frames <= CHUNKS + 2
        assert sender.doorbells <= receiver.frames + 2  # each CREDIT lets one batch go
        # A CREDIT names a quarter of the slots or more, but for the last.
        assert receiver.doorbells == receiver.frames == receiver.work_requests <= CHUNKS / 2 + 1
        assert receiver.send_completions <= receiver.frames / 20


async def test_the_cost_of_chunks_that_are_copied(loop_kind: str) -> None:
    async with nothing_left(), channel_pair("rdma") as (near, far):
        array = np.resize(noise(8 << 20), 64 << 20)
        await asyncio.gather(near.send_tensor(array), fold(far))
        sender = queue_pair(near).counts
        assert near.stats().copied_bytes == array.nbytes
        assert far.stats().copied_bytes == 0
        assert sender.doorbells <= 64 + 2
        assert sender.send_completions <= 64 / 4


@pytest.mark.parametrize("is_registered", [False, True])
@pytest.mark.parametrize("is_duplex", [False, True])
@pytest.mark.parametrize("slots", [4, 5, 6, 8, 16, 64])
async def test_completions_are_few_whatever_the_ring(
    slots: int, is_duplex: bool, is_registered: bool
) -> None:
    config = ChannelConfig(slot_bytes=SLOT, slots=slots)
    async with nothing_left(), channel_pair("rdma", config) as ends:
        array = noise(128 * SLOT)
        ways = [ends, ends[::-1]][: 1 + is_duplex]
        for end, _ in ways if is_registered else ():
            end.register(array)
        calls = [(one.send_tensor(array), other.recv_tensor()) for one, other in ways]
        await asyncio.gather(*(call for pair in calls for call in pair))
        for end, _ in ways:
            assert queue_pair(end).counts.send_completions <= 128 / 4


@pytest.mark.parametrize("what", ["released", "another array", "a part of it"])
async def test_registration_that_does_not_cover_it_is_no_registration(
    pair: Pair, what: str
) -> None:
    near, far = pair
    array = noise(50 * SLOT)
    registered = {"another array": array.copy(), "a part of it": array[: 10 * SLOT]}.get(
        what, array
    )
    registration = near.register(registered)
    if what == "released":
        registration.release()
    _, got = await asyncio.gather(near.send_tensor(array), far.recv_tensor())
    assert np.array_equal(got, array)
    copied = near.stats().copied_bytes
    assert copied == (40 * SLOT if what == "a part of it" else 50 * SLOT)


async def test_a_chunk_of_registered_pieces_is_gathered_by_the_device(pair: Pair) -> None:
    near, far = pair
    arrays = {f"t{i}": noise(512, seed=i) for i in range(80)}
    for array in arrays.values():
        near.register(array)
    _, got = await asyncio.gather(near.send_tensors(arrays), far.recv_tensors())
    assert all(np.array_equal(got.arrays[name], array) for name, array in arrays.items())
    assert near.stats().copied_bytes == 0
    assert queue_pair(near).counts.work_requests >= len(arrays) + 10


# When memory is the caller's again


async def sending_by_reference(near: Channel, chunks: int) -> tuple[np.ndarray, asyncio.Task[None]]:
    array = noise(chunks * SLOT)
    near.register(array)
    return array, asyncio.create_task(near.send_tensor(array))


@pytest.mark.parametrize("let_through", range(6))
async def test_a_cancelled_send_returns_when_the_device_let_go(
    pair: Pair, let_through: int
) -> None:
    near, far = pair
    device = queue_pair(near)
    device.wire.hold()
    receiving = asyncio.create_task(far.recv_tensor())
    await turns(3)
    _, sending = await sending_by_reference(near, 20)
    await round_trips(near, far)
    device.wire.carry(let_through)
    for _ in range(2):  # a second one changes nothing
        sending.cancel()
        await round_trips(near, far)
        assert not sending.done(), "the device will still read it"
    assert near.stats().open_sends == 0
    device.wire.hold(False)
    with pytest.raises(asyncio.CancelledError):
        await sending
    read_bytes = device.counts.read_bytes
    assert read_bytes <= 6 * SLOT
    with pytest.raises(TransferAborted):
        await receiving
    await round_trips(near, far)
    assert device.counts.read_bytes == read_bytes


async def test_a_send_that_is_cancelled_after_its_acknowledgement(pair: Pair) -> None:
    """The peer says that it has all; it is our device that must be done."""
    near, far = pair
    device = queue_pair(near)
    device.wire.withholds_acks = True
    receiving = asyncio.create_task(far.recv_tensor())
    _, sending = await sending_by_reference(near, 3)
    await receiving
    await round_trips(near, far)
    assert not sending.done()
    sending.cancel()
    await round_trips(near, far)
    assert not sending.done()
    device.wire.withholds_acks = False
    device.wire.acknowledge()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_a_timeout_that_strikes_while_the_device_reads(pair: Pair) -> None:
    near, far = pair
    device = queue_pair(near)
    device.wire.hold()
    array = noise(3 * SLOT)
    near.register(array)
    asyncio.get_running_loop().call_later(0.05, device.wire.hold, False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await near.send_tensor(array)
    assert device.wire.is_idle
    await round_trips(near, far)


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_send_whose_peer_dies_returns_when_the_queue_pair_is_gone(
    pair: Pair, is_silent: bool
) -> None:
    near, far = pair
    device, peer = queue_pair(near), queue_pair(far)
    device.wire.hold()
    receiving = asyncio.create_task(far.recv_tensor())
    _, sending = await sending_by_reference(near, 20)
    await round_trips(near, far)
    peer.silent = is_silent
    peer.wire.is_gone = True
    with mock.patch("aiordma.port._GRACE_S", 0.0):
        device.wire.hold(False)
        await turns(2)
        assert not sending.done()
        if is_silent:
            await turns(20)
            assert not sending.done()
            far._link._control.abort()
        with pytest.raises(ChannelBroken, match=rf"lane 0 \(verbs\) .*{device.name}"):
            await sending
    assert device.wire.is_idle
    assert device.counts.read_bytes == 0
    peer.wire.is_gone = False
    await cancel(receiving)


async def test_what_a_lane_was_lost_by_is_told_though_the_peer_hangs_up_before_its_grace_is_over(
    pair: Pair,
) -> None:
    """Both ends lose it at once; who gives up first is chance."""
    near, far = pair
    device = queue_pair(near)
    device.wire.fail()
    await until(lambda: near._link.ports[0].lane.room == 0)
    far._link._control.abort()
    with pytest.raises(ChannelBroken, match=rf"lane 0 .*{device.name}: .*WR_FLUSH_ERR"):
        await near.recv()


async def test_slots_that_are_used_again_before_their_chunk_was_told(pair: Pair) -> None:
    """What a chunk is staged in must not go to another one of the same slot."""
    near, far = pair
    device = queue_pair(near)
    device.wire.withholds_acks = True
    receiving = asyncio.create_task(far.recv_tensor())
    sending = asyncio.create_task(near.send_tensor(noise(100 * SLOT)))
    await until(lambda: near.stats().sent_chunks == 12)  # all stages
    await round_trips(near, far)
    assert near.stats().sent_chunks == 12
    device.wire.withholds_acks = False
    device.wire.acknowledge()
    assert np.array_equal(await receiving, noise(100 * SLOT))
    await sending


async def test_room_that_credits_took_is_used_when_it_comes_back() -> None:
    """No chunk is under way then, whose completion would tell."""
    configs = (ChannelConfig(slot_bytes=SLOT, slots=slots) for slots in (4, 256))
    async with nothing_left(), channel_pair("rdma", *configs) as (near, far):
        wire, (port,) = queue_pair(far).wire, far._link.ports
        receiving = asyncio.create_task(near.recv_tensor())  # claimed in advance
        await round_trips(near, far)
        wire.withholds_acks = True
        sending = asyncio.create_task(near.send_tensor(noise(190 * SLOT)))
        transfer = await anext(far.incoming())
        async for chunk in transfer.chunks():
            chunk.release()
            await turns(3)  # a CREDIT for each
        await sending
        assert port.lane.room == 0
        back = noise(10 * SLOT)
        returning = asyncio.create_task(far.send_tensor(back))
        await round_trips(near, far)
        wire.withholds_acks = False
        wire.acknowledge()
        assert np.array_equal(await receiving, back)
        await returning


# Devices that tell nothing


def lanes_of(*channels: Channel) -> list[RdmaLane]:
    return [p.lane for c in channels for p in c._link.ports if isinstance(p.lane, RdmaLane)]


def tick(channel: Channel) -> None:
    """What the completion pump does four times a second, as long as anybody wants it."""
    pump = queue_pair(channel).device.pump
    assert pump._timer is not None
    pump._timer.cancel()
    pump._timer = None
    if sum(queue.tick(0.25) for queue in pump._queues):
        pump.watch()


@pytest.mark.parametrize("is_registered", [False, True])
@pytest.mark.parametrize("chunks", [6, 12, 37])
async def test_a_device_that_sleeps_until_the_next_doorbell(
    pair: Pair, chunks: int, is_registered: bool
) -> None:
    near, far = pair
    device, array = queue_pair(near), noise(chunks * SLOT)
    if is_registered:
        near.register(array)
    receiving = asyncio.create_task(far.recv_tensor())
    sending = asyncio.create_task(near.send_tensor(array))
    await until(lambda: near.stats().sent_chunks == chunks)
    device.wire.hold()
    await until(lambda: device.wire._posted)
    device.wire.is_asleep = True
    device.wire.hold(False)
    await round_trips(near, far)
    assert device.wire._posted
    assert not sending.done()
    for _ in range(2):
        tick(near)
    assert np.array_equal(await receiving, array)
    await sending


@pytest.mark.parametrize("end", ["sender", "receiver"])
async def test_a_device_that_never_tells_what_became_of_its_work(end: str) -> None:
    """The peer has all, and neither end would wait for anything but this device."""
    config = ChannelConfig(slot_bytes=SLOT, slots=8, close_timeout_s=0.2)
    async with nothing_left(), channel_pair("rdma", config) as (near, far):
        silent = near if end == "sender" else far
        array, into = noise(20 * SLOT), np.zeros(20 * SLOT, np.uint8)
        near.register(array)
        far.register(into)
        receiving = asyncio.create_task(far.recv_tensor(into=into))
        sending = asyncio.create_task(near.send_tensor(array, confirm=True))
        await until(lambda: far.stats().received_chunks == 20)
        queue_pair(silent).wire.withholds_acks = True
        await round_trips(near, far)
        assert not sending.done()
        with mock.patch("aiordma.port._GRACE_S", 0.0):
            while not silent.is_closed:
                tick(silent)
                await turns(1)
        match = rf"{queue_pair(silent).name}: the device did not tell within 1\d s"
        with pytest.raises(ChannelBroken, match=match):
            await silent.ping()
        await asyncio.wait([sending, receiving])
        assert not queue_pair(far).windows
        for call in (sending, receiving):
            assert call.exception() is None or isinstance(call.exception(), ChannelBroken)


@pytest.mark.parametrize("end", ["sender", "receiver"])
async def test_a_lost_event_is_found_while_a_transfer_is_open(pair: Pair, end: str) -> None:
    """Even if no work of ours is under way: what is due is the peer's chunks, or its CREDIT."""
    near, far = pair
    deaf = near if end == "sender" else far
    queue = queue_pair(deaf).reservation.queue
    sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
    chunks = (await anext(far.incoming())).chunks()
    first = await anext(chunks)
    for _ in range(4):  # all is told that could be
        await round_trips(near, far)
        tick(near)
        tick(far)
    assert not any(lane._outbox.is_busy for lane in lanes_of(near, far))
    queue.loses_events = True
    first.release()
    receiving = asyncio.create_task(release_all(chunks))
    await until(lambda: queue.entries)
    queue.loses_events = False
    await round_trips(near, far)
    assert queue.entries
    tick(deaf)
    await receiving
    await sending


async def release_all(chunks: AsyncIterator[Chunk]) -> None:
    async for chunk in chunks:
        chunk.release()
