"""Accepting channels, and serving them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self

from aiordma.assembly import build
from aiordma.channel import Channel
from aiordma.config import ChannelConfig
from aiordma.errors import (
    AiordmaError,
    ChannelClosed,
    ChannelError,
    ConnectError,
    LaneRefused,
    RemoteProtocolError,
)
from aiordma.handshake import Pending, grant, hang_up, hear, refuse, say
from aiordma.path import Agreed, agree_as_server, propose
from aiordma.queues import Fifo
from aiordma.wire import hello
from aiordma.wire.hello import Hello, LaneProof

Handler = Callable[[Channel], Awaitable[None]]

_MAX_GREETINGS: Final = 256
"""Connections that may be in their handshake at once; beyond, the oldest is closed."""
_MAX_UNACCEPTED: Final = 64
_ACCEPT_PAUSE_S: Final = 1.0
"""How long not to accept after the process ran out of file descriptors."""


class Listener:
    """Accepts channels: ``async for channel in listener`` hands each over to the caller, who closes it."""

    def __init__(self, sock: socket.socket, config: ChannelConfig) -> None:
        """Listeners are made by `listen`."""
        self._sock = sock
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._greetings: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._pending: dict[bytes, Pending] = {}
        self._channels: Fifo[Channel] = Fifo()
        self._is_closed = False
        host, port = sock.getsockname()[:2]
        self._address: tuple[str, int] = (host, port)
        self._loop.add_reader(sock, self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        return self._address

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Channel:
        try:
            return await self._channels.take()
        except ChannelClosed:
            raise StopAsyncIteration from None

    async def accept(self) -> Channel:
        """The next channel. Cancelling loses none. Raises `ChannelClosed` once the listener is closed."""
        return await self._channels.take()

    async def aclose(self) -> None:
        """Accept no more; channels that nobody took are closed, those that were handed over live on."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._sock)
        self._channels.fail(ChannelClosed("the listener is closed"))
        greetings = list(self._greetings)
        for task in greetings:
            task.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)
        while len(self._channels):
            await (await self._channels.take()).aclose()
        await asyncio.sleep(0)  # uvloop takes a reader off later than it says
        hang_up(self._sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _accept(self) -> None:
        try:
            sock, address = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            # Out of descriptors, most likely: a readiness loop would spin on it.
            self._loop.remove_reader(self._sock)
            self._loop.call_later(_ACCEPT_PAUSE_S, self._accept_again)
            return
        if len(self._greetings) >= _MAX_GREETINGS:
            # A crowd of silent connections must not keep a good one out, and the oldest had its time.
            oldest = next((task for task in self._greetings if not task.cancelling()), None)
            if oldest is not None:
                oldest.cancel()
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock, f"{address[0]}:{address[1]}"))
        self._greetings[task] = None
        task.add_done_callback(self._greetings.pop)

    def _accept_again(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._sock, self._accept)

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        """Hear what a connection is, and make it part of a channel. A failure concerns this one alone."""
        kept = False
        try:
            async with asyncio.timeout(self._config.connect_timeout_s) as limit:
                kept = await self._admit(sock, peer, limit)
        except AiordmaError as exc:
            with contextlib.suppress(AiordmaError, TimeoutError):
                async with asyncio.timeout(self._config.close_timeout_s):
                    await refuse(sock, str(exc))
        except TimeoutError:
            pass  # silence is answered with silence
        finally:
            if not kept:
                hang_up(sock)

    async def _admit(self, sock: socket.socket, peer: str, limit: asyncio.Timeout) -> bool:
        kind, body = await hear(sock)
        if kind == hello.LANE and isinstance(body, LaneProof):
            pending = self._pending.get(body.session)
            if pending is None:
                raise LaneRefused(
                    "no session waits for this lane: its token was used up, came too late, or was never "
                    "given; connect again"
                )
            await pending.join(sock, body, self._config)
            return True
        if kind != hello.CONTROL or not isinstance(body, Hello):
            raise RemoteProtocolError(f"a connection that begins with {type(body).__name__}")
        if len(self._channels) >= _MAX_UNACCEPTED:
            raise ConnectError("the server accepts no channels at the moment: try again later")
        await self._open(sock, body, peer, limit)
        return True

    async def _open(
        self, sock: socket.socket, greeting: Hello, peer: str, limit: asyncio.Timeout
    ) -> None:
        pending = await grant(sock, greeting, self._config)
        parts, session = pending.parts, pending.answer.session
        self._pending[session] = pending
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(parts.close)
            path, answer = await propose(parts, greeting, pending.answer, self._config)
            if path is not None:
                undo.push_async_callback(path.aclose)
                limit.reschedule((limit.when() or self._loop.time()) + self._config.probe_s)
            with contextlib.ExitStack() as wait:
                wait.callback(self._pending.pop, session)
                sent_at = time.perf_counter()
                agreed = Agreed((), answer.reason)
                await say(sock, hello.CONTROL, answer)
                if path is not None:
                    agreed = await agree_as_server(path, parts, self._config)
                if not agreed.lanes:
                    await pending.wait()
            rtt_s = time.perf_counter() - sent_at
            channel = await build(parts, agreed, self._config, peer=peer, rtt_s=rtt_s)
            undo.pop_all()
        self._channels.put(channel)


class Server:
    """Runs a handler task for each channel; made by `serve`."""

    def __init__(self, listener: Listener, handler: Handler) -> None:
        self._listener = listener
        self._handler = handler
        self._tasks: dict[asyncio.Task[None], Channel] = {}
        self._acceptor = asyncio.get_running_loop().create_task(self._run())

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        return self._listener.address

    async def aclose(self) -> None:
        """Accept no more, cancel the handlers, and wait until their channels are closed."""
        await self._listener.aclose()
        await self._acceptor
        running = dict(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        # Some handlers had not begun yet, or were closing their channel already.
        await asyncio.gather(*(channel.aclose() for channel in running.values()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _run(self) -> None:
        async for channel in self._listener:
            task = asyncio.get_running_loop().create_task(self._handle(channel))
            self._tasks[task] = channel
            task.add_done_callback(self._tasks.pop)

    async def _handle(self, channel: Channel) -> None:
        async with channel:
            try:
                await self._handler(channel)
            except ChannelError:
                pass  # the peer went away; whoever cares has caught it in the handler
            except Exception as exc:  # a handler's bug must not end the server, nor go unseen
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"the handler of {channel!r} failed", "exception": exc}
                )
