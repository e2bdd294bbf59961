"""What a peer is told to write to no more: how long it may take, and from when that counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from aiordma import Channel, ChannelConfig
from aiordma.errors import ChannelBroken
from aiordma.lanes import rendezvous
from aiordma.lanes.outbox import Frame, Kind, WindowWork
from tests.fake_device import queue_pair
from tests.foreign import nothing_left
from tests.harness import CANARY, cancel, channel_pair, noise, round_trips, turns, until, usable

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 4096
SLOTS = 4
SIZE = 40 * SLOT
Pair = tuple[Channel, Channel]
Call = asyncio.Task[Any]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with nothing_left():
        config = ChannelConfig(slot_bytes=SLOT, slots=SLOTS)
        async with channel_pair("rdma", config) as (near, far):
            yield near, far
            if not near.is_closed:
                await usable(near, far)
                assert not queue_pair(far).windows


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.TimerHandle]:
    """That were started for a peer that is to stop."""
    started: list[asyncio.TimerHandle] = []
    wait = rendezvous._Stopping._wait

    def noted(stopping: rendezvous._Stopping) -> None:
        wait(stopping)
        assert stopping._timer is not None
        started.append(stopping._timer)

    monkeypatch.setattr(rendezvous._Stopping, "_wait", noted)
    return started


async def into_a_window(pair: Pair) -> tuple[np.ndarray, Call, Call]:
    """Of a peer whose device stands still: the memory, what receives, what sends."""
    near, far = pair
    into = np.full(SIZE, CANARY, np.uint8)
    far.register(into)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await turns(3)
    queue_pair(near).wire.hold()
    sending = asyncio.create_task(near.send_tensor(noise(SIZE)))
    await until(lambda: queue_pair(far).windows)
    return into, receiving, sending


async def test_a_peer_that_does_not_stop_loses_the_lane(pair: Pair) -> None:
    near, far = pair
    into, receiving, sending = await into_a_window(pair)
    with (
        mock.patch("aiordma.lanes.rendezvous._STOP_S", 0.05),
        mock.patch("aiordma.port._GRACE_S", 0.0),
    ):
        receiving.cancel()
        await asyncio.wait([receiving])
    assert receiving.cancelled()
    assert not queue_pair(far).windows, "given back, and not out of reach"
    into[:] = CANARY
    assert "was told to stop writing to memory" in str(far._link.error)
    queue_pair(near).wire.hold(False)
    with pytest.raises(ChannelBroken):
        await sending
    assert (into == CANARY).all()


def says_stop(work: Frame | WindowWork) -> bool:
    return isinstance(work, Frame) and (work.immediate or 0) >> 16 == Kind.STOP


@pytest.mark.parametrize("way", ["the window", "the ring"])
async def test_a_peer_that_stops_has_the_time_that_its_chunks_take(
    pair: Pair, timers: list[asyncio.TimerHandle], way: str
) -> None:
    """What it had posted before it heard of it comes first, and goes on as long as something comes."""
    near, far = pair
    wire = queue_pair(near).wire
    _, receiving, sending = await into_a_window(pair)
    while way == "the window" and not far._link.ports[0].windows._used:  # type: ignore[union-attr]
        wire.carry(1)
        await turns(3)
    receiving.cancel()
    await until(lambda: timers)
    for expected in (1, 2, 3):
        assert len(timers) == expected
        assert [timer.cancelled() for timer in timers] == [True] * (expected - 1) + [False]
        wire.carry(2 if way == "the window" else 1)  # both halves of a chunk
        await turns(5)
    wire.hold(False)
    await asyncio.wait([receiving])
    again = asyncio.create_task(far.recv_tensor())  # it may be offered again
    await asyncio.gather(sending, return_exceptions=True)
    await round_trips(near, far)
    await cancel(again)
    assert len(timers) <= 1 + SLOTS, "once for each slot"
    assert all(timer.cancelled() for timer in timers)


async def test_a_peer_that_cannot_have_heard_of_it_yet_is_not_late(
    pair: Pair, timers: list[asyncio.TimerHandle]
) -> None:
    """The STOP is behind chunks of ours on a slow way. What the peer sends meanwhile takes no time from it."""
    near, far = pair
    ours = queue_pair(far).wire
    _, receiving, sending = await into_a_window(pair)
    ours.hold()
    back = asyncio.create_task(near.recv_tensor())
    sending_back = asyncio.create_task(far.send_tensor(noise(3 * SLOT)))
    await until(lambda: ours._posted)
    receiving.cancel()
    await round_trips(near, far)
    queue_pair(near).wire.carry(2)
    while not says_stop(ours._posted[0]):
        ours.carry(1)
        await round_trips(near, far)
        assert not timers
    ours.withholds_acks = True
    ours.carry(1)
    await round_trips(near, far)
    assert not timers
    ours.withholds_acks = False
    ours.acknowledge()
    await until(lambda: timers)
    ours.hold(False)
    queue_pair(near).wire.hold(False)
    await asyncio.wait([receiving])
    assert receiving.cancelled()
    again = asyncio.create_task(far.recv_tensor())
    await asyncio.gather(sending, return_exceptions=True)
    await sending_back
    assert (await back).nbytes == 3 * SLOT
    await round_trips(near, far)
    await cancel(again)
