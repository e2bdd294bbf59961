"""When the caller gives up, and when the channel does: `asyncio.timeout`, and the idle timeout."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import numpy as np
import pytest

from aiordma import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    ChannelConfig,
    PeerTimeout,
    TransferAborted,
    TransferTimeout,
)
from tests.foreign import nothing_left
from tests.harness import (
    LANE_PARAMS,
    channel_pair,
    noise,
    round_trips,
    turns,
    until,
    usable,
)

SLOT = 16 << 10
CONFIG = ChannelConfig(slot_bytes=SLOT, slots=4)
Pair = tuple[Channel, Channel]


# The caller's timeouts


@pytest.mark.parametrize("kind", LANE_PARAMS)
async def test_a_call_that_times_out_leaves_the_channel_usable(kind: str, loop_kind: str) -> None:
    async with nothing_left():
        async with channel_pair(kind, ChannelConfig(slot_bytes=SLOT, slots=4)) as (near, far):
            for call in (
                lambda: near.send_tensor(noise(9 * SLOT)),
                lambda: near.send_tensor(noise(9), confirm=True),
                lambda: far.recv(),
                lambda: far.recv_tensor(),
                lambda: far.recv_tensors(into={"a": noise(SLOT)}),
                lambda: anext(far.incoming()),
            ):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.005):
                        await call()
                await round_trips(near, far)
                await usable(near, far)


async def expire(limit: asyncio.Timeout, condition: Callable[[], object]) -> None:
    """The time of this limit is over as soon as it is so."""
    await until(condition)
    limit.reschedule(asyncio.get_running_loop().time())


@pytest.mark.parametrize("is_sending", [True, False])
async def test_a_transfer_that_times_out_half_way(loop_kind: str, is_sending: bool) -> None:
    config = ChannelConfig(slot_bytes=SLOT, slots=4)
    async with nothing_left(), channel_pair("tcp", config) as (near, far):
        into = np.zeros(1000 * SLOT, np.uint8)
        send, receive = near.send_tensor(noise(into.nbytes)), far.recv_tensor(into=into)
        mine, others = (send, receive) if is_sending else (receive, send)
        other = asyncio.create_task(others)
        limit = asyncio.timeout(None)
        clock = asyncio.create_task(expire(limit, lambda: into.any()))
        with pytest.raises(TimeoutError):
            async with limit:
                await mine
        into[:] = 0
        with pytest.raises(TransferAborted, match="cancelled"):
            await other
        await clock
        await usable(near, far)
        assert not into.any()


# The idle timeout


class Clock:
    """Sets the running loop's time forward; what is due then is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._ahead_s = 0.0
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + self._ahead_s)

    async def advance(self, seconds: float, *channels: Channel, step_s: float = 1.0) -> None:
        """In small steps, as time goes by; the channels' pings are answered on the way."""
        end = self._ahead_s + seconds
        while self._ahead_s < end:
            self._ahead_s = min(end, self._ahead_s + step_s)
            await turns(3)
            if channels:
                await round_trips(*channels, count=1)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


IDLE_S = ChannelConfig().idle_timeout_s


@pytest.fixture(params=LANE_PARAMS)
async def pair(request) -> AsyncIterator[Pair]:
    async with nothing_left(), channel_pair(request.param, CONFIG) as ends:
        yield ends


async def test_an_idle_channel_does_not_time_out(pair: Pair, clock: Clock) -> None:
    near, far = pair
    await usable(near, far)
    receiving = asyncio.create_task(far.recv_tensor())  # waiting for a transfer opens none
    await clock.advance(100 * IDLE_S, step_s=IDLE_S / 2)
    assert near._link._pulse._timer is None, "something ticks on an idle channel"
    assert far._link._pulse._timer is None
    await near.send_tensor(noise(9 * SLOT))
    assert np.array_equal(await receiving, noise(9 * SLOT))
    await usable(near, far)


