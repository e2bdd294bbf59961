"""How channels end: in order, by cancellation, by death; and with forked processes that hold their sockets."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    ChannelConfig,
    ChannelError,
    ConnectError,
    RemoteProtocolError,
    listen,
)
from aiordma.ring import BUDGET
from tests.conftest import children, tasks
from tests.foreign import nothing_left
from tests.harness import (
    LANE_PARAMS,
    at_rest,
    channel_pair,
    noise,
    program,
    round_trips,
    turns,
    until,
    usable,
)

SLOT = 16 << 10
CONFIG = ChannelConfig(slot_bytes=SLOT, slots=4, messages=8)

pytestmark = pytest.mark.usefixtures("loop_kind")
Pair = tuple[Channel, Channel]


@pytest.fixture(autouse=True)
async def untouched(loop_kind: str) -> AsyncIterator[None]:
    async with nothing_left():
        yield


@pytest.fixture(params=LANE_PARAMS)
async def pair(request, untouched: None) -> AsyncIterator[Pair]:
    async with channel_pair(request.param, CONFIG) as ends:
        yield ends


async def test_what_came_before_the_goodbye_can_still_be_received(pair: Pair) -> None:
    near, far = pair
    for i in range(5):
        await near.send(i)
    await near.send_tensor(noise(SLOT))  # one chunk is acknowledged, though nobody asked for it yet
    await near.send_tensors({"nothing": np.zeros(0)}, meta="empty")
    await near.aclose()
    await until(lambda: far.is_closed)
    assert [await far.recv() for _ in range(5)] == list(range(5))
    with pytest.raises(ChannelClosed, match="the peer closed the channel: goodbye"):
        await far.recv()
    assert np.array_equal(await far.recv_tensor(), noise(SLOT))
    assert (await far.recv_tensors()).meta == "empty"
    with pytest.raises(ChannelClosed, match="the peer closed the channel: goodbye"):
        await far.recv_tensor()


async def test_incoming_ends_after_the_last_whole_transfer(pair: Pair) -> None:
    near, far = pair
    for i in range(2):
        await near.send_tensor(noise(i * SLOT), meta=i)
    hopeless = asyncio.create_task(near.send_tensor(noise(9 * SLOT)))
    await round_trips(near, far)
    await near.aclose()
    with pytest.raises(ChannelClosed, match="this end closed"):
        await hopeless
    await until(lambda: far.is_closed)
    got = [transfer.meta async for transfer in far.incoming() if await transfer.arrays()]
    assert got == [0, 1]


async def test_incoming_raises_when_the_peer_ends_for_what_we_sent(pair: Pair) -> None:
    near, far = pair
    got = []

    async def consume() -> None:
        async for transfer in near.incoming():
            await transfer.arrays()
            got.append(transfer.meta)

    consuming = asyncio.create_task(consume())
    await far.send_tensor(noise(SLOT), confirm=True)
    far._link.fail(RemoteProtocolError("a chunk came for slot 3, which was not granted"))
    with pytest.raises(ChannelBroken, match=r"the peer closed the channel: what came .* slot 3"):
        await consuming
    assert len(got) == 1


def calls(channel: Channel) -> dict[str, Callable[[], Any]]:
    """Every call that may wait, and where it is made a transfer of many chunks that nobody receives."""

    async def wait_for_room() -> None:
        for _ in range(CONFIG.messages + 1):
            await channel.send("x")

    return {
        "send": wait_for_room,
        "recv": channel.recv,
        "ping": channel.ping,
        "send_tensor": lambda: channel.send_tensor(noise(9 * SLOT)),
        "confirm": lambda: channel.send_tensor(noise(9), confirm=True),
        "recv_tensor": lambda: channel.recv_tensor(into=noise(9 * SLOT)),
        "recv_tensors": channel.recv_tensors,
    }


@pytest.mark.parametrize("who", ["this end", "the peer"])
async def test_calls_that_wait_when_the_channel_is_closed(pair: Pair, who: str) -> None:
    near, far = pair
    waiting = {name: asyncio.create_task(call()) for name, call in calls(near).items()}
    await round_trips(near, far)
    assert [name for name, task in waiting.items() if task.done()] == ["ping"]
    waiting["ping"] = asyncio.create_task(near.ping())
    await turns(1)
    await (near if who == "this end" else far).aclose()
    await asyncio.wait(waiting.values())
    for name, task in waiting.items():
        if name != "ping" or task.exception() is not None:
            with pytest.raises(ChannelClosed, match=f"^{who}"):
                await task
    await near.aclose()
    for call in calls(near).values():
        with pytest.raises(ChannelClosed, match=f"^{who}"):
            await call()
    assert not [transfer async for transfer in near.incoming()]
    stats = near.stats()
    assert (stats.open_sends, stats.open_receives) == (0, 0)


async def test_a_receive_under_way_when_the_peer_closes(pair: Pair) -> None:
    near, far = pair
    into = np.zeros(200 * SLOT, np.uint8)
    receiving = asyncio.create_task(far.recv_tensor(into=into))
    sending = asyncio.create_task(near.send_tensor(noise(200 * SLOT)))
    await until(into.any)
    await near.aclose()
    with pytest.raises(ChannelClosed, match="this end"):
        await sending
    with pytest.raises(ChannelClosed, match="the peer"):
        await receiving
    into[:] = 7
    await turns(5)
    await far.aclose()
    assert (into == 7).all()


async def test_close_is_idempotent_and_may_be_called_by_many(pair: Pair) -> None:
    near, far = pair
    await asyncio.gather(near.aclose(), near.aclose(), far.aclose(), far.aclose())
    await near.aclose()
    await far.aclose()
    assert near.is_closed
    assert far.is_closed


@pytest.mark.parametrize("point", range(6))
async def test_a_close_that_is_cancelled_goes_on(pair: Pair, point: int) -> None:
    near, _ = pair
    used_bytes = BUDGET.used_bytes
    closing = asyncio.create_task(near.aclose())
    await turns(point)
    closing.cancel()
    await asyncio.wait([closing])
    if near.is_closed:
        await until(lambda: BUDGET.used_bytes <= used_bytes - CONFIG.slots * SLOT)
        with pytest.raises(ChannelClosed):
            await near.recv()


@pytest.mark.parametrize("point", range(4))
async def test_a_transfer_that_crosses_the_goodbye(pair: Pair, point: int) -> None:
    near, far = pair
    sending = asyncio.create_task(far.send_tensor(noise(9 * SLOT)))
    await turns(point)
    await near.aclose()
    with pytest.raises(ChannelClosed, match="the peer closed the channel: goodbye"):
        await sending


async def test_messages_arrive_before_the_goodbye(pair: Pair) -> None:
    near, far = pair
    for i in range(CONFIG.messages):
        await near.send([i, "x" * 100_000])
    await near.aclose()
    assert [(await far.recv())[0] for _ in range(CONFIG.messages)] == list(range(CONFIG.messages))


# Death


PEER = """
import asyncio, sys
import aiordma, numpy as np

