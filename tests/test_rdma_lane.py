"""What only a lane over queue pairs can meet: devices that refuse, peers that lie, memory that is still being read."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from aiordma.errors import ChannelBroken, RemoteProtocolError
from aiordma.lanes.outbox import Frame, Kind
from aiordma.lanes.rdma import RdmaLane
from aiordma.ring import CELLS, MemoryBudget, Ring
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader
from tests import fake_device
from tests.fake_device import FakeQueuePair
from tests.foreign import nothing_left
from tests.harness import LaneUser, cancel, chunk, noise, turns, until

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 64 << 10
SLOTS = 8


class End(LaneUser):
    """A lane's user that has its queue pair at hand."""

    def __init__(self, parts: tuple[FakeQueuePair, RdmaLane]) -> None:
        self.queue_pair, lane = parts
        self.rdma = lane
        super().__init__(lane, slots=list(range(SLOTS)))

    def register(self, array: np.ndarray) -> None:
        self.queue_pair.device.registry.add(array, array.data)


@pytest.fixture(params=[True])
async def ends(request) -> AsyncIterator[tuple[End, End]]:
    """Two ends, not started; `ends` False: their rings are not open yet."""
    budget = MemoryBudget(1 << 30)
    async with nothing_left():
        rings = Ring(SLOTS, SLOT, budget=budget), Ring(SLOTS, SLOT, budget=budget)
        pairs = fake_device.lane_pair(*rings, budget=budget, is_open=request.param)
        left, right = map(End, pairs)
        left.peer, right.peer = right, left
        yield left, right
        for end in (left, right):
            await end.lane.aclose()
            assert len(end.told("lost")) <= 1


def by_reference(end: End, seed: int = 0, offset: int = 0) -> np.ndarray:
    """Send registered memory, which is returned."""
    array = noise(SLOT, seed)
    end.register(array)
    end.send((ChunkHeader(0, SLOT, 1, offset, None), [array.data]))
    return array


# Memory


async def test_registered_memory_is_read_where_it_lies_until_it_is_sent(ends):
    left, right = (end.start() for end in ends)
    left.queue_pair.wire.hold()
    array = by_reference(left)
    await turns(10)
    assert not left.lane.recall(1, is_sending=True)
    assert left.lane.recall(2, is_sending=True)
    array[:] = 7
    left.queue_pair.wire.carry(1)
    array[:] = 9
    await until(lambda: left.told("sent"))
    assert left.lane.recall(1, is_sending=True)
    assert left.copied_bytes == 0
    await until(lambda: right.payloads)
    assert right.payloads[1, 0] == b"\x07" * SLOT
    assert right.copied_bytes == SLOT  # to where it was placed


async def test_memory_stays_registered_while_it_is_under_way(ends):
    left, right = (end.start() for end in ends)
    device = left.queue_pair.device
    left.queue_pair.wire.hold()
    array = by_reference(left)
    await turns(3)
    device.registry.clear()
    gc.collect()
    assert len(device.regions) == 3
    left.queue_pair.wire.hold(False)
    await until(lambda: right.payloads)
    assert right.payloads[1, 0] == array.tobytes()
    await until(lambda: left.told("sent"))
    assert len(device.regions) == 2  # the ring, and what it sends from


async def test_a_recall_asks_for_a_completion_where_none_was_due(ends):
    left, right = (end.start() for end in ends)
    arrays = [by_reference(left, offset=i) for i in range(2)]
    await until(lambda: len(right.payloads) == 2)
    right.lane.credit(0b11)
    await until(lambda: left.told("credited"))
    arrays += [by_reference(left, offset=2 + i) for i in range(2)]  # as the CREDIT's consequence
    left.rdma._outbox.credited(2)
    await until(lambda: len(right.payloads) == 4)
    await turns(20)
    assert len(left.told("sent")) == 2
    assert not left.lane.recall(1, is_sending=True)
    await until(lambda: len(left.told("sent")) == 4)
    assert left.lane.recall(1, is_sending=True)
    assert left.queue_pair.counts.send_completions == 2


# The path


@pytest.mark.parametrize("ends", [False, True], indirect=True, ids=["window", "no window"])
async def test_the_path_is_probed_both_ways_before_the_start(ends):
    await asyncio.gather(*(end.rdma.expose() for end in ends))
    assert not any(end.rdma.ticked(0.0) for end in ends)
    async with asyncio.timeout(5):
        await asyncio.gather(*(end.rdma.send_probe(4096) for end in ends))
    assert all(end.rdma.probe.is_well for end in ends)
    left, right = (end.start() for end in ends)
    left.send(*(chunk(bytes([i]) * 100, offset=i) for i in range(30)))
    right.lane.credit(1)
    await until(lambda: len(right.payloads) == len(left.told("sent")) == 30)
    await until(lambda: left.told("credited") == [1])


