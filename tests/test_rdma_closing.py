"""Channels over a device that close in a hurry, or badly: no memory is the caller's again before the device let go."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import numpy as np
import pytest

from aiordma import Channel, ChannelConfig
from aiordma.lanes.base import close_all
from aiordma.lanes.rdma import RdmaLane
from tests.fake_device import FakeQueuePair, queue_pair
from tests.foreign import nothing_left
from tests.harness import channel_pair, noise, round_trips, turns, until

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 4096
CONFIG = ChannelConfig(slot_bytes=SLOT, slots=8, close_timeout_s=0.2)


async def amid_a_transfer(near: Channel, far: Channel) -> list[asyncio.Task[Any]]:
    """Between registered tensors, over devices that stand still: what sends, what receives."""
    array, into = noise(40 * SLOT), np.zeros(40 * SLOT, np.uint8)
    near.register(array)
    far.register(into)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await round_trips(near, far)
    for port in near._link.ports:
        assert isinstance(port.lane, RdmaLane)
        assert isinstance(port.lane._qp, FakeQueuePair)
        port.lane._qp.wire.hold()
    sending = asyncio.create_task(near.send_tensor(array))
    await until(lambda: any(p.windows and p.windows._open for p in far._link.ports))
    await round_trips(near, far)
    return [sending, receiving]


@pytest.mark.parametrize("turns_before", range(8))
@pytest.mark.parametrize("end", [0, 1])
async def test_a_close_that_is_cancelled(end: int, turns_before: int) -> None:
    """As asyncio.run cancels all tasks, and waits for them, after a second Ctrl-C."""
    async with nothing_left(), channel_pair("rdma", CONFIG) as ends:
        calls = await amid_a_transfer(*ends)
        device = queue_pair(ends[end])
        device.wire.withholds_acks = True
        was_gone: list[bool] = []
        calls[end].add_done_callback(lambda _: was_gone.append(device.wire.is_gone))
        before = asyncio.all_tasks() - {*calls}
        closing = asyncio.create_task(ends[end].aclose())
        await until(lambda: ends[end]._link.ports[0].lane._closing is not None)  # type: ignore[attr-defined]
        for _ in range(turns_before):
            await asyncio.sleep(0)
        hurried = asyncio.all_tasks() - before - {calls[1 - end]}
        for task in hurried:
            task.cancel()
        await asyncio.wait(hurried | {closing})
        assert was_gone == [True]
        assert device.wire.is_gone
        assert not device.windows
        await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("is_closed_too", [False, True])
@pytest.mark.parametrize("end", [0, 1])
async def test_an_end_that_is_cancelled_before_it_has_begun(end: int, is_closed_too: bool) -> None:
    """As when the peer hangs up in the turn in which asyncio.run cancels all tasks."""
    async with nothing_left(), channel_pair("rdma", CONFIG) as ends:
        calls = await amid_a_transfer(*ends)
        device = queue_pair(ends[end])
        device.wire.withholds_acks = True
        was_gone: list[bool] = []
        calls[end].add_done_callback(lambda _: was_gone.append(device.wire.is_gone))
        before = asyncio.all_tasks()
        ends[end]._link.control_lost(None)
        hurried = asyncio.all_tasks() - before
        assert hurried
        if is_closed_too:
            closing = asyncio.create_task(ends[end].aclose())
            closing.add_done_callback(lambda _: was_gone.append(device.wire.is_gone))
            calls.append(closing)
        for task in (*hurried, calls[end]):
            task.cancel()
        await until(lambda: all(call.done() for call in calls))
        await asyncio.gather(*calls, return_exceptions=True)
        assert was_gone == [True] * (1 + is_closed_too)


async def test_lanes_whose_end_is_cancelled_twice() -> None:
    """The first time before they have begun, the second while one of them closes."""
    config = ChannelConfig(slot_bytes=SLOT, slots=8, lanes=3, close_timeout_s=0.2)
    async with nothing_left(), channel_pair("rdma", config) as (near, far):
        calls = await amid_a_transfer(near, far)
        lanes = [port.lane for port in near._link.ports]
        wires = [lane._qp.wire for lane in lanes]  # type: ignore[attr-defined]
        for wire in wires:
            wire.withholds_acks = True
        closing = asyncio.create_task(close_all(lanes))
        await turns(1)
        for _ in range(2):
            closing.cancel()
            await turns(5)
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert all(wire.is_gone for wire in wires)
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_lane_that_cannot_be_closed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the others comes back when they are closed."""
    config = ChannelConfig(slot_bytes=SLOT, slots=8, lanes=2, close_timeout_s=0.2)
    reports: list[Any] = []
    async with nothing_left(), channel_pair("rdma", config) as (near, far):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reports.append(context))
        sending, receiving = await amid_a_transfer(near, far)
        bad, slow = (port.lane._qp for port in near._link.ports)  # type: ignore[attr-defined]
        monkeypatch.setattr(slow, "fail", lambda work_id: None)
        destroy = bad.aclose
        error = RuntimeError("a bug")

        async def fail() -> None:
            await destroy()
            raise error

        monkeypatch.setattr(bad, "aclose", fail)
        was_gone: list[bool] = []
        sending.add_done_callback(lambda _: was_gone.append(slow.wire.is_gone))
        await near.aclose()
        await asyncio.gather(sending, receiving, return_exceptions=True)
        assert was_gone == [True]
    assert [report["exception"] for report in reports] == [error]


@pytest.mark.parametrize("is_closing", [False, True])
async def test_a_window_that_cannot_be_closed(is_closing: bool) -> None:
    """A device that is gone may refuse even that. Nothing comes through it, all the same."""
    reports: list[Any] = []
    async with nothing_left(), channel_pair("rdma", CONFIG) as (near, far):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reports.append(context["exception"]))
        queue_pair(far).window_failure = error = OSError(errno.EIO, "no such device")
        calls = await amid_a_transfer(near, far)
        if is_closing:
            await far.aclose()
        queue_pair(near).wire.hold(False)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert reports == [error]
        assert any(isinstance(outcome, Exception) for outcome in outcomes) == is_closing
