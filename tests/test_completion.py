"""Completion queues on the event loop: no completion is lost, and nobody is starved."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aiordma.lanes import completion
from tests.fake_cq import (
    MOMENTS,
    Device,
    FakeCompletion,
    FakeQueue,
    PolledFirst,
    join,
    of,
    turns,
)

BUDGET = completion._BUDGET


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    device = Device()
    yield device
    device.discard()


def add_once(cq: FakeQueue, when: str, *entries: FakeCompletion) -> None:
    """The entries come at the next such moment."""

    def at(moment: str) -> None:
        if moment == when:
            cq.at = lambda _: None
            cq.add(*entries)

    cq.at = at


# From event to handler


async def test_get_events_then_ack_then_arm_then_poll(loop_kind: str, device: Device) -> None:
    handler, _ = join(device.pump())
    (cq,) = device.queues
    assert cq.calls == ["arm"], "before any completion can come"
    cq.add(*of(7, 1, 2))
    await turns()
    assert cq.calls == ["arm", "get_events", "ack 1", "arm", "poll"]
    cq.add(*of(7, 3))
    await turns()
    assert handler.batches == [[1, 2], [3]]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_completion_of_any_moment_is_delivered(
    loop_kind: str, device: Device, moment: str
) -> None:
    """That of "after poll" came between "empty" and whatever the pump does next."""
    handler, _ = join(device.pump())
    (cq,) = device.queues
    add_once(cq, moment, *of(7, 2))
    cq.add(*of(7, 1))
    await turns()
    assert handler.got == [1, 2]


async def test_polled_before_armed_that_of_one_moment_is_lost(device: Device) -> None:
    """That the test above sees the mistake: with arm and poll swapped, the fake loses a completion."""
    device.make = PolledFirst
    handler, _ = join(device.pump())
    (cq,) = device.queues
    cq.poll(1)  # only now it is armed for the first time
    add_once(cq, "after poll", *of(7, 2))
    cq.add(*of(7, 1))
    await turns()
    assert handler.got == [1]
    assert list(cq.entries) == of(7, 2)


steps = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([7, 8])), min_size=10, max_size=60)


@given(steps, st.sampled_from([1, 2, 5, BUDGET]))
def test_whatever_comes_when_comes_once_and_in_order(steps: Any, budget: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "_BUDGET", budget)
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_comes_once(steps))


async def _comes_once(steps: list[tuple[int, int]]) -> None:
    device = Device()
    pump = device.pump()
    users = {qp_num: join(pump, qp_num) for qp_num in (7, 8)}
    (cq,) = device.queues
    sent: dict[int, list[int]] = {7: [], 8: []}

    def at(moment: str) -> None:
        count, qp_num = steps.pop() if steps else (0, 7)
        for _ in range(count):
            sent[qp_num].append(len(sent[qp_num]))
            cq.add(FakeCompletion(qp_num, sent[qp_num][-1]))

    def got() -> dict[int, list[int]]:
        return {qp_num: handler.got for qp_num, (handler, _) in users.items()}

    cq.at = at
    for _ in range(len(steps)):
        at("idle")
        for _ in range(200):  # 180 completions at most, and one in each turn at least
            if got() != sent:
                await turns(1)
        assert got() == sent
    assert (pump.strays, pump.missed_events) == (0, 0)
    for _, reservation in users.values():
        reservation.release()
    await pump.aclose()


async def test_a_false_alarm_is_nothing(loop_kind: str, device: Device) -> None:
    handler, _ = join(device.pump())
    (cq,) = device.queues
    cq.alarm_falsely()
    await turns()
    assert cq.calls == ["arm", "get_events"]
    cq.add(*of(7, 1))
    await turns()
    assert handler.got == [1]


async def test_an_event_of_an_empty_queue_is_taken(loop_kind: str, device: Device) -> None:
    handler, _ = join(device.pump())
    (cq,) = device.queues
    cq.is_armed = False
    cq.announce(1)
    await turns()
    assert cq.calls == ["arm", "get_events", "ack 1", "arm", "poll"]
    assert (handler.batches, handler.losses, cq.is_armed) == ([], [], True)


async def test_the_descriptor_does_not_block(loop_kind: str, device: Device) -> None:
    """The fake's blocks at first, and says so if it is read then."""

    def make(entries: int) -> FakeQueue:
        cq = FakeQueue(entries)
        assert os.get_blocking(cq.fileno())
        return cq

    device.make = make
    join(device.pump())
    assert not os.get_blocking(device.queues[0].fileno())