async def test_a_transfer_that_nobody_asks_for_does_not_time_out(pair: Pair, clock: Clock) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(9 * SLOT)))
    await round_trips(near, far)
    await clock.advance(3 * IDLE_S, near, far, step_s=IDLE_S / 20)
    assert not sending.done()
    assert near._link._pulse._timer is not None
    assert np.array_equal(await far.recv_tensor(), noise(9 * SLOT))
    await sending
    await usable(near, far)


async def test_a_transfer_that_stands_still_times_out_and_the_channel_stays(
    pair: Pair, clock: Clock
) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
    async with aclosing(far.incoming()) as transfers:
        chunks = (await anext(transfers)).chunks()
        kept = [await anext(chunks) for _ in range(2)]
        await round_trips(near, far)
        await clock.advance(0.9 * IDLE_S, near, far, step_s=IDLE_S / 20)
        assert not sending.done()
        kept.pop().release()  # progress
        await round_trips(near, far)
        await clock.advance(0.9 * IDLE_S, near, far, step_s=IDLE_S / 20)
        assert not sending.done()
        await clock.advance(0.3 * IDLE_S, near, far, step_s=IDLE_S / 20)
        with pytest.raises(TransferTimeout, match="takes no chunks; see what it waits for"):
            await sending
        kept.pop().release()
        with pytest.raises(TransferTimeout):
            await anext(chunks)
    await usable(near, far)


async def test_a_receiver_whose_sender_stands_still_times_out(pair: Pair, clock: Clock) -> None:
    near, far = pair
    near._link._post = lambda port: False  # type: ignore[method-assign]
    sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
    into = np.zeros(20 * SLOT, np.uint8)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    await round_trips(near, far)
    near._link.moved = lambda transfer: None  # type: ignore[method-assign]
    await clock.advance(0.5 * IDLE_S, near, far, step_s=IDLE_S / 20)
    near._link.sends[1].moved_at += IDLE_S  # so that the receiver is the first to lose patience
    await clock.advance(0.7 * IDLE_S, near, far, step_s=IDLE_S / 20)
    with pytest.raises(TransferTimeout, match="no chunk came"):
        await receiving
    with pytest.raises(TransferTimeout, match="the peer gave up waiting"):
        await sending
    del near._link._post, near._link.moved
    await usable(near, far)


async def test_a_peer_that_is_silent_while_a_transfer_is_open(pair: Pair, clock: Clock) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
    await round_trips(near, far)
    far._link.flush = lambda: None  # type: ignore[method-assign]
    far._link._pulse.stop(ChannelClosed("hangs"))
    await clock.advance(1.3 * IDLE_S, step_s=IDLE_S / 20)
    with pytest.raises(PeerTimeout, match=r"the peer said nothing for .* raise idle_timeout_s"):
        await sending
    assert issubclass(PeerTimeout, ChannelBroken)
    with pytest.raises(PeerTimeout):
        await near.recv()
    del far._link.flush


async def test_a_loop_that_was_blocked_blames_nobody(pair: Pair, clock: Clock) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
    await round_trips(near, far)
    await clock.advance(10 * IDLE_S, step_s=10 * IDLE_S)  # in one step
    await round_trips(near, far)
    assert np.array_equal(await far.recv_tensor(), noise(20 * SLOT))
    await sending
    await usable(near, far)


async def test_an_idle_timeout_in_real_time() -> None:
    config = dataclasses.replace(CONFIG, idle_timeout_s=0.1)
    async with nothing_left(), channel_pair("tcp", config) as (near, far):
        sending = asyncio.create_task(near.send_tensor(noise(20 * SLOT)))
        async with aclosing(far.incoming()) as transfers:
            chunks = (await anext(transfers)).chunks()
            chunk = await anext(chunks)
            with pytest.raises(TransferTimeout, match=r"for 0\.1 s"):
                await sending
            chunk.release()
        await usable(near, far)
