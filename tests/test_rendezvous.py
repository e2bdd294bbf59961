"""Receiving into registered memory: what goes straight there, and when nothing writes to it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from unittest import mock

import numpy as np
import pytest

from aiordma import Channel, ChannelConfig, TransferAborted
from aiordma.errors import ChannelClosed, ChecksumError
from aiordma.lanes.outbox import WINDOWS
from aiordma.lanes.rdma import RdmaLane
from tests.fake_device import queue_pair
from tests.foreign import nothing_left
from tests.harness import (
    CANARY,
    VERBS_KINDS,
    cancel,
    channel_pair,
    noise,
    round_trips,
    turns,
    until,
    usable,
)

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 4096
CHUNKS = 40
SIZE = CHUNKS * SLOT - 100
KINDS = [("rdma", 1), ("rdma", 3), *VERBS_KINDS]
Pair = tuple[Channel, Channel]


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    kind, lanes = getattr(request, "param", ("rdma", 1))
    async with nothing_left():
        config = ChannelConfig(slot_bytes=SLOT, slots=4, lanes=lanes)
        async with channel_pair(kind, config) as (near, far):
            yield near, far
            if not near.is_closed:
                await usable(near, far)
                for channel in (near, far):
                    assert not any(lane.windows._open for lane in lanes_of(channel))
                if kind == "rdma" and lanes == 1:
                    assert not any(
                        queue_pair(c).windows or queue_pair(c).unbound for c in (near, far)
                    )


def lanes_of(channel: Channel) -> list[RdmaLane]:
    return [port.lane for port in channel._link.ports if isinstance(port.lane, RdmaLane)]


def registered(channel: Channel, nbytes: int = SIZE) -> np.ndarray:
    array = np.full(nbytes, CANARY, np.uint8)
    assert channel.register(array).is_pinned
    return array


# What goes straight there


@pytest.mark.parametrize("how", ["recv_tensor", "recv_tensors", "into"])
@pytest.mark.parametrize("pair", KINDS, indirect=True)
async def test_what_is_received_into_registered_memory_is_not_copied(pair: Pair, how: str) -> None:
    near, far = pair
    into = registered(far)
    source = noise(SIZE)
    near.register(source)
    for _ in range(3):
        into[:] = CANARY
        before = far.stats().copied_bytes
        sending = asyncio.create_task(near.send_tensor(source, confirm=True))
        if how == "recv_tensor":
            await far.recv_tensor(into=into)
        elif how == "recv_tensors":
            await far.recv_tensors(into={"tensor": into})
        else:
            await (await anext(far.incoming())).into({"tensor": into})
        assert np.array_equal(into, source)
        await sending
        # Before the sender hears of the window it fills the rings.
        in_rings = 3 * 4 * SLOT * len(far.lanes)
        assert far.stats().copied_bytes - before <= min(in_rings, SIZE - 8 * SLOT)
    assert near.stats().copied_bytes == 0


@pytest.mark.parametrize("pair", KINDS, indirect=True)
async def test_only_what_is_registered_large_and_whole(pair: Pair) -> None:
    near, far = pair
    sizes = {"large": 30 * SLOT, "ragged": 9 * SLOT + 300, "small": 100, "other": 20 * SLOT}
    sources = {name: noise(size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    targets = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    for name in ("large", "ragged", "small"):
        far.register(targets[name])
    await asyncio.gather(near.send_tensors(sources), far.recv_tensors(into=targets))
    assert all(np.array_equal(targets[name], sources[name]) for name in sizes)
    assert sizes["other"] <= far.stats().copied_bytes < sum(sizes.values())


async def test_more_tensors_than_windows(pair: Pair) -> None:
    near, far = pair
    count = WINDOWS + 5
    sources = {f"t{i}": noise((3 + i) * SLOT, seed=i) for i in range(count)}
    targets = {name: np.zeros_like(array) for name, array in sources.items()}
    for target in targets.values():
        far.register(target)
    sending = asyncio.create_task(near.send_tensors(sources))
    receiving = asyncio.create_task(far.recv_tensors(into=targets))
    (lane,) = lanes_of(far)
    await until(lambda: lane.windows._open)
    assert len(lane.windows._open) == WINDOWS
    assert min(opened.header.nbytes for opened in lane.windows._open.values()) == 8 * SLOT
    await asyncio.gather(sending, receiving)
    assert all(np.array_equal(targets[name], sources[name]) for name in sources)


@pytest.mark.parametrize("why", ["released", "read-only", "no windows left", "several"])
async def test_else_it_comes_through_the_ring(pair: Pair, why: str) -> None:
    near, far = pair
    memory = np.zeros(SIZE, np.uint8)
    if why == "read-only":
        owner = memory.view()
        owner.flags.writeable = False
        assert far.register(owner).is_pinned
    elif why == "several":
        assert far.register(memory[: SIZE // 2]).is_pinned
    else:
        registration = far.register(memory)
        if why == "released":
            registration.release()
    queue_pair(far).is_out_of_windows = why == "no windows left"
    await asyncio.gather(near.send_tensor(noise(SIZE)), far.recv_tensor(into=memory))
    assert np.array_equal(memory, noise(SIZE))
    assert far.stats().copied_bytes == SIZE


async def test_nobody_is_asked_to_stop_after_the_last_chunk(pair: Pair) -> None:
    """That would cost a round trip."""
    near, far = pair
    (lane,) = lanes_of(far)
    into = registered(far)
    with mock.patch.object(lane._outbox, "stop") as stop:
        await asyncio.gather(near.send_tensor(noise(SIZE)), far.recv_tensor(into=into))
    stop.assert_not_called()


async def test_a_window_that_the_peer_has_not_heard_of_keeps_its_number(pair: Pair) -> None:
    """All came through the ring before. The next window of this number must not be taken for that one."""
    near, far = pair
    (lane,) = lanes_of(far)
    queue_pair(far).wire.hold()
    into, small = registered(far, 3 * SLOT), noise(3 * SLOT)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await near.send_tensor(small)
    await round_trips(near, far)
    assert lane.windows._stopping
    assert not receiving.done()
    queue_pair(far).wire.hold(False)
    await receiving
    assert np.array_equal(into, small)


async def test_memory_stays_registered_while_it_can_be_written_to(pair: Pair) -> None:
    near, far = pair
    into = np.zeros(SIZE, np.uint8)
    registration = far.register(into)
    queue_pair(near).wire.hold()
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    sending = asyncio.create_task(near.send_tensor(noise(SIZE)))
    await until(lambda: queue_pair(far).windows)
    regions = len(queue_pair(far).device.regions)
    registration.release()
    assert len(queue_pair(far).device.regions) == regions
    queue_pair(near).wire.hold(False)
    await asyncio.gather(sending, receiving)
    assert np.array_equal(into, noise(SIZE))
    assert len(queue_pair(far).device.regions) == regions - 1


# When nothing writes to it any more


@pytest.mark.parametrize("halves", [*range(20), *range(20, 2 * CHUNKS - 4, 2)])
@pytest.mark.parametrize("sides", ["receiver", "sender", "both"])
async def test_a_call_that_is_cancelled_amid_the_chunks(
    pair: Pair, sides: str, halves: int
) -> None:
    """The sender's device stands still after so many halves of a chunk, and goes on after the cancellation.

    Amid each of the first chunks, and between all: the ring's go as a whole, before the others.
    """
    near, far = pair
    wire, into, source = queue_pair(near).wire, registered(far), noise(SIZE)
    near.register(source)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await turns(3)
    await round_trips(near, far)
    wire.hold()
    sending = asyncio.create_task(near.send_tensor(source))
    await until(lambda: queue_pair(far).windows)
    for _ in range(halves):
        await until(lambda: wire._posted or sending.done())
        wire.carry(1)
        await turns(3)
    calls = {"receiver": [receiving], "sender": [sending], "both": [receiving, sending]}[sides]
    for call in calls:
        call.cancel()
    await round_trips(near, far)
    if halves > 6:  # the first four chunks may be for the slots
        assert queue_pair(far).windows, "closed while the peer's device may still write there"
        assert not receiving.done()
    into_then: np.ndarray | None = None

    def take_back(_: object) -> None:
        nonlocal into_then
        into[:] = CANARY
        into_then = into.copy()

    receiving.add_done_callback(take_back)
    wire.hold(False)
    await asyncio.wait([receiving])
    if receiving.cancelled() and sides == "receiver":
        await all_of(near, far, sending)
    await asyncio.wait([sending])
    await round_trips(near, far)
    assert into_then is not None
    assert np.array_equal(into, into_then), "written after the call had returned"
    outcomes = [receiving.exception() if not receiving.cancelled() else None]
    outcomes += [sending.exception() if not sending.cancelled() else None]
    assert all(outcome is None or type(outcome) is TransferAborted for outcome in outcomes)
    assert not queue_pair(far).windows


@pytest.mark.parametrize("pair", KINDS, indirect=True)
async def test_cancelled_when_so_many_chunks_have_come_or_gone(pair: Pair) -> None:
    """On a real device too: at every chunk boundary, both ends registered, either end cancelled."""
    near, far = pair
    for point in range(CHUNKS + 1):
        for is_sender in (False, True):
            into, source = registered(far), noise(SIZE, seed=point)
            near.register(source)
            receiving = asyncio.create_task(far.recv_tensor(into=into))
            sent, came = near.stats().sent_chunks, far.stats().received_chunks
            sending = asyncio.create_task(near.send_tensor(source))
            if is_sender:
                await so_many(lambda: near.stats().sent_chunks - sent, point)  # noqa: B023
            else:
                await so_many(lambda: far.stats().received_chunks - came, point)  # noqa: B023
            await cancel(sending if is_sender else receiving)
            if is_sender:
                source[:] = CANARY ^ 0xFF  # nobody reads it any more
                if not sending.cancelled():
                    await receiving
                elif not receiving.done() and near.stats().sent_chunks == sent:
                    await cancel(receiving)  # it was never opened
                await asyncio.wait([receiving])
                if not receiving.cancelled() and receiving.exception() is not None:
                    assert type(receiving.exception()) is TransferAborted
            was_whole = not receiving.cancelled() and receiving.exception() is None
            assert not was_whole or np.array_equal(into, noise(SIZE, seed=point))
            into[:] = CANARY
            if not is_sender:
                await all_of(near, far, sending)
            await usable(near, far)
            assert (into == CANARY).all(), "written after the call had returned"


async def so_many(chunks: Callable[[], int], count: int) -> None:
    await until(lambda: chunks() >= count)


async def all_of(near: Channel, far: Channel, sending: asyncio.Task[None]) -> None:
    """Until the send is over: its transfer was aborted, or is offered again."""
    again = asyncio.create_task(far.recv_tensor())
    (outcome,) = await asyncio.gather(sending, return_exceptions=True)
    assert outcome is None or isinstance(outcome, TransferAborted)
    await round_trips(near, far)
    await cancel(again)


async def test_a_receive_that_is_cancelled_before_the_first_chunk_loses_nothing(pair: Pair) -> None:
    near, far = pair
    wire = queue_pair(near).wire
    into, source = registered(far), noise(SIZE)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await turns(3)
    wire.hold()
    sending = asyncio.create_task(near.send_tensor(source))
    await until(lambda: queue_pair(far).windows)
    receiving.cancel()
    await round_trips(near, far)
    assert not receiving.done()
    wire.hold(False)
    await asyncio.wait([receiving])
    assert receiving.cancelled()
    into[:] = CANARY
    second = registered(far)
    await far.recv_tensor(into=second)
    await sending
    assert np.array_equal(second, source)
    assert (into == CANARY).all()


async def test_a_channel_that_closes_amid_it(pair: Pair) -> None:
    near, far = pair
    into = registered(far)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await turns(3)
    queue_pair(near).wire.hold()
    sending = asyncio.create_task(near.send_tensor(noise(SIZE)))
    await until(lambda: queue_pair(far).windows)
    await far.aclose()
    outcomes = await asyncio.gather(receiving, sending, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ChannelClosed}
    assert not queue_pair(far).windows


async def test_damage_fails_the_transfer_and_not_the_channel(pair: Pair) -> None:
    near, far = pair
    into = registered(far)
    with mock.patch("aiordma.outgoing.payload_check", return_value=7):
        sending = asyncio.create_task(near.send_tensor(noise(SIZE)))
        with pytest.raises(ChecksumError):
            await far.recv_tensor(into=into)
        with pytest.raises(ChecksumError):
            await sending
    into[:] = CANARY
    await usable(near, far)
    assert (into == CANARY).all()
