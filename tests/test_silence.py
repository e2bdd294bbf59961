"""Devices that bring what the peer sends, and tell nothing of our own work: that is no excuse."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from aiordma import Channel, ChannelConfig
from tests.fake_device import queue_pair
from tests.foreign import nothing_left
from tests.harness import channel_pair, noise, round_trips, turns
from tests.test_rdma_channel import tick

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 4096
CONFIG = ChannelConfig(slot_bytes=SLOT, slots=128, close_timeout_s=0.2)


async def ticks_with_chunks(near: Channel, far: Channel, count: int) -> None:
    """So many ticks of `near`, in each of which a chunk of the peer's comes."""
    for _ in range(count):
        if near.is_closed:
            return
        tick(near)
        assert queue_pair(far).wire._posted
        queue_pair(far).wire.carry(1)
        await turns(6)


@pytest.mark.parametrize("fault", ["sleeps", "hangs"])
async def test_a_device_is_reminded_and_then_lost_though_chunks_come(fault: str) -> None:
    async with nothing_left(), channel_pair("rdma", CONFIG) as (near, far):
        ours = queue_pair(near).wire
        sending_back = asyncio.create_task(far.send_tensor(noise(80 * SLOT)))
        chunks = (await anext(near.incoming())).chunks()
        kept = [await anext(chunks)]  # nor is there any credit to give
        queue_pair(far).wire.hold()
        receiving = asyncio.create_task(far.recv_tensor())
        await round_trips(near, far)
        ours.hold(fault == "sleeps")
        ours.withholds_acks = fault == "hangs"
        sending = asyncio.create_task(near.send_tensor(noise(SLOT), confirm=True))
        await round_trips(near, far)
        ours.is_asleep = fault == "sleeps"
        ours.hold(False)
        with mock.patch("aiordma.port._GRACE_S", 0.0):
            await ticks_with_chunks(near, far, 60)
        was_lost = str(near._link.error)
        ours.withholds_acks = False
        ours.acknowledge()
        kept[0].release()
        await chunks.aclose()
        await near.aclose()
        await asyncio.gather(sending, sending_back, receiving, return_exceptions=True)
    assert ("the device did not tell within 1" in was_lost) == (fault == "hangs")