@pytest.mark.parametrize("ends", [False], indirect=True)
async def test_a_ring_that_is_not_open_is_not_written(ends):
    left, right = ends
    with pytest.raises(ChannelBroken, match=r"fake0/1, queue pair \d+: .*REM_ACCESS_ERR"):
        await left.rdma.send_probe(4096)
    with pytest.raises(ChannelBroken, match="WR_FLUSH_ERR"):
        await right.rdma.send_probe(4096)
    assert left.rdma.room == right.rdma.room == 0


async def test_a_probe_is_no_larger_than_the_slots_are():
    """Chunks are not either, and beyond small rings there is nothing to write to."""
    budget = MemoryBudget(1 << 30)
    async with nothing_left():
        rings = Ring(4, 64, budget=budget), Ring(4, 128, budget=budget)
        lanes = [lane for _, lane in fake_device.lane_pair(*rings, budget=budget)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(lane.send_probe(4096) for lane in lanes))
        await asyncio.gather(*(lane.aclose() for lane in lanes))


async def test_a_path_that_takes_nothing_large(ends):
    left, _ = ends
    left.queue_pair.wire.hold()
    probing = [asyncio.create_task(end.rdma.send_probe(4096)) for end in ends]
    assert "no packet got through in either direction" in left.rdma.probe.verdict()
    await until(lambda: "to the peer" in left.rdma.probe.verdict())
    left.queue_pair.wire.carry(1)
    await until(lambda: "large ones did not" in left.rdma.probe.verdict())
    for probe in probing:
        await cancel(probe)
        assert probe.cancelled()
    assert not any(end.rdma.probe.is_well for end in ends)


async def test_what_is_lost_before_the_start_is_told_then(ends):
    left, right = ends
    left.queue_pair.wire.fail()
    await until(lambda: left.rdma.room == 0)
    left.start()
    await until(lambda: left.told("lost"))
    (error,) = left.told("lost")
    assert type(error) is ChannelBroken
    right.start()


async def test_what_came_before_the_start_is_told_then_in_order(ends):
    left, right = ends
    left.start()
    left.send(*(chunk(bytes([i]), offset=i) for i in range(3)))
    left.lane.credit(6)
    await until(lambda: len(left.told("sent")) == 3)
    await left.lane.aclose()
    right.start()
    await until(lambda: right.told("lost"))
    assert [name for name, _ in right.events] == ["credited", *["place", "arrived"] * 3, "lost"]
    assert right.told("lost") == [None]


# Devices that fail


async def broken(end: End) -> ChannelBroken:
    await until(lambda: end.told("lost"))
    (error,) = end.told("lost")
    assert type(error) is ChannelBroken
    assert end.queue_pair.name in str(error)
    assert end.lane.room == 0
    return error


async def test_memory_that_is_not_registered_any_more(ends):
    left, right = (end.start() for end in ends)
    find = left.rdma._outbox._sources.find
    left.rdma._outbox._sources = left.rdma._outbox._sources._replace(
        find=lambda memory: (piece := find(memory)) and piece._replace(lkey=1)
    )
    by_reference(left)
    assert "LOC_PROT_ERR" in str(await broken(left))
    assert left.lane.recall(1, is_sending=True)
    assert not right.payloads


async def test_a_peer_that_posts_no_receives(ends):
    left, right = (end.start() for end in ends)
    right.queue_pair.receives = 2
    right.queue_pair.post_receives = lambda count: None
    left.send(*(chunk(bytes([i]), offset=i) for i in range(3)))
    assert "RNR_RETRY_EXC_ERR" in str(await broken(left))
    assert len(left.told("sent")) <= 2


async def test_a_device_that_refuses_a_batch(ends):
    left, _ = (end.start() for end in ends)

    def refuse(batch: list[Frame]) -> None:
        raise OSError(12, "the send queue is full")

    left.queue_pair.submit = refuse
    left.send(chunk(b"never"))
    error = await broken(left)
    assert "the device refuses work" in str(error)
    assert isinstance(error.__cause__, OSError)


async def test_a_completion_queue_that_is_lost(ends):
    left, right = (end.start() for end in ends)
    left.queue_pair.reservation.queue.failure = OSError(5, "the CQ has overrun")
    left.send(chunk(b"x"))
    assert "overrun" in str(await broken(left))
    await until(lambda: right.payloads)


async def test_a_completion_queue_that_is_lost_does_not_keep_a_lane_from_closing(ends):
    """Nothing tells that the work requests are flushed: the queue pair is destroyed at once."""
    left, _ = (end.start() for end in ends)
    left.queue_pair.reservation.queue.failure = OSError(5, "the CQ has overrun")
    left.send(chunk(b"x"))
    await broken(left)
    begun = asyncio.get_running_loop().time()
    await left.lane.aclose()
    assert asyncio.get_running_loop().time() - begun < 0.4


# Peers that lie


def announce(kind: int, index: int) -> Callable[[End], None]:
    immediate = kind << 16 | index
    return lambda end: end.queue_pair.add(0, imm_data=socket.htonl(immediate))


