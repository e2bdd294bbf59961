"""What every lane promises: one set of tests, which each of them runs on both loops."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from aiordma.errors import RemoteProtocolError
from aiordma.wire.frames import ChunkHeader
from tests.foreign import nothing_left
from tests.harness import CANARY, LANE_PARAMS, LARGE, LaneUser, chunk, key, lane_users, turns, until

pytestmark = pytest.mark.usefixtures("loop_kind")


@pytest.fixture(params=LANE_PARAMS)
async def users(request) -> AsyncIterator[tuple[LaneUser, LaneUser]]:
    """Two users of a lane, not started; afterwards nothing is left, and nobody was told twice that it is lost."""
    async with nothing_left():
        left, right = await lane_users(request.param)
        yield left, right
        for user in (left, right):
            await user.lane.aclose()
            assert len(user.told("lost")) <= 1
            assert not user.was_touched, "bytes were stored before the place was asked"


@pytest.fixture
def is_ordered(request) -> bool:
    return "reordered" not in request.node.name


@pytest.fixture
def is_rdma(request) -> bool:
    """A device reads what is registered and takes it to the peer's ring, whether anybody looks there or not.

    None of the payloads here is registered: the lane copies them when they are posted.
    """
    return "rdma" in request.node.name or "verbs" in request.node.name


# Chunks


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 4096, (1 << 20) + 1, LARGE])
async def test_a_chunk_comes_whole_to_where_it_was_placed(users, nbytes):
    left, right = (user.start() for user in users)
    header, parts = chunk(random.Random(nbytes).randbytes(nbytes), transfer=7, offset=128)
    assert left.lane.room
    left.send((header, parts))
    await until(lambda: right.payloads)
    assert right.events == [("place", header), ("arrived", header)]
    assert right.payloads[7, 128] == parts[0]
    await until(lambda: left.events)
    assert left.events == [("sent", header)]


async def test_chunks_both_ways_and_each_is_told_once(users, is_ordered):
    rng = random.Random(1)
    chunks = [chunk(rng.randbytes(rng.randint(1, 200_000)), offset=i) for i in range(60)]
    for user in users:
        user.start()
    for user in users:
        user.send(*chunks)
    expected = [header for header, _ in chunks]
    for user in users:
        await until(user.has_sent_and_got(len(chunks)))
        assert user.payloads == {key(header): bytes(parts[0]) for header, parts in chunks}
        for name in ("arrived", "sent"):
            told = user.told(name)
            assert sorted(told) == sorted(expected)
            assert (told == expected) == is_ordered
        assert user.lane.room


async def test_room_is_spent_and_comes_back(users, is_rdma):
    left, right = users
    at_first = left.lane.room
    room = min(at_first, len(left.slots))
    for i in range(room):
        assert left.lane.room > 0
        left.send(chunk(bytes(LARGE), offset=i))
    assert not left.backlog
    if is_rdma:  # it counts on chunks of many pieces
        assert left.lane.room < at_first
    else:
        assert left.lane.room == 0
    left.start()
    right.start()
    await until(lambda: len(right.payloads) == room)
    await until(lambda: left.lane.room == at_first)
    assert len(left.told("sent")) == room > 0


async def test_parts_are_gathered(users):
    left, right = (user.start() for user in users)
    rng = random.Random(2)
    pieces = [rng.randbytes(rng.choice([1, 2, 7, 64, 3000])) for _ in range(256)]
    whole = b"".join(pieces)
    header = ChunkHeader(0, len(whole), 1, 0, None)
    left.send((header, [memoryview(piece) for piece in pieces]))
    left.send(chunk(b"next", offset=1))
    await until(lambda: len(right.payloads) == 2)
    assert right.payloads == {(1, 0): whole, (1, 1): b"next"}


async def test_a_chunk_is_posted_by_reference(users, is_rdma):
    left, right = users
    left.start()
    payload = bytearray(LARGE)
    left.send(chunk(payload))
    await turns(3)
    payload[-1] = 1
    right.start()
    await until(lambda: right.payloads)
    assert right.payloads[1, 0][-1] == (not is_rdma)
    assert left.copied_bytes == LARGE * is_rdma


# Credits


async def test_credits_need_no_room_and_come_before_the_backlog(users):
    left, right = users
    left.start()
    left.send(*(chunk(bytes(1 << 20), offset=i) for i in range(40)))
    await until(lambda: left.backlog)
    for slot in (0, 3, 255):
        left.lane.credit(1 << slot)
    right.start()
    await until(lambda: len(right.payloads) == 40)
    credits_ = right.told("credited")
    assert sum(credits_) == 1 | 1 << 3 | 1 << 255, "lost, doubled or merged wrongly"
    last = max(i for i, (name, _) in enumerate(right.events) if name == "credited")
    assert [name for name, _ in right.events[last:]].count("arrived") > 20


async def test_credits_alone(users):
    left, right = (user.start() for user in users)
    for i in range(100):
        right.lane.credit(1 << i)
        await turns(i % 3)
    await until(lambda: sum(left.told("credited")) == (1 << 100) - 1)


# Taking memory back


async def test_a_chunk_that_is_recalled_by_its_sender_still_comes_as_it_was(users):
    left, right = users
    left.start()
    buffers = {i: bytearray(random.Random(i).randbytes(LARGE // 4)) for i in range(8)}
    wanted = {(1 + i % 2, i): bytes(buffer) for i, buffer in buffers.items()}
    left.send(*(chunk(buffer, transfer=1 + i % 2, offset=i) for i, buffer in buffers.items()))
    posted = [i for i in buffers if (1 + i % 2, i) not in {key(h) for h, _ in left.backlog}]
    left.backlog.clear()
    await turns(2)
    for transfer in (1, 2):
        left.lane.recall(transfer, is_sending=True)
    for buffer in buffers.values():
        buffer[:] = bytes(len(buffer))
    right.start()
    await until(lambda: len(right.payloads) == len(posted))
    assert posted
    for i in posted:
        assert right.payloads[1 + i % 2, i] == wanted[1 + i % 2, i]
    left.send(chunk(b"in step", transfer=3))
    await until(lambda: (3, 0) in right.payloads)
    assert right.payloads[3, 0] == b"in step"


async def test_a_recall_of_another_transfer_or_direction_changes_nothing(users, is_rdma):
    left, right = users
    left.start()
    payload = bytearray(LARGE)
    left.send(chunk(payload))
    assert left.lane.recall(2, is_sending=True)
    assert left.lane.recall(1, is_sending=False)
    payload[-1] = 1
    right.start()
    await until(lambda: right.payloads)
    assert right.payloads[1, 0][-1] == (not is_rdma)
    right.lane.recall(1, is_sending=False)


async def test_a_destination_that_is_recalled_is_written_no_more(users):
    left, right = (user.start() for user in users)
    payload = random.Random(3).randbytes(LARGE)
    left.send(chunk(payload))
    await until(lambda: right.told("place"))
    old = right.targets[1, 0]
    was_under_way = not right.payloads
    if was_under_way:
        right.targets[1, 0] = bytearray(LARGE)
    right.lane.recall(2, is_sending=False)
    right.lane.recall(1, is_sending=False)
    old[:] = bytes([CANARY]) * LARGE
    left.send(chunk(b"in step", offset=LARGE))
    await until(lambda: (1, LARGE) in right.payloads)
    assert right.payloads == {(1, 0): payload, (1, LARGE): b"in step"}
    assert len(right.told("place")) == 2 + was_under_way
    assert old == bytes([CANARY]) * LARGE


# Ends


async def test_the_end_is_told_once_and_to_the_other_side_only(users):
    left, right = (user.start() for user in users)
    left.send(chunk(b"bye"))
    await until(lambda: left.told("sent"))
    await left.lane.aclose()
    await until(lambda: right.told("lost"))
    await asyncio.gather(left.lane.aclose(), left.lane.aclose())
    await right.lane.aclose()
    await turns(5)
    assert right.payloads == {(1, 0): b"bye"}
    assert right.told("lost") == [None]
    assert not left.told("lost")
    assert left.lane.room == right.lane.room == 0


@pytest.mark.parametrize("what", ["chunk", "credit"])
async def test_what_the_handler_refuses_ends_the_lane_there(users, what):
    left, right = (user.start() for user in users)
    right.refuses = True
    if what == "chunk":
        left.send(*(chunk(bytes(1000), offset=i) for i in range(5)))
    else:
        left.lane.credit(1)
        left.lane.credit(2)
    await until(lambda: right.told("lost"))
    await turns(10)
    (error,) = right.told("lost")
    assert isinstance(error, RemoteProtocolError)
    assert len(right.told("place") + right.told("credited")) == 1
    assert not right.payloads
    assert right.lane.room == 0


async def test_after_aclose_no_memory_is_written(users):
    left, right = (user.start() for user in users)
    left.send(chunk(random.Random(4).randbytes(LARGE)))
    await until(lambda: right.told("place"))
    before = list(right.events)
    await right.lane.aclose()
    target = right.targets[1, 0]
    target[:] = bytes([CANARY]) * LARGE
    await until(lambda: left.told("lost") or left.told("sent"))
    await turns(5)
    assert right.events == before
    assert target == bytes([CANARY]) * LARGE


async def test_after_aclose_no_memory_is_read(users, is_rdma):
    left, right = users
    left.start()
    payload = bytearray(LARGE)
    left.send(chunk(payload))
    await turns(2)
    await left.lane.aclose()
    payload[:] = b"\x01" * LARGE
    right.start()
    await until(lambda: right.told("lost"))
    assert bool(right.payloads) == is_rdma  # it was in the ring before
    assert 1 not in right.targets.get((1, 0), b"")
    assert not left.events
