"""Completion queues that are shared, lost and closed, and that each loop has its own."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from aiordma.errors import Busy, ChannelBroken
from aiordma.lanes import completion
from tests.fake_cq import Device, FakeCompletion, FakeQueue, Recorder, join, of, turns

BUDGET = completion._BUDGET


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    device = Device()
    yield device
    device.discard()


def catch() -> list[dict[str, Any]]:
    """What reaches the loop's exception handler from now on."""
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    return contexts


def raising(exc: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise exc

    return fail


# Users


async def test_users_of_one_queue_are_told_apart(device: Device) -> None:
    pump = device.pump()
    (left, first), (right, _) = join(pump, 7), join(pump, 8)
    (cq,) = device.queues
    cq.add(*of(7, 1), *of(8, 1, 2), *of(7, 2), *of(9, 1))
    await turns()
    assert (left.batches, right.batches, pump.strays) == ([[1, 2]], [[1, 2]], 1)
    with pytest.raises(RuntimeError, match="queue pair 7 has a handler already"):
        pump.reserve(1).attach(7, left)
    with pytest.raises(RuntimeError, match="attached once"):
        first.attach(9, left)
    first.release()
    with pytest.raises(RuntimeError, match="not after its release"):
        first.attach(7, left)
    cq.add(*of(8, 3))
    await turns()
    assert right.got == [1, 2, 3]


async def test_a_queue_that_is_full_gets_a_second_one(device: Device) -> None:
    pump = device.pump(queue_entries=100)
    users = [join(pump, qp_num, 40) for qp_num in range(5)]
    assert [device.queues.index(user.queue) for _, user in users] == [0, 0, 1, 1, 2]
    for qp_num, (_, user) in enumerate(users):
        user.queue.add(*of(qp_num, *range(40)))
    await turns()
    assert [handler.got for handler, _ in users] == [list(range(40))] * 5
    users[1][1].release()
    users[1][1].release()
    assert pump.reserve(60).queue is device.queues[0], "room that was given back is used"
    assert pump.reserve(61).queue is device.queues[3]
    assert pump.reserve(101).queue.capacity == 101
    with pytest.raises(ValueError):
        pump.reserve(0)


async def test_what_a_queue_pair_leaves_takes_no_room_and_reaches_nobody(device: Device) -> None:
    pump = device.pump(queue_entries=100)
    (left, first), (right, _) = join(pump, 7, 50), join(pump, 8, 50)
    (cq,) = device.queues
    cq.add(*of(7, *range(50)), *of(8, 1, 2))
    first.release()
    assert not cq.entries
    again, second = join(pump, 7, 50)
    assert second.queue is cq
    cq.add(*of(7, *range(50)))
    await turns()
    assert (left.got, right.got, again.got) == ([], [1, 2], list(range(50)))
    assert (pump.strays, cq.failure) == (0, None)


async def test_what_a_release_takes_out_for_others_needs_no_event(device: Device) -> None:
    pump = device.pump()
    (_, first), (right, _) = join(pump, 7), join(pump, 8)
    device.queues[0].loses_events = True
    device.queues[0].add(*of(8, 1))
    first.release()
    await turns()
    assert right.got == [1]


async def test_a_handler_may_release_itself_and_others(device: Device) -> None:
    pump, contexts = device.pump(), catch()
    (left, first), (right, second) = join(pump, 7), join(pump, 8)

    def end() -> None:
        first.release()
        second.release()
        raise LookupError

    left.then = end
    device.queues[0].add(*of(7, 1), *of(8, 1))
    await turns()
    assert (left.got, left.losses, right.got) == ([1], [], [])
    assert len(contexts) == 1
    await pump.aclose()


async def test_a_handler_that_raises_harms_only_itself(loop_kind: str, device: Device) -> None:
    pump, contexts = device.pump(), catch()
    (bad, _), (good, _) = join(pump, 7), join(pump, 8)
    bad.then = raising(error := LookupError("a bug"))
    for wr_id in range(2):
        device.queues[0].add(*of(7, wr_id), *of(8, wr_id))
        await turns()
    assert (good.got, good.losses) == ([0, 1], [])
    assert bad.losses == [error], "told once"
    assert bad.got == [0, 1], "what is flushed still gives its memory back"
    assert [context["exception"] for context in contexts] == [error] * 3
    assert [context["message"] for context in contexts] == [
        "Recorder raised on a completion",
        "Recorder raised on being lost",
        "Recorder raised on a completion",
    ]


async def test_a_handler_that_is_cancelled_holds_up_nobody(loop_kind: str, device: Device) -> None:
    """As with all that is no `Exception`, the loop decides what becomes of it."""
    pump, contexts = device.pump(), catch()
    (bad, _), (good, _) = join(pump, 7), join(pump, 8)
    bad.then = raising(asyncio.CancelledError())
    device.queues[0].add(*of(7, 1), *of(8, 1))
    await turns()
    assert (bad.losses, good.got, len(contexts)) == ([], [1], 1)


@pytest.mark.parametrize("call", ["get_events", "ack", "arm", "poll"])
async def test_a_queue_that_fails_is_lost_for_its_users(
    loop_kind: str, device: Device, call: str
) -> None:
    pump = device.pump()
    users, late = [join(pump, 7), join(pump, 8), join(pump, 9)], pump.reserve(1)
    (cq,) = device.queues

    def at(moment: str) -> None:
        if moment == f"before {call}":
            cq.failure = OSError(errno.EIO, "gone")

    cq.at = at
    users[0][0].then = users[1][1].release
    cq.add(*of(7, 1))
    await turns()
    assert [handler.losses for handler, _ in users] == [[cq.failure], [], [cq.failure]]
    calls = len(cq.calls)
    cq.announce(1)
    await turns()
    users[2][1].release()
    assert len(cq.calls) == calls, "it is left alone"
    with pytest.raises(ChannelBroken, match=r"completion queue failed: .* gone; connect again"):
        late.attach(10, Recorder())
    assert pump.reserve(1).queue is device.queues[1], "nobody is put there any more"


async def test_a_queue_that_overruns_fails(device: Device) -> None:
    handler, _ = join(device.pump())
    (cq,) = device.queues
    cq.add(*of(7, *range(cq.capacity + 1)))
    await turns()
    assert "overrun" in str(handler.losses)


# Ends


async def test_it_closes_with_events_outstanding(loop_kind: str, device: Device) -> None:
    """Some unread, and the rest of a burst still to come."""
    pump, was_called = device.pump(), asyncio.Event()
    handler, reservation = join(pump)
    (cq,) = device.queues

    def end() -> None:
        reservation.release()
        cq.announce(2)
        was_called.set()

    handler.then = end
    cq.add(*of(7, *range(BUDGET + 5)))
    await was_called.wait()
    await pump.aclose()
    assert (cq.unacked, cq.is_closed) == (0, True)
    await turns()
    assert len(handler.got) == BUDGET


async def test_it_does_not_close_with_work_outstanding(loop_kind: str, device: Device) -> None:
    pump = device.pump()
    handler, reservation = join(pump)
    (cq,) = device.queues
    with pytest.raises(Busy, match="destroy them and release their reservations"):
        await pump.aclose()
    cq.add(FakeCompletion(7, 1, status=5))
    await turns()
    assert handler.got == [1], "a flushed work request still gives its memory back"
    cq.add(FakeCompletion(7, 2, status=5))
    reservation.watch()
    reservation.release()
    await asyncio.gather(pump.aclose(), pump.aclose())
    assert cq.is_closed
    assert handler.got == [1]
    with pytest.raises(RuntimeError, match="closed"):
        pump.reserve(1)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_it_closes_a_descriptor_the_turn_after_its_reader_went(
    loop_kind: str, device: Device, is_cancelled: bool
) -> None:
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    pump = device.pump()
    pump.reserve(1).release()
    (cq,) = device.queues
    fd = cq.fileno()
    closing = asyncio.create_task(pump.aclose())
    await asyncio.sleep(0)
    assert not cq.is_closed
    cq.announce(1)
    if is_cancelled:
        closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled() == is_cancelled
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    # The number is at once another file's.
    other = os.eventfd(0)
    os.dup2(other, fd)
    loop.add_reader(fd, heard.set)
    os.eventfd_write(fd, 1)
    await heard.wait()
    assert cq.calls == ["arm"]
    loop.remove_reader(fd)
    await turns(2)
    for number in {other, fd}:
        os.close(number)


async def test_a_queue_that_cannot_be_destroyed_does_not_keep_the_others(device: Device) -> None:
    pump = device.pump(queue_entries=1)
    for reservation in [pump.reserve(1) for _ in range(3)]:
        reservation.release()
    device.queues[1].queue_pairs = 1
    with pytest.raises(OSError, match="queue pairs use the CQ"):
        await pump.aclose()
    assert [cq.is_closed for cq in device.queues] == [True, False, True]


async def test_a_queue_that_cannot_be_had_leaves_nothing(device: Device) -> None:
    def no_memory(entries: int) -> FakeQueue:
        raise OSError(errno.ENOMEM, "no CQ")

    def unfit(entries: int) -> FakeQueue:
        cq = FakeQueue(entries)
        cq.failure = OSError(errno.EIO, "cannot be armed")
        return cq

    pump = device.pump()
    device.make = no_memory
    with pytest.raises(OSError, match="no CQ"):
        pump.reserve(1)
    device.make = unfit
    with pytest.raises(OSError, match="cannot be armed"):
        pump.reserve(1)
    assert device.queues[0].is_closed
    await pump.aclose()


# Loops and threads


async def test_each_loop_has_its_own(loop_kind: str) -> None:
    async def main() -> list[int]:
        device = Device()
        pump = device.pump()
        handler, reservation = join(pump)
        meeting.wait()
        device.queues[0].add(*of(7, *range(3 * BUDGET)))
        await turns()
        reservation.release()
        await pump.aclose()
        return handler.got

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            results.append(runner.run(main()))

    loop_factory = type(asyncio.get_running_loop())
    meeting = threading.Barrier(2, timeout=30)
    results: list[list[int]] = []
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(3 * BUDGET))] * 2


async def test_another_loop_or_thread_is_refused(loop_kind: str, device: Device) -> None:
    pump = device.pump()
    handler, reservation = join(pump)
    fresh = pump.reserve(1)

    def refuses() -> None:
        for call in (
            lambda: pump.reserve(1),
            lambda: fresh.attach(8, handler),
            reservation.watch,
            reservation.release,
        ):
            with pytest.raises(RuntimeError, match="outside its event loop"):
                call()

    async def elsewhere() -> None:
        refuses()
        with pytest.raises(RuntimeError, match="outside its event loop"):
            await pump.aclose()

    def run() -> None:
        refuses()
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(elsewhere())

    await asyncio.to_thread(run)
    device.queues[0].add(*of(7, 1))
    await turns()
    assert handler.got == [1], "it is none the worse"