def header_of(slot: int, cell: int, *, is_credit: bool = False) -> Callable[[End], None]:
    def write(end: End) -> None:
        header = frames.encode_chunk(ChunkHeader(slot, 1, 1, 0, None), 1)
        if is_credit:
            header = frames.encode_credit(1, 1)
        ring = end.queue_pair._memory[0]
        ring.memory[cell * 64 : cell * 64 + 64] = header
        announce(Kind.CHUNK, cell)(end)

    return write


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (announce(Kind.CHUNK, 3), "is damaged"),
        (announce(Kind.CREDIT, CELLS), f"cell {CELLS}, which does not exist"),
        (announce(9, 0), "unknown immediate 0x90000"),
        (announce(Kind.PROBE, 7), "unknown immediate 0x20007"),
        (announce(Kind.STOP, 5), "stopped window 5, which was not open"),
        (header_of(5, 3), "a chunk for slot 5 was announced in slot 3"),
        (header_of(0, 3, is_credit=True), "cell 3 holds a CreditHeader"),
    ],
)
async def test_frames_that_no_peer_sends(ends, lie, text):
    left, _ = (end.start() for end in ends)
    await turns(3)
    left.queue_pair.receives -= 1
    lie(left)
    await until(lambda: left.told("lost"))
    (error,) = left.told("lost")
    assert type(error) is RemoteProtocolError
    assert text in str(error)


async def test_a_write_beyond_the_ring_ends_both(ends):
    left, right = (end.start() for end in ends)
    piece = left.queue_pair.stage(0, SLOT)
    target = right.queue_pair.ring_end - right.queue_pair.ring_at - SLOT + 1
    number = left.rdma._outbox.mark()
    left.queue_pair.submit([Frame(number, [piece], target, b"", 0, None, is_signalled=True)])
    assert "REM_ACCESS_ERR" in str(await broken(left))
    assert "WR_FLUSH_ERR" in str(await broken(right))


# Ends


async def test_both_ends_close_at_once_and_wait_for_nothing(ends):
    left, right = (end.start() for end in ends)
    await turns(3)
    begun = asyncio.get_running_loop().time()
    await asyncio.gather(left.lane.aclose(), right.lane.aclose())
    assert asyncio.get_running_loop().time() - begun < 0.4
    assert not left.events
    assert not right.events


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_peer_that_is_gone_does_not_keep_a_lane_from_closing(ends, is_silent):
    left, right = (end.start() for end in ends)
    await turns(3)
    right.queue_pair.silent = is_silent
    right.queue_pair.wire.is_gone = True
    left.lane.credit(1)
    array = by_reference(left)
    await turns(5)
    assert left.lane.recall(1, is_sending=True) is (not is_silent)
    await left.lane.aclose()
    assert left.lane.recall(1, is_sending=True)
    assert left.queue_pair.counts.read_bytes == 0
    assert not left.told("sent")
    del array
    right.queue_pair.wire.is_gone = False


async def test_nothing_goes_out_after_the_end(ends):
    left, right = (end.start() for end in ends)
    await turns(3)
    closing = asyncio.create_task(left.lane.aclose())
    await turns(1)
    left.lane.credit(1)
    assert left.lane.room == 0
    begun = asyncio.get_running_loop().time()
    await closing
    assert asyncio.get_running_loop().time() - begun < 0.4
    await until(lambda: right.told("lost"))
    assert right.events == [("lost", None)]
    assert left.queue_pair.counts.frames == 1
    left.lane.credit(2)
    await turns(3)


async def test_credits_while_the_end_is_under_way_are_not_sent(ends):
    left, right = (end.start() for end in ends)
    await turns(3)
    left.queue_pair.wire.hold()
    closing = asyncio.create_task(left.lane.aclose())
    await until(lambda: left.queue_pair.counts.frames)
    left.lane.credit(1)
    await turns(3)
    assert left.queue_pair.counts.frames == 1
    left.queue_pair.wire.hold(False)
    await closing
    await until(lambda: right.told("lost"))
    assert right.events == [("lost", None)]


async def test_an_end_that_does_not_arrive_is_not_waited_for_when_the_peer_has_gone_too(ends):
    left, right = (end.start() for end in ends)
    await turns(3)
    left.queue_pair.wire.hold()
    closing = asyncio.create_task(left.lane.aclose())
    await until(lambda: left.queue_pair.counts.frames)
    begun = asyncio.get_running_loop().time()
    await right.lane.aclose()
    await closing
    assert asyncio.get_running_loop().time() - begun < 0.4
    assert not left.events


async def test_a_lane_that_is_closed_is_in_no_circle_with_its_windows(ends):
    """One would keep its ring until the collector of circles comes."""
    for end in ends:
        await end.start().lane.aclose()
        calls = vars(end.rdma.windows).values()
        assert not any(getattr(call, "__self__", None) is end.rdma for call in calls)