async def test_events_that_came_together_are_acknowledged_together(device: Device) -> None:
    join(device.pump())
    (cq,) = device.queues
    cq.announce(3)
    await turns()
    assert cq.calls == ["arm", "get_events", "ack 3", "arm", "poll"]


async def test_others_run_between_the_parts_of_a_burst(loop_kind: str, device: Device) -> None:
    handler, _ = join(device.pump())
    (cq,) = device.queues
    seen: list[int] = []
    count = 3 * BUDGET + 5

    def then() -> None:
        loop.call_soon(lambda: seen.append(len(handler.got)))

    loop, handler.then = asyncio.get_running_loop(), then
    cq.add(*of(7, *range(count)))
    await turns()
    assert handler.got == list(range(count))
    assert seen == [BUDGET, 2 * BUDGET, 3 * BUDGET, count]
    assert cq.calls.count("arm") == 2, "the rest needs no event"


# The tick


async def test_a_lost_event_is_found_while_someone_is_busy(loop_kind: str, device: Device) -> None:
    pump, found = device.pump(tick_s=0.001), asyncio.Event()
    handler, reservation = join(pump)
    (cq,) = device.queues
    handler.is_busy, handler.then = True, found.set
    reservation.watch()
    cq.loses_events = True
    cq.add(*of(7, 1))
    await found.wait()
    assert (handler.got, pump.missed_events) == ([1], 1)


async def test_a_lost_event_is_found_on_any_queue_if_on_one_someone_is_busy(
    device: Device,
) -> None:
    pump, found = device.pump(queue_entries=64, tick_s=0), asyncio.Event()
    (busy, reservation), (idle, _) = join(pump, 7), join(pump, 8)
    device.queues[1].loses_events = True
    device.queues[1].add(*of(8, 1))
    busy.is_busy, idle.then = True, found.set
    reservation.watch()
    await found.wait()
    assert idle.got == [1]


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What the loop is asked to call later: only the test does."""
    loop, callbacks = asyncio.get_running_loop(), []

    def call_later(delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        callbacks.append(callback)
        return asyncio.TimerHandle(delay_s, callback, (), loop)

    monkeypatch.setattr(loop, "call_later", call_later)
    return callbacks


async def test_it_ticks_only_while_something_moves(
    device: Device, timers: list[Callable[[], None]]
) -> None:
    pump = device.pump()
    handler, reservation = join(pump)
    (cq,) = device.queues
    await turns()
    assert not timers, "an idle queue pair"
    handler.is_busy = True
    reservation.watch()
    reservation.watch()
    assert len(timers) == 1
    timers.pop()()
    assert cq.calls == ["arm", "get_events", "arm", "poll"]
    handler.is_busy = False
    timers.pop()()
    assert not timers
    cq.add(*of(7, 1))
    await turns()
    timers.pop()()
    timers.pop()()
    assert not timers, "nothing came since"
    assert pump.missed_events == 0
    handler.is_busy = True
    cq.failure = OSError(errno.EIO, "gone")
    reservation.watch()
    timers.pop()()
    calls = len(cq.calls)
    with pytest.raises(OSError, match="completion queue failed"):
        reservation.watch()
    assert not timers, "nothing can come any more"
    assert len(cq.calls) == calls


async def test_a_tick_within_a_burst_misses_nothing(
    device: Device, timers: list[Callable[[], None]]
) -> None:
    pump, loop = device.pump(), asyncio.get_running_loop()
    handler, _ = join(pump)

    def then() -> None:
        if len(handler.batches) == 1:
            loop.call_soon(timers.pop())

    handler.then = then
    device.queues[0].add(*of(7, *range(BUDGET + 1)))
    await turns()
    assert (len(handler.got), pump.missed_events) == (BUDGET + 1, 0)
