"""What cannot be opened, and a peer that dies: the exact error, its cause and its remedy, and nothing left."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import (
    AiordmaError,
    Busy,
    Channel,
    ChannelBroken,
    ChannelConfig,
    Chunk,
    ConfigError,
    ConnectError,
    LaneRefused,
)
from aiordma.ring import BUDGET
from tests.foreign import CONFIG, nothing_left


@pytest.fixture(autouse=True)
async def untouched(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    if "loop_kind" in request.fixturenames:
        # uvloop opens two sockets of its own each time that it is run: such a test looks itself.
        yield
    else:
        async with nothing_left():
            yield


@pytest.fixture
async def pair(untouched: None) -> AsyncIterator[tuple[Channel, Channel]]:
    async with aiordma.listen(config=CONFIG) as listener:
        async with aiordma.connect(*listener.address, config=CONFIG) as near:
            async with await listener.accept() as far:
                yield near, far


# connect and listen


def row(name: str, opening: Any, error: type[AiordmaError], *texts: str) -> Any:
    return pytest.param(opening, error, texts, id=name)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


OPENINGS = [
    row(
        "nobody listens",
        lambda: aiordma.connect("127.0.0.1", closed_port()),
        ConnectError,
        "(Connection refused): is the server running, and is the port right?",
    ),
    row(
        "no such host",
        lambda: aiordma.connect("nonexistent.invalid", 1),
        ConnectError,
        "cannot resolve 'nonexistent.invalid' (",
        "): check the name, and this machine's DNS",
    ),
    row(
        "a name that cannot be",
        lambda: aiordma.connect("x" * 64 + ".invalid", 1),
        ConnectError,
        "cannot resolve 'xxx",
        "check the name",
    ),
    row(
        "a port too large",
        lambda: aiordma.connect("127.0.0.1", 70_000),
        ConfigError,
        "0 to 65535, not 70000",
    ),
    row("a negative port", lambda: aiordma.listen(port=-1), ConfigError, "from 0 to 65535, not -1"),
    row(
        "pigeons",
        lambda: aiordma.connect("127.0.0.1", 1, require="pigeons"),  # type: ignore[arg-type]
        ConfigError,
        "require must be None, 'tcp' or 'verbs', not 'pigeons'",
    ),
    row(
        "all addresses",
        lambda: aiordma.listen("0.0.0.0"),
        ConfigError,
        "'0.0.0.0' is not a loopback address, and nothing is encrypted",
        "or pass insecure=True on a network that you trust",
    ),
    row(
        "any address",
        lambda: aiordma.listen(""),
        ConfigError,
        "'' is not a loopback address",
        "insecure=True",
    ),
    row(
        "serve on all addresses",
        lambda: aiordma.serve(lambda channel: channel.aclose(), "::"),
        ConfigError,
        "'::' is not a loopback address",
        "insecure=True",
    ),
    row(
        "unknown congestion control",
        lambda: aiordma.listen(config=ChannelConfig(congestion="hope")),
        ConfigError,
        "congestion='hope' is not available here (No such file or directory)",
        "see /proc/sys/net/ipv4/tcp_available_congestion_control",
    ),
]


@pytest.mark.parametrize(("opening", "error", "texts"), OPENINGS)
async def test_what_cannot_be_opened(opening, error, texts):
    with pytest.raises(error) as caught:
        await opening()
    assert type(caught.value) is error
    for text in texts:
        assert text in str(caught.value)


async def test_verbs_are_required_where_there_is_no_device(monkeypatch, tmp_path):
    monkeypatch.setattr("aiordma.path._DEVICES", tmp_path)
    async with aiordma.listen() as listener:
        with pytest.raises(
            LaneRefused, match=r"no RDMA device \(.* modprobe rdma_rxe; rdma link add"
        ):
            await aiordma.connect(*listener.address, require="verbs")
        async with aiordma.connect(*listener.address) as near, await listener.accept() as far:
            assert near.lanes[0].reason.startswith("tcp: the client: this host has no RDMA device")
            assert far.lanes[0].reason == near.lanes[0].reason


async def test_a_device_without_pyverbs_is_not_used_and_says_so(monkeypatch, tmp_path):
    (tmp_path / "rxe0").mkdir()
    monkeypatch.setattr("aiordma.path._DEVICES", tmp_path)
    monkeypatch.setitem(sys.modules, "aiordma.lanes.verbs", None)
    async with aiordma.listen() as listener:
        with pytest.raises(LaneRefused, match=r"pyverbs cannot be imported .*: install it"):
            await aiordma.connect(*listener.address, require="verbs")


async def test_a_name_that_looks_like_loopback_and_is_not(monkeypatch):
    async def getaddrinfo(*_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(ConfigError, match=r"'127.0.0.1.evil.example' is not a loopback address"):
        await aiordma.listen("127.0.0.1.evil.example")


async def test_all_addresses_on_purpose_warn():
    with pytest.warns(RuntimeWarning, match="'0.0.0.0' without encryption or authentication"):
        listener = await aiordma.listen("0.0.0.0", insecure=True)
    async with listener, aiordma.connect("127.0.0.1", listener.address[1]) as near:
        async with await listener.accept() as far:
            await near.send(1)
            assert await far.recv() == 1


async def test_a_port_in_use_and_an_address_of_another_machine():
    async with aiordma.listen() as listener:
        with pytest.raises(
            ConnectError, match=r"\(Address already in use\): choose .* or 0 for any"
        ) as caught:
            await aiordma.listen(*listener.address)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EADDRINUSE
    with (
        pytest.warns(RuntimeWarning, match="192.0.2.1"),
        pytest.raises(ConnectError, match="choose an address of this machine"),
    ):
        await aiordma.listen("192.0.2.1", insecure=True)


async def test_an_unknown_congestion_control_of_the_connecting_end():
    async with aiordma.listen() as listener:
        with pytest.raises(ConfigError, match="congestion='hope' is not available here"):
            await aiordma.connect(*listener.address, config=ChannelConfig(congestion="hope"))


async def test_a_budget_that_is_exhausted(monkeypatch):
    channel_bytes = CONFIG.slots * CONFIG.slot_bytes
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(aiordma.listen(config=CONFIG))
        monkeypatch.setattr(BUDGET, "total_bytes", BUDGET.used_bytes + 2 * channel_bytes)
        near = await stack.enter_async_context(aiordma.connect(*listener.address, config=CONFIG))
        far = await stack.enter_async_context(await listener.accept())
        with pytest.raises(Busy, match=r"0 left.*: close channels, .*set_memory_budget"):
            await aiordma.connect(*listener.address, config=CONFIG)
        monkeypatch.setattr(BUDGET, "total_bytes", BUDGET.used_bytes + channel_bytes)
        with pytest.raises(
            ConnectError, match=r"the server refused the channel: the memory budget .* 0 left"
        ) as found:
            await aiordma.connect(*listener.address, config=CONFIG)
        assert type(found.value) is ConnectError
        await near.send(1)
        assert await far.recv() == 1
    assert BUDGET.used_bytes == BUDGET.total_bytes - 3 * channel_bytes


# A peer that dies

SENDER = """
import asyncio, sys
import aiordma, numpy as np

