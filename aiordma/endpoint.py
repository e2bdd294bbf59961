"""`connect`, `listen`, `serve`: how channels come to be."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import warnings
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

from aiordma.assembly import build
from aiordma.channel import Channel
from aiordma.config import ChannelConfig
from aiordma.errors import AiordmaError, ConfigError, ConnectError, ConnectTimeout, LaneRefused
from aiordma.handshake import (
    Parts,
    dial,
    open_lane,
    request,
    reserve,
    tune_control,
    tune_lane,
)
from aiordma.lanes.choice import Choice
from aiordma.listener import Handler, Listener, Server
from aiordma.path import Agreed, RdmaPath, agree_as_client, local_choice
from aiordma.proxy import Proxy

LaneKind = Literal["tcp", "verbs"]


class _Closeable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closeable)


class Opening(Generic[C]):
    """Something that is being opened: await it, or use it as ``async with``, which closes it."""

    def __init__(self, open_: Callable[[], Coroutine[Any, Any, C]]) -> None:
        self._open = open_
        self._opened: C | None = None

    def __await__(self) -> Generator[Any, Any, C]:
        return self._open().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.aclose()


def connect(
    host: str,
    port: int,
    *,
    config: ChannelConfig | None = None,
    require: LaneKind | None = None,
    proxy: str | None = None,
    timeout_s: float = 10.0,
) -> Opening[Channel]:
    """Open a channel to a listener: ``await connect(...)`` or ``async with connect(...) as channel``.

    `require` refuses lanes of any other kind ("tcp" or "verbs"). `proxy`, ``http://[USER:PASSWORD@]HOST:PORT``, is an
    HTTP proxy that the connections go through (CONNECT); user and password go there in the clear. RDMA lanes are not
    tried then, and each connection has a heartbeat (`ChannelConfig.heartbeat_s`).

    Raises `ConnectError`: `ConnectTimeout` after `timeout_s` seconds, `ForeignPeer`, `VersionMismatch`, `LaneRefused`,
    `ProxyError`; `RemoteProtocolError` if the peer's handshake makes no sense; `ConfigError`; `Busy` beyond the memory
    budget. Cancelled, nothing is left behind.
    """
    return Opening(
        lambda: _connect(host, port, config or ChannelConfig(), require, proxy, timeout_s)
    )


async def _connect(
    host: str,
    port: int,
    config: ChannelConfig,
    require: LaneKind | None,
    proxy: str | None,
    timeout_s: float,
) -> Channel:
    _check_port(port)
    if require not in (None, "tcp", "verbs"):
        raise ConfigError(f"require must be None, 'tcp' or 'verbs', not {require!r}")
    between = None
    if proxy is not None:
        between = Proxy.parse(proxy)
        beat_s = config.keepalive_s if config.heartbeat_s is None else config.heartbeat_s
        config = replace(config, heartbeat_s=beat_s)
    try:
        async with asyncio.timeout(timeout_s):
            return await _open(host, port, config, require, between)
    except TimeoutError as exc:
        if isinstance(exc, AiordmaError):
            raise
        through = f" through the proxy {between.address}" if between else ""
        raise ConnectTimeout(
            f"no channel to {host}:{port}{through} within {timeout_s:g} s: the peer accepts connections but does "
            "not answer, or the way there is blocked"
        ) from exc


async def _open(
    host: str, port: int, config: ChannelConfig, require: LaneKind | None, between: Proxy | None
) -> Channel:
    reach = dial if between is None else between.dial
    parts = Parts(await reach(host, port), [])
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(parts.close)
        parts.rings = reserve(config, config.lanes)
        tune_control(parts.control, config)
        choice = _choice(config, parts, require, between)
        sent_at = time.perf_counter()
        if isinstance(choice, str):
            answer = await request(parts, config, ("tcp",), choice)
        else:
            answer = await request(parts, config, ("verbs", "tcp"), "")
        rtt_s = time.perf_counter() - sent_at
        agreed = Agreed((), answer.reason)
        if answer.lane_kind == "verbs" and not isinstance(choice, str):
            path = RdmaPath(choice)
            undo.push_async_callback(path.aclose)
            agreed = await agree_as_client(path, parts, answer, config)
        if not agreed.lanes:
            if require == "verbs":
                raise LaneRefused(f"require='verbs', and there is no way to: {agreed.reason}")
            for lane in range(answer.lanes):
                parts.lanes.append(await reach(host, port))
                await open_lane(parts.lanes[-1], answer, lane, config)
        channel = await build(parts, agreed, config, peer=f"{host}:{port}", rtt_s=rtt_s)
        undo.pop_all()
    return channel


def _choice(
    config: ChannelConfig, parts: Parts, require: LaneKind | None, between: Proxy | None
) -> Choice | str:
    """The RDMA device to use, or why there is none."""
    if require == "tcp":
        return "require='tcp'"
    try:
        if between is not None:
            raise LaneRefused(f"the way goes through the proxy {between.address}, by TCP alone")
        return local_choice(config, parts.control)
    except LaneRefused as exc:
        if require == "verbs":
            raise
        return str(exc)


def listen(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    config: ChannelConfig | None = None,
    insecure: bool = False,
) -> Opening[Listener]:
    """Accept channels at a port (0: any free one): ``async with listen() as listener``.

    Binds to loopback only, since nothing is encrypted or authenticated yet: any other address needs
    `insecure=True`, and warns. Raises `ConfigError`, or `ConnectError` if the address cannot be bound.
    """
    return Opening(lambda: _listen(host, port, config or ChannelConfig(), insecure))


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port must be a number from 0 to 65535, not {port}")


async def _listen(host: str, port: int, config: ChannelConfig, insecure: bool) -> Listener:
    _check_port(port)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, proto, _, address = found[0]
        if not _is_loopback(str(address[0])):
            _warn_or_refuse(host, insecure)
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, kind, proto))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tune_lane(sock, config)  # a setting that cannot work is better known now
            sock.bind(address)
            sock.listen(128)
            undo.pop_all()
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConnectError(
            f"cannot listen on {host}:{port} ({reason}): choose an address of this machine, and a port that is "
            "free and yours to use, or 0 for any"
        ) from exc
    return Listener(sock, config)


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def _warn_or_refuse(host: str, insecure: bool) -> None:
    if not insecure:
        raise ConfigError(
            f"{host!r} is not a loopback address, and nothing is encrypted or authenticated: bind to "
            "127.0.0.1 behind a tunnel, or pass insecure=True on a network that you trust"
        )
    warnings.warn(
        f"aiordma listens on {host!r} without encryption or authentication",
        RuntimeWarning,
        stacklevel=3,
    )


def serve(
    handler: Handler,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    config: ChannelConfig | None = None,
    insecure: bool = False,
) -> Opening[Server]:
    """Run ``await handler(channel)`` in a task for each channel, and close it when its handler ends.

    A `ChannelError` ends a handler quietly; any other exception goes to the loop's exception handler. Binds
    like `listen`.
    """

    async def start() -> Server:
        return Server(await _listen(host, port, config or ChannelConfig(), insecure), handler)

    return Opening(start)