async def main():
    async with aiordma.connect("127.0.0.1", int(sys.argv[1])) as channel:
        await channel.send("up")
        sending = asyncio.ensure_future(channel.send_tensor(np.ones(1 << 26, np.uint8)))
        await channel.recv()

asyncio.run(main())
"""


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_peer_that_is_killed(is_busy: bool) -> None:
    async with listen() as listener, program(PEER, listener.address[1]) as peer:
        async with await listener.accept() as channel:
            assert await channel.recv() == "up"
            waiting = [asyncio.create_task(channel.recv()), asyncio.create_task(channel.ping())]
            await waiting.pop()
            if is_busy:
                waiting.append(asyncio.create_task(channel.recv_tensor()))
                await until(lambda: channel.stats().received_chunks)
            os.kill(peer.pid, signal.SIGKILL)
            for task in waiting:
                with pytest.raises(ChannelBroken, match="connect again") as caught:
                    await task
                assert type(caught.value) is ChannelBroken
            with pytest.raises(ChannelBroken):
                await channel.send_tensor(noise(3))


# Fork


@pytest.mark.parametrize("lanes", [1, 3])
async def test_a_peer_notices_the_end_though_a_forked_process_holds_the_sockets(lanes: int) -> None:
    config = ChannelConfig(slot_bytes=SLOT, lanes=lanes)
    fork = multiprocessing.get_context("fork")
    async with channel_pair("tcp", config) as (near, far):
        await usable(near, far)
        ours, theirs = fork.Pipe()
        worker = fork.Process(target=_echo, args=(theirs,))
        worker.start()
        try:
            ours.send("up")
            assert ours.recv() == "up"
            await usable(near, far)
            receiving = asyncio.create_task(far.recv())
            await turns(2)
            await near.aclose()
            with pytest.raises(ChannelClosed, match="goodbye"):
                await receiving
            await far.aclose()
            ours.send("still up")
            assert ours.recv() == "still up"
        finally:
            ours.send(None)
            worker.join()
            worker.close()
            ours.close()
            theirs.close()


async def test_a_listener_ends_though_a_forked_process_holds_its_sockets() -> None:
    fork = multiprocessing.get_context("fork")
    async with listen(config=ChannelConfig(connect_timeout_s=0.2)) as listener:
        reader, writer = await asyncio.open_connection(*listener.address)
        await turns(5)
        ours, theirs = fork.Pipe()
        worker = fork.Process(target=_echo, args=(theirs,))
        worker.start()
        try:
            ours.send("up")
            assert ours.recv() == "up"
            async with asyncio.timeout(10):  # the handshake that never comes is given up
                assert not await reader.read()
            await listener.aclose()
            with pytest.raises(ConnectError, match="refused"):
                await aiordma.connect(*listener.address, timeout_s=2)
            async with listen(port=listener.address[1]):
                pass
        finally:
            ours.send(None)
            worker.join()
            worker.close()
            ours.close()
            theirs.close()
            writer.close()
            await writer.wait_closed()


def _echo(pipe: Any) -> None:
    while (word := pipe.recv()) is not None:
        pipe.send(word)


async def test_an_idle_channel_has_no_task_and_no_timer(pair: Pair) -> None:
    near, far = pair
    before = tasks()
    await usable(near, far)
    await at_rest(near, far)
    assert tasks() == before
    assert not children()
    assert isinstance(near, aiordma.Channel)
    assert issubclass(ChannelClosed, ChannelError)


SILO = """
import asyncio, sys
import torch
import aiordma
from torch.utils.data import DataLoader, TensorDataset

async def main():
    torch.set_num_threads(1)
    data = TensorDataset(torch.arange(64.0))
    async with aiordma.connect("127.0.0.1", int(sys.argv[1])) as channel:
        loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
        for _ in range(2):
            update = sum(batch.sum() for (batch,) in loader)
            await channel.send_tensor(update, confirm=True)
        workers = loader._iterator._workers
        await channel.send([worker.pid for worker in workers])
    assert all(worker.is_alive() for worker in workers)
    print("closed", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_a_silo_whose_data_loader_forks_two_workers() -> None:
    async with listen() as listener, program(SILO, listener.address[1]) as silo:
        async with await listener.accept() as channel:
            for _ in range(2):
                assert (await channel.recv_tensor()).tolist() == 2016.0
            workers = await channel.recv()
            with pytest.raises(ChannelClosed, match="goodbye"):
                await channel.recv()
        assert silo.stdout is not None
        assert await silo.stdout.readline() == b"closed\n"
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, 0)  # they live, and hold the sockets of the channel that is over
        assert silo.stdin is not None
        silo.stdin.close()
        assert await silo.wait() == 0
