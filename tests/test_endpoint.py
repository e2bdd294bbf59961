"""How channels come to be and how they end: connect, listen, serve, close, death, fork."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from aiordma import (
    Channel,
    ChannelClosed,
    ChannelConfig,
    ConnectError,
    LaneInfo,
    Listener,
    connect,
    listen,
    serve,
)
from aiordma.control import TcpControl
from aiordma.listener import _MAX_UNACCEPTED
from aiordma.ring import BUDGET
from tests.foreign import nothing_left
from tests.harness import (
    LANE_PARAMS,
    channel_pair,
    noise,
    run,
    socket_pair,
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
                assert lane.reason == "tcp: the client: require='tcp'"
                assert 0 < channel.stats().rtt_s < 5
                assert not channel.is_closed
            assert repr(near) == f"<aiordma.Channel to {near.peer}, 1 tcp lane(s), open>"
        assert near.is_closed
        assert repr(near).endswith("1 tcp lane(s), over: the peer closed the channel: goodbye>")


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
    listener = await listen(config=CONFIG)

    async def accept() -> list[Channel]:
        return [channel async for channel in listener]

    accepting = asyncio.create_task(accept())
    near = await connect(*listener.address, config=CONFIG)
    await near.ping()  # answered by a channel that is whole
    await listener.aclose()
    await listener.aclose()
    (far,) = await accepting
    with pytest.raises(ChannelClosed, match="the listener is closed"):
        await listener.accept()
    await usable(near, far)
    await asyncio.gather(near.aclose(), far.aclose())


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


class Ear:
    """Hears a control connection."""

    def __init__(self) -> None:
        self.heard = b""
        self.lost: list[Exception | None] = []

    def control_received(self, data: bytes) -> None:
        self.heard += data

    def control_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


@pytest.mark.parametrize("has_ended", [False, True])
async def test_what_a_peer_says_before_our_end_is_ready_is_not_lost(has_ended: bool) -> None:
    near, far = socket_pair()
    far.send(b"early ")
    control = await TcpControl.open(near)
    await turns(3)
    far.send(b"bird")
    if has_ended:
        far.close()
    await turns(3)
    ear = Ear()
    control.start(ear)
    await until(lambda: ear.heard == b"early bird")
    far.close()
    await until(lambda: ear.lost == [None])
    control.abort()
    await control.wait_ended()


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


@given(point=st.integers(0, 40), loop_kind=st.sampled_from(["asyncio", "uvloop"]))
@settings(max_examples=60)
def test_when_a_server_is_closed_so_are_all_its_channels(point: int, loop_kind: str) -> None:
    """Also one whose handler has not begun yet, or ended, and closes its channel just now."""

    async def handler(channel: Channel) -> None:
        await channel.ping()

    async def scene() -> None:
        async with nothing_left():
            used_bytes = BUDGET.used_bytes
            async with serve(handler, config=CONFIG) as server:
                ends = [await connect(*server.address, config=CONFIG) for _ in range(3)]
                await turns(point)
            assert BUDGET.used_bytes == used_bytes + len(ends) * CONFIG.slots * SLOT
            for near in ends:
                await near.aclose()

    run(scene(), loop_kind)


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


async def test_channels_that_nobody_accepts_are_bounded() -> None:
    async with listen(config=CONFIG) as listener, AsyncExitStack() as stack:
        for _ in range(_MAX_UNACCEPTED):
            await stack.enter_async_context(connect(*listener.address, config=CONFIG))
        with pytest.raises(ConnectError, match="accepts no channels at the moment: try again"):
            await connect(*listener.address, config=CONFIG)
        await stack.enter_async_context(await listener.accept())
        await stack.enter_async_context(connect(*listener.address, config=CONFIG))


async def test_a_process_without_descriptors_left_accepts_again_when_it_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meanwhile it does not spin on a readiness that it can do nothing about."""

    class Exhausted:
        attempts = 0

        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def accept(self) -> Any:
            self.attempts += 1
            if self.attempts == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return self._sock.accept()

    monkeypatch.setattr("aiordma.listener._ACCEPT_PAUSE_S", 0.1)
    async with listen(config=CONFIG) as listener:
        sock = Exhausted(listener._sock)
        monkeypatch.setattr(listener, "_sock", sock)
        connecting = asyncio.create_task(connected(listener))
        await until(lambda: sock.attempts)
        await turns(50)
        assert sock.attempts == 1
        async with await connecting:
            assert sock.attempts >= 2


async def connected(listener: Listener) -> Channel:
    return await connect(*listener.address, config=CONFIG)
