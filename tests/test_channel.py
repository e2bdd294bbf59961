"""Channels over every lane: what is sent arrives, in order, with the copies that are documented and no others."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ml_dtypes  # noqa: F401  (registers the dtypes that numpy alone has not)
import msgspec
import numpy as np
import pytest

from aiordma import (
    Channel,
    ChannelConfig,
    Received,
    TensorError,
    prepare,
)
from aiordma.tensors import allocate
from aiordma.wire.manifest import ITEM_BYTES, lay_out
from tests.foreign import nothing_left
from tests.harness import VERBS_KINDS, alike, channel_pair, noise, round_trips, turns, until, usable

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


def is_rdma(channel: Channel) -> bool:
    return channel.lanes[0].kind == "verbs"


# Messages


async def test_messages_come_in_order_and_keep_their_types(pair: Pair) -> None:
    class Point(msgspec.Struct):
        x: int
        y: float

    near, far = pair
    sent: list[Any] = [
        None,
        True,
        -1,
        1 << 63,
        0.5,
        "text",
        b"\x00",
        [],
        {"a": [1, {"b": None}]},
        "x" * 70_000,
    ]
    for obj in sent:
        await near.send(obj)
        await far.send([obj])
    assert [await far.recv() for _ in sent] == sent
    assert [await near.recv() for _ in sent] == [[obj] for obj in sent]
    await near.send(Point(1, 2.0))
    assert await far.recv(Point) == Point(1, 2.0)
    await near.send({"x": 3, "y": 4})
    assert await far.recv(type=dict[str, int]) == {"x": 3, "y": 4}
    assert near.stats().sent_messages == far.stats().received_messages == len(sent) + 2


async def test_many_senders_and_receivers_share_one_queue(pair: Pair) -> None:
    near, far = pair
    receiving = [asyncio.create_task(far.recv()) for _ in range(300)]
    await asyncio.gather(*(near.send(i) for i in range(300)))
    assert await asyncio.gather(*receiving) == list(range(300))


async def test_10000_messages_that_nobody_receives_are_held_back(pair: Pair) -> None:
    near, far = pair
    sending = [asyncio.create_task(near.send([i, "x" * 100])) for i in range(10_000)]
    await until(lambda: far.stats().unread_messages == CONFIG.messages)
    for _ in range(5):
        assert await near.ping() < 5
        assert await far.ping() < 5
    assert near.stats().sent_messages == CONFIG.messages
    assert far.stats().unread_messages == CONFIG.messages
    assert near.stats().kept_frames <= CONFIG.messages
    assert not any(map(asyncio.Task.done, sending[CONFIG.messages :]))
    for i in range(10_000):
        assert (await far.recv())[0] == i
    await asyncio.gather(*sending)
    await round_trips(near, far)
    assert far.stats().unread_messages == 0
    assert near.stats().kept_frames <= 32


async def test_bytes_of_messages_are_a_window_too(loop_kind: str) -> None:
    config = ChannelConfig(message_bytes=4096)
    async with nothing_left(), channel_pair("tcp", config) as (near, far):
        sending = [asyncio.create_task(near.send("x" * 2000)) for _ in range(9)]
        await round_trips(near, far)
        assert far.stats().unread_messages == 2
        assert [len(await far.recv()) for _ in sending] == [2000] * 9
        await asyncio.gather(*sending)


async def test_ping_measures(pair: Pair) -> None:
    near, far = pair
    rtt_s = await near.ping()
    assert 0 < rtt_s < 5
    assert near.stats().rtt_s == rtt_s
    assert all(0 < s < 5 for s in await asyncio.gather(*(far.ping() for _ in range(50))))


# Tensors


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("is_into", [False, True])
async def test_every_dtype_and_shape(pair: Pair, framework: Any, is_into: bool) -> None:
    near, far = pair
    shapes = [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 1, 3, 1), (SLOT // 4 + 1,)]
    dtypes = [d for d in ITEM_BYTES if framework == "numpy" or d != "F8_E8M0"]
    manifest = lay_out((f"{d}{s}", d, s, None) for d in dtypes for s in shapes)
    buffer, sent = allocate(manifest, framework)
    buffer[:] = (noise(len(buffer)) & 1).data  # a bool is 0 or 1
    into = allocate(manifest, framework)[1] if is_into else None
    sending = asyncio.create_task(near.send_tensors(sent, meta=[1, "two"], confirm=True))
    got = await far.recv_tensors(into=into, framework="numpy" if is_into else framework)
    await sending
    assert got.meta == [1, "two"]
    assert list(got.arrays) == list(sent)
    assert all(alike(got.arrays[name], sent[name]) for name in sent)
    assert into is None or all(got.arrays[name] is into[name] for name in into)


@pytest.mark.parametrize("nbytes", [0, 1, 63, SLOT - 1, SLOT, SLOT + 1, 7 * SLOT, 40 * SLOT - 1])
@pytest.mark.parametrize("is_waiting", [False, True])
async def test_sizes_about_a_slot(pair: Pair, nbytes: int, is_waiting: bool) -> None:
    near, far = pair
    array, into = noise(nbytes), np.zeros(nbytes, np.uint8)
    receiving = asyncio.ensure_future(far.recv_tensor(into=into))
    await turns(3 * is_waiting)
    await near.send_tensor(array)
    assert await receiving is into
    assert np.array_equal(into, array)
    assert near.stats().sent_bytes == far.stats().received_bytes == nbytes
    assert near.stats().sent_chunks == -(-nbytes // SLOT)


@pytest.mark.parametrize("confirm", [False, True])
async def test_no_tensors_at_all(pair: Pair, confirm: bool) -> None:
    near, far = pair
    sending = asyncio.create_task(near.send_tensors({}, meta={"empty": True}, confirm=confirm))
    assert await far.recv_tensors() == Received({}, {"empty": True})
    await sending


async def test_many_tiny_tensors_share_chunks(pair: Pair) -> None:
    near, far = pair
    sent = {f"t{i}": np.full(i % 5, i % 200, [np.uint8, np.int64][i % 2]) for i in range(1000)}
    into = {name: np.zeros_like(array) for name, array in sent.items()}
    for wanted in (None, into):
        sending = asyncio.create_task(near.send_tensors(sent))
        got = await far.recv_tensors(into=wanted)
        await sending
        assert all(alike(got.arrays[name], array) for name, array in sent.items())
    total = sum(array.nbytes for array in sent.values())
    assert near.stats().sent_chunks == 2 * -(-total // SLOT)
    # More pieces than one system call gathers are staged, each byte once; and copied to where a device reads.
    assert near.stats().copied_bytes == 2 * total * (1 + is_rdma(near))


async def test_tied_tensors_travel_once(pair: Pair) -> None:
    near, far = pair
    tied = noise(3 * SLOT)
    sent = {"wte": tied, "bias": np.ones(3), "lm_head": tied}
    separate = {name: np.zeros_like(array) for name, array in sent.items()}
    for wanted in (None, separate):
        sending = asyncio.create_task(near.send_tensors(sent))
        got = (await far.recv_tensors(into=wanted)).arrays
        await sending
        assert list(got) == list(sent)
        assert all(alike(got[name], sent[name]) for name in sent)
        assert np.shares_memory(got["wte"], got["lm_head"]) == (wanted is None)
    assert near.stats().sent_bytes == 2 * (tied.nbytes + 24)


@pytest.mark.parametrize("count", [1, 5])
async def test_what_is_prepared_goes_to_many(pair: Pair, count: int) -> None:
    near, far = pair
    array = noise(5 * SLOT + 3)
    outgoing = prepare({"a": array}, meta="the round")
    async with channel_pair("tcp", CONFIG) as other:
        ends = [(near, far), other] * count
        sending = [asyncio.create_task(left.send_tensors(outgoing)) for left, _ in ends]
        for _, right in ends:
            arrays, meta = await right.recv_tensors()
            assert meta == "the round"
            assert alike(arrays["a"], array)
        await asyncio.gather(*sending)
        other_meta = asyncio.create_task(near.send_tensors(outgoing, meta="another"))
        assert (await far.recv_tensors()).meta == "another"
        await other_meta


async def test_what_does_not_lie_in_host_memory_is_staged(pair: Pair) -> None:
    near, far = pair
    array = noise(20 * SLOT + 5)
    on_device = dataclasses.replace(prepare({"t": array}), is_host=False)
    sending = asyncio.create_task(near.send_tensors(on_device))
    assert alike(await far.recv_tensor(), array)
    await sending
    assert near.stats().copied_bytes == array.nbytes * (1 + is_rdma(near))
    # Staging memory is used again: no more of it than chunks that one lane holds.
    assert 1 <= sum(len(port._stages) for port in near._link.ports) <= 8 * len(near.lanes)


async def test_confirm_waits_until_it_is_consumed(pair: Pair) -> None:
    near, far = pair
    plain = asyncio.create_task(near.send_tensor(np.arange(9)))
    confirmed = asyncio.create_task(near.send_tensor(np.arange(9), confirm=True))
    async with aclosing(far.incoming()) as transfers:
        await plain
        first, second = await anext(transfers), await anext(transfers)
        async with aclosing(second.chunks()) as chunks:
            async for chunk in chunks:
                await round_trips(near, far)
                assert not confirmed.done()
                chunk.release()
        await confirmed
        await first.arrays()


async def test_bytes_that_are_not_copied(pair: Pair) -> None:
    near, far = pair
    early_bytes = 0
    keep = far._link._early.add

    def add(header: Any, chunk: Any, now: float) -> None:
        nonlocal early_bytes
        early_bytes += chunk.nbytes
        keep(header, chunk, now)

    far._link._early.add = add  # type: ignore[method-assign]
    for into in (np.zeros(64 * SLOT, np.uint8), None):
        array = noise(64 * SLOT)
        receiving = asyncio.create_task(far.recv_tensor(into=into))
        await round_trips(far, near)
        await near.send_tensor(array)
        assert alike(await receiving, array)
    if is_rdma(near):  # from memory that is not registered, and out of the ring
        assert near.stats().copied_bytes == far.stats().copied_bytes == 2 * 64 * SLOT
    else:
        assert near.stats().copied_bytes == 0
        assert far.stats().copied_bytes == early_bytes
    assert early_bytes <= 2 * len(far.lanes) * CONFIG.slots * SLOT


async def test_each_of_4_lanes_carries_its_part(loop_kind: str) -> None:
    config = ChannelConfig(lanes=4)
    async with nothing_left(), channel_pair("tcp", config) as (near, far):
        for left, right in ((near, far), (far, near)):
            into = np.zeros(64 << 20, np.uint8)
            receiving = asyncio.create_task(right.recv_tensor(into=into))
            await left.send_tensor(np.ones(64 << 20, np.uint8))
            await receiving
            assert into.all()
            stats = left.stats()
            assert sum(lane.sent_bytes for lane in stats.lanes) == stats.sent_bytes == 64 << 20
            assert min(lane.sent_bytes for lane in stats.lanes) >= 0.15 * stats.sent_bytes
            assert [lane.received_bytes for lane in right.stats().lanes] == [
                lane.sent_bytes for lane in stats.lanes
            ]


# Requests that a transfer does not fit


async def test_a_transfer_that_did_not_fit_is_still_the_next(pair: Pair) -> None:
    near, far = pair
    arrays = [noise(3 * SLOT, seed=i) for i in range(3)]
    sending = [asyncio.create_task(near.send_tensor(array)) for array in arrays]
    for wrong in (np.zeros(3, np.uint8), np.zeros(3 * SLOT, np.int8)):
        with pytest.raises(TensorError):
            await far.recv_tensor(into=wrong)
    receiving = [asyncio.create_task(far.recv_tensor()) for _ in arrays]
    for task, array in zip(receiving, arrays, strict=True):
        assert alike(await task, array)
    await asyncio.gather(*sending)
