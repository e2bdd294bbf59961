"""Nothing flows that nobody chose: claims in advance are for takers who want whatever comes next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from aiordma import Channel, TensorError, connect, listen

pytestmark = pytest.mark.usefixtures("no_leaks")

BIG = np.arange(40 << 20, dtype=np.uint8)  # more than the ring


@pytest.fixture
async def pair(no_leaks: None) -> AsyncIterator[tuple[Channel, Channel]]:
    """Two ends over TCP."""
    async with listen() as listener:
        async with connect(*listener.address) as left, await anext(aiter(listener)) as right:
            yield left, right


async def stuck(left: Channel, right: Channel, send: asyncio.Task[None]) -> None:
    """The receiver has seen the OPEN: the sender must wait, unclaimed, and little was kept."""
    for _ in range(20):
        await left.ping()
    assert not send.done()
    (transfer,) = left._link.sends
    assert not left._link.session.sender.is_claimed(transfer)
    stats = right.stats()
    assert stats.received_bytes <= 8 << 20  # one window
    assert stats.copied_bytes <= stats.received_bytes


async def test_a_transfer_that_incoming_offers_is_not_claimed(
    pair: tuple[Channel, Channel],
) -> None:
    left, right = pair
    offers = right.incoming()
    offer = asyncio.ensure_future(anext(offers))
    await left.ping()  # it waits by now
    send = asyncio.create_task(left.send_tensor(BIG))
    transfer = await offer
    await stuck(left, right, send)
    assert right.stats().copied_bytes == 0
    arrays = await transfer.arrays()
    assert np.array_equal(arrays["tensor"], BIG)
    await send
    await offers.aclose()


async def test_a_transfer_that_does_not_fit_the_taker_is_not_claimed(
    pair: tuple[Channel, Channel],
) -> None:
    left, right = pair
    small = np.zeros(3, np.uint8)
    take = asyncio.create_task(right.recv_tensor(into=small))
    await left.ping()
    send = asyncio.create_task(left.send_tensor(BIG))
    with pytest.raises(TensorError, match="tensor"):
        await take
    await stuck(left, right, send)
    assert np.array_equal(await right.recv_tensor(), BIG)
    await send


async def test_a_claim_in_advance_goes_with_its_taker(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    takers = [asyncio.create_task(right.recv_tensor()) for _ in range(2)]
    await left.ping()
    takers[1].cancel()
    await asyncio.wait(takers[1:])
    await left.send_tensor(np.ones(3, np.uint8))
    send = asyncio.create_task(left.send_tensor(BIG))
    await stuck(left, right, send)
    assert np.array_equal(await takers[0], np.ones(3, np.uint8))
    assert np.array_equal(await right.recv_tensor(), BIG)
    await send
