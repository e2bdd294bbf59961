"""How channels come to be and how they end: connect, listen, serve, close, death, fork."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import aiordma
from aiordma import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    ChannelConfig,
    ChannelError,
    LaneInfo,
    connect,
    listen,
    serve,
)
from tests.conftest import children, tasks
from tests.foreign import nothing_left
from tests.harness import (
    LANES,
    at_rest,
    channel_pair,
    noise,
    program,
    round_trips,
    run,
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


@pytest.fixture(params=LANES)
async def pair(request, untouched: None) -> AsyncIterator[Pair]:
    async with channel_pair(request.param, CONFIG) as ends:
        yield ends


# Opening


async def test_both_ways_to_open() -> None:
    listener = await listen()
    near = await connect(*listener.address)
    far = await listener.accept()
    await usable(near, far)
    await asyncio.gather(near.aclose(), far.aclose())
    await listener.aclose()
    async with listen(config=CONFIG) as listener, connect(*listener.address) as near:
        async with await anext(aiter(listener)) as far:
            await usable(near, far)


async def test_what_a_channel_says_of_itself() -> None:
    async with listen() as listener:
        host, port = listener.address
        assert host == "127.0.0.1"
        async with connect(host, port, require="tcp") as near, await listener.accept() as far:
            assert near.peer == f"{host}:{port}"
            assert far.peer.startswith("127.0.0.1:")
            assert far.peer != near.peer
            for channel in (near, far):
                (lane,) = channel.lanes
                assert isinstance(lane, LaneInfo)
                assert (lane.index, lane.kind) == (0, "tcp")
                assert "no RDMA" in lane.reason
                assert 0 < channel.stats().rtt_s < 5
                assert not channel.is_closed
            assert repr(near) == f"<aiordma.Channel to {near.peer}, 1 tcp lane(s), open>"
        assert near.is_closed
        assert repr(near).endswith("over: this end closed the channel>")


@pytest.mark.parametrize(("left", "right"), [(1, 4), (4, 1), (3, 2), (5, 5)])
async def test_the_smaller_number_of_lanes_is_opened(left: int, right: int) -> None:
    ends = (ChannelConfig(lanes=n, slot_bytes=SLOT) for n in (left, right))
    async with channel_pair("tcp", *ends) as (near, far):
        assert len(near.lanes) == len(far.lanes) == min(left, right)
        assert [lane.index for lane in near.lanes] == list(range(min(left, right)))
        await usable(near, far)


async def test_each_end_has_settings_of_its_own() -> None:
    left = ChannelConfig(slot_bytes=64, slots=16, messages=1, message_bytes=2048, open_transfers=1)
    right = ChannelConfig(slot_bytes=1 << 20, slots=5, checksum=False)
    async with channel_pair("tcp", left, right) as (near, far):
        await usable(near, far)
        before = near.stats()
        array = noise(100_000)
        for one, other in ((near, far), (far, near)):
            sending = [asyncio.create_task(one.send_tensor(array)) for _ in range(3)]
            for _ in sending:
                assert np.array_equal(await other.recv_tensor(), array)
            await asyncio.gather(*sending)
        after = near.stats()
        assert after.sent_chunks - before.sent_chunks == 3
        assert after.received_chunks - before.received_chunks == 3 * -(-100_000 // 64)


async def test_a_listener_hands_channels_over_in_order_and_loses_none() -> None:
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(listen(config=CONFIG))
        impatient = asyncio.create_task(listener.accept())
        await turns(1)
        impatient.cancel()
        ends = [
            await stack.enter_async_context(connect(*listener.address, config=CONFIG))
            for _ in range(5)
        ]
        for i, near in enumerate(ends):
            await near.send(i)
        for i in range(5):
            far = await stack.enter_async_context(await listener.accept())
            assert await far.recv() == i


async def test_a_listener_that_closes_ends_its_loop_and_lets_channels_live() -> None:
    accepted: list[Channel] = []
    listener = await listen(config=CONFIG)

    async def accept() -> None:
        async for channel in listener:
            accepted.append(channel)

    accepting = asyncio.create_task(accept())
    near = await connect(*listener.address, config=CONFIG)
    await until(lambda: accepted)
    await listener.aclose()
    await listener.aclose()
    await accepting
    with pytest.raises(ChannelClosed, match="the listener is closed"):
        await listener.accept()
    await usable(near, accepted[0])
    await asyncio.gather(near.aclose(), accepted[0].aclose())


async def test_a_channel_that_nobody_took_is_closed_with_its_listener() -> None:
    async with listen(config=CONFIG) as listener:
        near = await connect(*listener.address, config=CONFIG)
        receiving = asyncio.create_task(near.recv())
        await near.ping()
    with pytest.raises(ChannelClosed, match="the peer closed the channel"):
        await receiving
    await near.aclose()


@pytest.mark.parametrize("lanes", [1, 3])
@given(point=st.integers(0, 60), loop_kind=st.sampled_from(["asyncio", "uvloop"]))
@settings(max_examples=60)
def test_a_connect_that_is_cancelled_leaves_nothing(lanes: int, point: int, loop_kind: str) -> None:
    config = ChannelConfig(slot_bytes=SLOT, lanes=lanes)

    async def scene() -> None:
        async with nothing_left(), listen(config=config) as listener:
            opening = asyncio.ensure_future(_open(connect(*listener.address, config=config)))
            await turns(point)
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled():
                await opening.result().aclose()
            async with connect(*listener.address, config=config) as near:
                far = await listener.accept()
                while far.is_closed or not opening.cancelled():
                    await far.aclose()
                    if not len(listener._channels):
                        break
                    far = await listener.accept()
                await far.aclose()
                await near.aclose()

    run(scene(), loop_kind)


async def _open(opening: Any) -> Channel:
    channel: Channel = await opening
    return channel


# Serving


async def test_a_server_runs_a_handler_for_each_channel() -> None:
    async def handler(channel: Channel) -> None:
        name = await channel.recv()
        array = await channel.recv_tensor()
        await channel.send_tensor(array[::-1].copy(), meta=name, confirm=True)

    async def visit(address: tuple[str, int], name: int) -> None:
        async with connect(*address, config=CONFIG) as channel:
            await channel.send(name)
            await channel.send_tensor(noise(5 * SLOT, name))
            got = await channel.recv_tensors()
            assert got.meta == name
            assert np.array_equal(got.arrays["tensor"], noise(5 * SLOT, name)[::-1])
            with pytest.raises(ChannelClosed):
                await channel.recv()  # the handler's end closes the channel

    async with serve(handler, config=CONFIG) as server:
        await asyncio.gather(*(visit(server.address, i) for i in range(12)))


async def test_a_server_that_closes_cancels_its_handlers_and_closes_their_channels() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def handler(channel: Channel) -> None:
        try:
            began.set()
            await channel.recv()
        finally:
            ended.set()

    async with serve(handler, config=CONFIG) as server:
        near = await connect(*server.address, config=CONFIG)
        await began.wait()
    assert ended.is_set()
    with pytest.raises(ChannelClosed):
        await near.recv()
    await near.aclose()


async def test_what_a_handler_raises_does_not_end_the_server(loop_kind: str) -> None:
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    handler_before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reported.append(context))

    async def handler(channel: Channel) -> None:
        if await channel.recv() == "bug":
            raise ZeroDivisionError("a bug")
        await channel.recv()  # raises ChannelClosed, which is no bug

    async with serve(handler, config=CONFIG) as server:
        for word in ("bug", "go", "bug"):
            async with connect(*server.address, config=CONFIG) as channel:
                await channel.send(word)
                if word == "bug":
                    with pytest.raises(ChannelClosed):
                        await channel.recv()
    loop.set_exception_handler(handler_before)
    assert [type(context["exception"]) for context in reported] == [ZeroDivisionError] * 2
    assert all("the handler of <aiordma.Channel" in context["message"] for context in reported)


# Closing


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
    names = [name for name in calls(near) if name != "ping"]
    waiting = [asyncio.create_task(calls(near)[name]()) for name in names]
    await round_trips(near, far)
    assert not any(map(asyncio.Task.done, waiting))
    pinging = asyncio.create_task(near.ping())
    await turns(1)
    await (near if who == "this end" else far).aclose()
    for name, outcome in zip(
        names, await asyncio.gather(*waiting, return_exceptions=True), strict=True
    ):
        assert type(outcome) is ChannelClosed, name
        assert str(outcome).startswith(who), name
    await asyncio.wait([pinging])
    await near.aclose()
    for name, call in calls(near).items():
        with pytest.raises(ChannelClosed, match=who):
            await call()
        assert name
    with pytest.raises(ChannelClosed):
        async with aclosing(near.incoming()) as transfers:
            async for _ in transfers:
                raise AssertionError("nothing came")
        await near.send(1)
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


@pytest.mark.parametrize("point", [0, 1, 2, 3, 5])
async def test_a_close_that_is_cancelled_goes_on(pair: Pair, point: int) -> None:
    near, far = pair
    closing = asyncio.create_task(near.aclose())
    await turns(point)
    closing.cancel()
    await asyncio.wait([closing])
    if near.is_closed:
        with pytest.raises(ChannelClosed):
            await far.recv()
    await near.aclose()


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


def _echo(pipe: Any) -> None:
    while (word := pipe.recv()) is not None:
        pipe.send(word)


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


async def test_an_idle_channel_has_no_task_and_no_timer(pair: Pair) -> None:
    near, far = pair
    before = tasks()
    await usable(near, far)
    await at_rest(near, far)
    assert tasks() == before
    assert not children()
    assert isinstance(near, aiordma.Channel)
    assert issubclass(ChannelClosed, ChannelError)
