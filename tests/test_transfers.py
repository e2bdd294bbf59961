"""Transfers one by one, and many at once: every way to receive one, and that none holds up another."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from aiordma import (
    Busy,
    Channel,
    ChannelConfig,
    ChecksumError,
    Chunk,
    Transfer,
    TransferAborted,
    TransferRefused,
    prepare,
)
from tests.foreign import nothing_left
from tests.harness import (
    VERBS_KINDS,
    alike,
    at_rest,
    cancel,
    channel_pair,
    noise,
    round_trips,
    turns,
    usable,
)

SLOT = 64 << 10
CONFIG = ChannelConfig(slot_bytes=SLOT, messages=64)
KINDS: list[Any] = [
    ("memory", 1),
    ("reordered", 4),
    ("tcp", 1),
    ("tcp", 4),
    ("rdma", 1),
    ("rdma", 4),
]
KINDS += VERBS_KINDS

pytestmark = pytest.mark.usefixtures("loop_kind")
Pair = tuple[Channel, Channel]


@pytest.fixture(params=KINDS, ids=lambda p: f"{p[0]} x{p[1]}")
async def pair(request) -> AsyncIterator[Pair]:
    """Both ends of a channel. Afterwards it still works, every slot is back, and nothing is left behind."""
    kind, lanes = request.param
    async with nothing_left():
        async with channel_pair(kind, dataclasses.replace(CONFIG, lanes=lanes)) as (near, far):
            yield near, far
            if not near.is_closed:
                await usable(near, far)


# One by one


@pytest.mark.parametrize("way", ["arrays", "torch", "into", "chunks"])
async def test_ways_to_receive_a_transfer(pair: Pair, way: str) -> None:
    near, far = pair
    sent = {"a": noise(9 * SLOT), "b": np.arange(1000.0)}
    sending = asyncio.create_task(near.send_tensors(sent, meta=[way], confirm=True))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        assert (transfer.id, transfer.meta) == (1, [way])
        assert transfer.manifest.total_bytes == 9 * SLOT + 8000
        assert [(s.name, s.dtype, s.shape) for s in transfer.manifest.tensors] == [
            ("a", "U8", (9 * SLOT,)),
            ("b", "F64", (1000,)),
        ]
        got = {name: np.zeros_like(array) for name, array in sent.items()}
        match way:
            case "arrays":
                got = await transfer.arrays()
            case "torch":
                got = {name: t.numpy() for name, t in (await transfer.arrays("torch")).items()}
            case "into":
                await transfer.into(got)
            case "chunks":
                await gather_chunks(transfer, got)
    await sending
    assert all(alike(got[name], sent[name]) for name in sent)


async def gather_chunks(transfer: Transfer, arrays: dict[str, Any]) -> None:
    async for chunk in transfer.chunks():
        with chunk:
            for spec, first, view in chunk.parts():
                arrays[spec.name].reshape(-1)[first : first + view.size] = view
        chunk.release()
        with pytest.raises(Busy, match="was released"):
            chunk.parts()


async def test_a_refused_transfer_says_why_and_blocks_nothing(pair: Pair) -> None:
    near, far = pair
    sending = [asyncio.create_task(near.send_tensor(noise(9 * SLOT, i))) for i in range(6)]
    async with aclosing(far.incoming()) as transfers:
        for i in range(6):
            transfer = await anext(transfers)
            if i % 2:
                assert alike((await transfer.arrays())["tensor"], noise(9 * SLOT, i))
            else:
                await transfer.refuse(f"no room for number {i}")
    for i, outcome in enumerate(await asyncio.gather(*sending, return_exceptions=True)):
        if i % 2:
            assert outcome is None
        else:
            assert type(outcome) is TransferRefused
            assert f"no room for number {i}" in str(outcome)


@pytest.mark.parametrize(
    ("reason", "text"),
    [(ValueError("no room"), "no room"), ("bad \udc80 name", r"bad \udc80 name")],
    ids=["an exception", "no Unicode"],
)
async def test_a_refusal_arrives_whatever_its_reason_is(
    pair: Pair, reason: object, text: str
) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(9 * SLOT)))
    await (await anext(far.incoming())).refuse(reason)
    async with asyncio.timeout(10):
        with pytest.raises(TransferRefused) as caught:
            await sending
    assert text in str(caught.value)


async def test_leaving_chunks_early_aborts_the_transfer(pair: Pair) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(noise(30 * SLOT)))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        async with aclosing(transfer.chunks()) as chunks:
            first, second = await anext(chunks), await anext(chunks)
            first.release()
        with pytest.raises(TransferAborted, match="stopped before the last chunk"):
            await sending
        second.release()
        with pytest.raises(TransferAborted):
            await transfer.arrays()


async def test_a_consumer_that_is_cancelled_amid_its_work_keeps_no_slots(pair: Pair) -> None:
    near, far = pair

    async def consume(transfer: Transfer) -> None:
        async for chunk in transfer.chunks():
            await asyncio.get_running_loop().create_future()  # its work
            chunk.release()

    for _ in range(2 * CONFIG.slots):
        sending = asyncio.create_task(near.send_tensor(noise(40 * SLOT)))
        consuming = asyncio.create_task(consume(await anext(far.incoming())))
        await turns(5)
        await cancel(consuming)
        with pytest.raises(TransferAborted):
            await sending
    await at_rest(near, far)


async def test_a_borrowed_chunk_stays_as_it_is_until_released(pair: Pair) -> None:
    near, far = pair
    array = noise(12 * SLOT)
    sending = asyncio.create_task(near.send_tensor(array, confirm=True))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        held = []
        async for chunk in transfer.chunks():
            held.append(chunk)
            if len(held) == 3:
                await round_trips(near, far)
                for chunk in held:
                    ((_, first, view),) = chunk.parts()
                    assert np.array_equal(view, array[first : first + view.size])
                    assert not view.flags.writeable
                    chunk.release()
                held.clear()
    assert not held
    await sending


async def test_incoming_is_for_one_consumer(pair: Pair) -> None:
    near, far = pair
    waiting = asyncio.create_task(far.recv_tensor())
    await turns(2)
    with pytest.raises(Busy, match="somebody else receives"):
        await anext(far.incoming())
    waiting.cancel()
    await asyncio.wait([waiting])
    sending = asyncio.create_task(near.send_tensor(noise(40 * SLOT)))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        for call in (far.recv_tensor(), far.recv_tensors(), anext(far.incoming())):
            with pytest.raises(Busy, match=r"incoming|somebody else"):
                await call
        receiving = asyncio.create_task(transfer.arrays())
        await turns(1)
        with pytest.raises(Busy, match="received only once"):
            await transfer.arrays()
        with pytest.raises(Busy, match="cannot be refused now"):
            await transfer.refuse("too late")
        await receiving
        with pytest.raises(Busy, match="received only once"):
            await transfer.arrays()
    await sending
    await near.send("a message is none of its business")
    assert await far.recv()


async def test_leaving_the_loop_over_incoming_lets_others_receive_at_once(pair: Pair) -> None:
    near, far = pair
    sending = [asyncio.create_task(near.send_tensor(noise(100, i))) for i in range(3)]
    async for transfer in far.incoming():
        assert alike((await transfer.arrays())["tensor"], noise(100, 0))
        break
    assert alike(await far.recv_tensor(), noise(100, 1))
    assert alike((await (await anext(far.incoming())).arrays())["tensor"], noise(100, 2))
    await asyncio.gather(*sending)


async def test_a_step_of_incoming_that_is_cancelled_is_not_its_end(pair: Pair) -> None:
    near, far = pair
    transfers = far.incoming()
    waiting = asyncio.ensure_future(anext(transfers))
    await turns(2)
    waiting.cancel()
    await asyncio.wait([waiting])
    sending = asyncio.create_task(near.send_tensor(noise(100)))
    assert alike((await (await anext(transfers)).arrays())["tensor"], noise(100))
    await sending
    await transfers.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(transfers)


# Many at once


async def test_b_is_received_before_a_though_the_ring_is_full_of_a(pair: Pair) -> None:
    near, far = pair
    sent = [noise(40 * SLOT, i) for i in range(2)]
    sending = [asyncio.create_task(near.send_tensor(array)) for array in sent]
    async with aclosing(far.incoming()) as transfers:
        a, b = await anext(transfers), await anext(transfers)
        async with aclosing(a.chunks()) as chunks:
            held = [await anext(chunks)]  # claimed: as much of it flows as may
            await round_trips(near, far, count=5)
            assert alike((await b.arrays())["tensor"], sent[1])
            await sending[1]
            got = np.zeros_like(sent[0])
            while held:
                for chunk in held:
                    ((_, first, view),) = chunk.parts()
                    got[first : first + view.size] = view
                    chunk.release()
                held = [chunk async for chunk in _at_most(chunks, 2)]
    await sending[0]
    assert alike(got, sent[0])


async def _at_most(chunks: Any, count: int) -> AsyncIterator[Any]:
    for _ in range(count):
        try:
            yield await anext(chunks)
        except StopAsyncIteration:
            return


async def test_transfers_that_nobody_asks_for_block_no_other(pair: Pair) -> None:
    near, far = pair
    unwanted = [asyncio.create_task(near.send_tensor(noise(9 * SLOT))) for _ in range(30)]
    async with aclosing(far.incoming()) as transfers:
        left = [await anext(transfers) for _ in unwanted]
        for i in range(5):
            wanted = asyncio.create_task(near.send_tensor(noise(30 * SLOT, i), confirm=True))
            assert alike((await (await anext(transfers)).arrays())["tensor"], noise(30 * SLOT, i))
            await wanted
        held = sum(lane.held_slots for lane in far.stats().lanes)
        assert held <= len(far.lanes) * CONFIG.slots // 4
        assert not any(map(asyncio.Task.done, unwanted))
        for transfer in left:
            await transfer.refuse("unwanted")
    await asyncio.gather(*unwanted, return_exceptions=True)


async def test_transfers_set_aside_do_not_use_up_the_window_of_the_others(pair: Pair) -> None:
    near, far = pair
    aside = CONFIG.open_transfers - 6
    sending = [asyncio.create_task(near.send_tensor(noise(10), meta=i)) for i in range(aside + 40)]
    async with aclosing(far.incoming()) as transfers, asyncio.timeout(20):
        left = [await anext(transfers) for _ in range(aside)]
        for i in range(40):
            transfer = await anext(transfers)
            assert transfer.meta == aside + i
            await transfer.arrays()
        for transfer in left:
            await transfer.arrays()
    await asyncio.gather(*sending)


async def test_1000_transfers_at_once(pair: Pair) -> None:
    near, far = pair
    sizes = [(i * 7919) % (3 * SLOT) for i in range(1000)]
    sending = [
        asyncio.create_task(near.send_tensor(noise(n, i), meta=i)) for i, n in enumerate(sizes)
    ]
    receiving = [asyncio.create_task(far.recv_tensors()) for _ in range(500)]
    for i in range(1000):
        got = await (receiving[i] if i < len(receiving) else far.recv_tensors())
        assert got.meta == i
        assert alike(got.arrays["tensor"], noise(sizes[i], i))
        assert len(far._link.receptions) <= CONFIG.open_transfers
    await asyncio.gather(*sending)
    await at_rest(near, far)


async def test_both_ends_send_at_once(pair: Pair) -> None:
    array = noise(50 * SLOT + 1)

    async def converse(channel: Channel) -> None:
        for i in range(4):
            _, got = await asyncio.gather(channel.send_tensor(array), channel.recv_tensor())
            assert alike(got, array)
            await channel.send(i)
            assert await channel.recv() == i

    await asyncio.gather(*map(converse, pair))


async def test_what_is_constant_is_checked_once_for_all_channels(pair: Pair) -> None:
    near, far = pair
    array = noise(9 * SLOT)
    for is_constant in (False, True):
        outgoing = prepare({"tensor": array}, is_constant=is_constant)
        for meta in ("first", "second"):
            sending = asyncio.create_task(near.send_tensors(outgoing, meta=meta))
            assert alike(await far.recv_tensor(), array)
            await sending
        array[-1] ^= 1
        sending = asyncio.create_task(near.send_tensors(outgoing))
        receiving = asyncio.create_task(far.recv_tensor())
        ends = await asyncio.gather(sending, receiving, return_exceptions=True)
        if is_constant:
            assert [type(end) for end in ends] == [ChecksumError, ChecksumError]
        else:
            assert alike(ends[1], array)


@pytest.mark.parametrize("way", ["arrays", "into"])
async def test_whoever_receives_may_look_at_each_chunk_and_object(pair: Pair, way: str) -> None:
    near, far = pair
    array = np.arange(9 * SLOT // 8)

    async def receive(on_chunk: Any) -> Any:
        transfer = await anext(far.incoming())
        if way == "arrays":
            return (await transfer.arrays(on_chunk=on_chunk))["tensor"]
        into = np.zeros_like(array)
        await transfer.into({"tensor": into}, on_chunk=on_chunk)
        return into

    seen = []

    def look(chunk: Chunk) -> None:
        ((_, first, view),) = chunk.parts()
        assert alike(view, array[first : first + view.size])
        seen.append(first)

    sending = asyncio.create_task(near.send_tensor(array))
    assert alike(await receive(look), array)
    await sending
    assert sorted(seen) == list(range(0, array.size, SLOT // 8))

    def object_to(chunk: Chunk) -> None:
        if len(seen) == 12:
            raise ValueError("it does not please")
        seen.append(chunk.offset)

    sending = asyncio.create_task(near.send_tensor(array))
    with pytest.raises(ValueError, match="it does not please"):
        await receive(object_to)
    with pytest.raises(TransferAborted, match="objects to what came: it does not please"):
        await sending