async def main():
    async with aiordma.connect("127.0.0.1", int(sys.argv[1])) as channel:
        await channel.send_tensor(np.ones(1 << 26, np.uint8))

asyncio.run(main())
"""


async def take_all(chunks: AsyncIterator[Chunk]) -> None:
    async for chunk in chunks:
        chunk.release()


async def test_a_process_that_is_killed_in_the_middle_of_a_transfer(loop_kind):
    config = dataclasses.replace(CONFIG, slot_bytes=1 << 20, max_transfer_bytes=1 << 30)
    async with nothing_left(), aiordma.listen(config=config) as listener:
        sender = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SENDER, str(listener.address[1])
        )
        async with await listener.accept() as channel:
            async with aclosing(channel.incoming()) as transfers:
                transfer = await anext(transfers)
                async with aclosing(transfer.chunks()) as chunks:
                    (await anext(chunks)).release()
                    os.kill(sender.pid, signal.SIGKILL)
                    await sender.wait()
                    with pytest.raises(ChannelBroken, match="connect again") as caught:
                        await take_all(chunks)
        assert type(caught.value) is ChannelBroken


async def test_a_receiver_that_dies_while_it_is_sent_to(pair):
    near, far = pair
    sending = asyncio.create_task(near.send_tensor(np.zeros(1 << 20, np.uint8)))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        async with aclosing(transfer.chunks()) as chunks:
            (await anext(chunks)).release()
            far._link._control.abort()
            with pytest.raises(ChannelBroken, match=r"without a goodbye: .*connect again"):
                await sending
            with pytest.raises(ChannelBroken, match="connect again"):
                await take_all(chunks)
