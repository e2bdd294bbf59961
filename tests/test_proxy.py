"""Channels through an HTTP proxy: tunnels for the control connection and the lanes, and proxies that say no."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import traceback
from typing import cast

import pytest

import aiordma
from aiordma import (
    ChannelConfig,
    ConfigError,
    ConnectError,
    ConnectTimeout,
    ForeignPeer,
    LaneRefused,
    ProxyError,
    ProxyRefused,
)
from aiordma.proxy import MAX_HEAD_BYTES, Proxy
from aiordma.pulse import Pulse, PulseOwner
from tests.foreign import Wire, bare_server, nothing_left
from tests.harness import until, usable
from tests.proxies import TunnelProxy, a_proxy

pytestmark = pytest.mark.usefixtures("loop_kind")

OK = b"HTTP/1.1 200 OK\r\n\r\n"
CONFIG = ChannelConfig(slot_bytes=1 << 14, slots=4, lanes=3, close_timeout_s=1.0)


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.0 200\r\n\r\n",
        b"HTTP/1.1 204 What\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\nVia: bare line feeds\n\n",
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK,
    ],
)
async def test_control_connection_and_lanes_go_through_the_proxy(answer: bytes):
    async with nothing_left(), aiordma.listen(config=CONFIG) as listener:
        host, port = listener.address
        async with a_proxy(answer) as proxy:
            async with aiordma.connect(host, port, config=CONFIG, proxy=proxy.url) as near:
                async with await listener.accept() as far:
                    await usable(near, far)
                    for lane in near.lanes:
                        assert lane.kind == "tcp"
                        assert (
                            f"goes through the proxy {proxy.url[7:]}, by TCP alone" in lane.reason
                        )
                    assert near.lanes[0].reason.startswith("tcp: the client: ")
                    assert far.lanes[0].reason == near.lanes[0].reason
            target = f"{host}:{port}"
            assert proxy.heads == [f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"] * 4
            assert all(proxy.up_bytes)


async def test_user_and_password_go_to_the_proxy_with_each_connection():
    async with nothing_left(), aiordma.listen(config=CONFIG) as listener, a_proxy() as proxy:
        url = proxy.url.replace("//", "//b%C3%A4r%40x:p%3Aw%2F@")
        async with aiordma.connect(*listener.address, config=CONFIG, proxy=url) as near:
            async with await listener.accept() as far:
                await usable(near, far)
        credentials = base64.b64encode("bär@x:p:w/".encode()).decode()
        assert len(proxy.heads) == 4
        for head in proxy.heads:
            assert f"\r\nProxy-Authorization: Basic {credentials}\r\n" in head


async def test_a_proxy_and_a_server_behind_it_by_ipv6():
    async with nothing_left():
        try:
            listener = await aiordma.listen("::1", config=CONFIG)
        except ConnectError:
            pytest.skip("no IPv6 here")
        async with listener, a_proxy(host="::1") as proxy:
            async with aiordma.connect(*listener.address, config=CONFIG, proxy=proxy.url) as near:
                async with await listener.accept() as far:
                    await usable(near, far)
            assert proxy.heads[0].startswith(f"CONNECT [::1]:{listener.address[1]} HTTP/1.1\r\n")


NO_WAY = {
    # what the proxy answers: the error, its status, and its words
    "credentials wanted": (
        b'HTTP/1.1 407 Authenticate\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: Basic realm="x"\r\n\r\n',
        407,
        r"407 'Authenticate'; give it user and password .* offers 'Negotiate, Basic realm=\"x\"', and only Basic",
    ),
    "its policy": (b"HTTP/1.1 403 No\r\n\r\n<html>", 403, r"403 'No'; ask who runs it to allow"),
    "no server": (b"HTTP/1.1 503 Down\r\n\r\n", 503, r"503 'Down'; it cannot reach the server"),
    "elsewhere": (b"HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n", 302, "302 'Found'"),
    "what a terminal obeys": (b"HTTP/1.1 500 \x1b[2J\xff\r\n\r\n", 500, r"\\x1b\[2J\\\\xff"),
}


@pytest.mark.parametrize(("answer", "status", "says"), NO_WAY.values(), ids=NO_WAY)
async def test_a_proxy_that_refuses_says_why(answer: bytes, status: int, says: str):
    async with nothing_left(), a_proxy(answer, opens=False) as proxy:
        with pytest.raises(ProxyRefused, match=says) as info:
            await aiordma.connect("server.example", 4791, proxy=proxy.url)
        assert info.value.status == status
        assert f"proxy {proxy.url[7:]} does not open a way to server.example:4791: " in str(
            info.value
        )


async def test_a_password_that_is_not_taken_is_in_no_error():
    answer = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n"
    async with nothing_left(), a_proxy(answer, opens=False) as proxy:
        url = proxy.url.replace("//", "//me:secret@")
        with pytest.raises(ProxyRefused, match="it does not take this user and password") as info:
            await aiordma.connect("h", 1, proxy=url)
    told = "".join(traceback.format_exception(info.value)) + repr(Proxy.parse(url))
    assert "secret" not in told
    assert base64.b64encode(b"me:secret").decode() not in told


NO_PROXY = {
    "another protocol": (
        b"SSH-2.0-OpenSSH_9.2\r\n",
        "is no HTTP proxy: it answers CONNECT with 'SSH-2.0",
    ),
    "a version that is none": (b"HTTP/2 200\r\n\r\n", "is no HTTP proxy"),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", "is no HTTP proxy"),
    "nothing": (b"", "hung up without an answer"),
    "half of it": (b"HTTP/1.1 200 OK\r\nVia: x\r\n", "hung up amid its answer"),
    "an endless line": (b"HTTP/1.1 200 " + b"x" * (MAX_HEAD_BYTES + 1), "head of over 16384 bytes"),
    "an endless head": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 9000, "head of over 16384 bytes"),
    "endless patience": (b"HTTP/1.1 100 Wait\r\n\r\n" * 2000, "head of over 16384 bytes"),
    "more than an answer": (OK + b"220 mail.example ESMTP\r\n", "speaks before it is spoken to"),
}


@pytest.mark.parametrize(("answer", "says"), NO_PROXY.values(), ids=NO_PROXY)
async def test_what_is_no_proxy_is_told_by_name(answer: bytes, says: str):
    async with nothing_left(), a_proxy(answer, opens=False) as proxy:
        with pytest.raises(ProxyError, match=says) as info:
            await aiordma.connect("h", 1, proxy=proxy.url)
        assert type(info.value) is ProxyError
        assert proxy.url[7:] in str(info.value)


async def test_a_proxy_that_says_nothing_is_given_up():
    async with bare_server(None) as (_, (host, port)):
        with pytest.raises(
            ConnectTimeout, match=rf"h:1 through the proxy {host}:{port} within 0.1 s"
        ):
            await aiordma.connect("h", 1, proxy=f"http://{host}:{port}", timeout_s=0.1)


async def test_a_proxy_that_is_not_there():
    async with nothing_left():
        async with a_proxy() as proxy:
            pass
        with pytest.raises(ProxyError, match="goes through a proxy, and there: cannot connect to"):
            await aiordma.connect("h", 1, proxy=proxy.url)


async def test_a_tunnel_to_something_else():
    async def script(wire: Wire) -> None:
        await wire.read(1)
        await wire.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with bare_server(script) as (_, address), a_proxy() as proxy:
        with pytest.raises(ForeignPeer):
            await aiordma.connect(*address, proxy=proxy.url)


async def test_rdma_lanes_alone_do_not_go_through_a_proxy():
    async with nothing_left(), aiordma.listen() as listener, a_proxy() as proxy:
        with pytest.raises(LaneRefused, match=r"goes through the proxy .*, by TCP alone"):
            await aiordma.connect(*listener.address, require="verbs", proxy=proxy.url)


async def test_a_cancelled_connect_leaves_nothing_at_the_proxy():
    async with (
        nothing_left(),
        a_proxy(b"HTTP/1.1 100 Wait\r\n\r\n") as proxy,
        aiordma.listen() as there,
    ):
        opening = asyncio.ensure_future(aiordma.connect(*there.address, proxy=proxy.url)._open())
        await until(lambda: proxy.heads)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://secret@h:1", "TLS to the proxy is not supported"),
        ("socks5://h:1", "does not begin with http://"),
        ("h:3128", "does not begin with http://"),
        ("http://", "is not a host and a port alone"),
        ("http://h:1/path", "is not a host and a port alone"),
        ("http://user:secret#1@h:1", "the proxy's address is none"),
        ("http://user:sec/ret@h:1", "the proxy's address is none"),
        ("http://h:99999", "the proxy's address is none"),
        ("http://[::1", "the proxy's address is none"),
        ("http://a%3Ab:secret@h:1", "user has a colon"),
        ("http://a:secret%0D%0AHost:x@h:1", "what no key types"),
    ],
)
async def test_an_address_that_is_none_is_refused_without_being_quoted(url: str, says: str):
    with pytest.raises(ConfigError, match=says) as info:
        await aiordma.connect("h", 1, proxy=url)
    assert (
        "sec"
        not in "".join(traceback.format_exception(info.value, chain=True)).partition(
            "aiordma.errors.ConfigError"
        )[2]
    )


@pytest.mark.parametrize("host", ["a b", "h\r\nX: y", "h/x", "a..b", "x" * 64, "", "é" * 70])
async def test_a_host_that_would_bend_the_request_is_never_sent(host: str):
    async with nothing_left(), a_proxy(opens=False) as proxy:
        with pytest.raises(ConfigError, match="is no host that a proxy can be asked for"):
            await aiordma.connect(host, 1, proxy=proxy.url)
        assert proxy.heads == []


async def test_an_idle_channel_through_a_proxy_beats_on_every_connection():
    config = ChannelConfig(slots=4, slot_bytes=1 << 14, lanes=2, heartbeat_s=0.01)
    async with nothing_left(), aiordma.listen() as listener, a_proxy() as proxy:
        async with aiordma.connect(*listener.address, config=config, proxy=proxy.url) as near:
            async with await listener.accept() as far:
                await grown(proxy, list(proxy.up_bytes))
                await grown(proxy, list(proxy.up_bytes))
                await usable(near, far)


async def grown(proxy: TunnelProxy, before: list[int]) -> None:
    """Wait until each tunnel has carried more."""
    async with asyncio.timeout(10):
        while not all(now > then for now, then in zip(proxy.up_bytes, before, strict=True)):
            proxy.moved.clear()
            await proxy.moved.wait()


async def test_through_a_proxy_there_is_a_heartbeat_unless_there_is_one_already():
    for given, expected in ((ChannelConfig(keepalive_s=7), 7), (ChannelConfig(heartbeat_s=3.0), 3)):
        async with aiordma.listen() as listener, a_proxy() as proxy:
            async with aiordma.connect(*listener.address, config=given, proxy=proxy.url) as near:
                assert near._link.config.heartbeat_s == expected
            with contextlib.suppress(aiordma.ChannelError):
                await (await listener.accept()).aclose()


class Beats:
    """The owner of a pulse, which counts."""

    def __init__(self, wanted: int) -> None:
        self.count = 0
        self.are_enough = asyncio.Event()
        self._wanted = wanted

    def send_ping(self, token: int) -> None:
        self.count += 1
        if self.count == self._wanted:
            self.are_enough.set()


async def test_a_channel_that_is_over_beats_no_more():
    stopped, going = Beats(1), Beats(4)
    pulse = Pulse(cast("PulseOwner", stopped), 60, 0.005)
    await stopped.are_enough.wait()
    pulse.stop(aiordma.ChannelClosed("over"))
    count = stopped.count
    other = Pulse(cast("PulseOwner", going), 60, 0.005)
    await going.are_enough.wait()
    other.stop(aiordma.ChannelClosed("over"))
    assert stopped.count == count


async def test_every_connection_is_kept_alive_before_a_firewall_forgets_it():
    config = ChannelConfig(slots=4, slot_bytes=1 << 14, lanes=2, keepalive_s=40)
    async with aiordma.listen(config=config) as listener:
        before = descriptors()
        async with aiordma.connect(*listener.address, config=config) as near:
            async with await listener.accept() as far:
                for number in descriptors() - before:
                    with socket.socket(fileno=os.dup(number)) as sock:
                        found = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
                        names = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
                        found += (sock.getsockopt(socket.IPPROTO_TCP, name) for name in names)
                        assert found == [1, 40, 10, 4]
                assert len(descriptors() - before) == 2 * 3
                await usable(near, far)


def descriptors() -> set[int]:
    """Of this process's TCP connections."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
            if sock.family == socket.AF_INET:
                found.add(number)
    return found
