"""The control connection's socket side: bytes between a transport and a link, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Protocol, cast


class ControlHandler(Protocol):
    """The user of a control connection."""

    def control_received(self, data: bytes) -> None:
        """Bytes came."""

    def control_lost(self, exc: Exception | None) -> None:
        """The connection ended; None if the peer ended it in order."""


class Control(Protocol):
    """A control connection's sending side. Never blocks: the windows bound what can pile up."""

    @property
    def unsent_bytes(self) -> int:
        """What was written and waits here."""

    def start(self, handler: ControlHandler) -> None:
        """Begin to read."""

    @property
    def backlog_bytes(self) -> int:
        """What was written and the peer's host has not taken yet."""

    def write(self, data: bytes) -> None:
        """Send."""

    def close(self) -> None:
        """Flush and send nothing more. The connection ends when the peer does so as well."""

    def abort(self) -> None:
        """End the connection now."""

    async def wait_ended(self) -> None:
        """Wait until the connection has ended."""


class TcpControl(asyncio.Protocol):
    """A control connection over an asyncio transport. Reading is never paused."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = (
            sock  # the transport's; uvloop's transports hand out none that could be shut down
        )
        self._transport: asyncio.Transport | None = None
        self._handler: ControlHandler | None = None
        self._early: list[bytes] = []  # what came between `open` and `start`
        self._ended = asyncio.Event()
        self._cause: Exception | None = None

    @classmethod
    async def open(cls, sock: socket.socket) -> TcpControl:
        """Take over a connected socket; call `start` soon."""
        loop = asyncio.get_running_loop()
        _, control = await loop.create_connection(lambda: cls(sock), sock=sock)
        return control

    def start(self, handler: ControlHandler) -> None:
        """Begin to tell, with what came before."""
        self._handler = handler
        early, self._early = self._early, []
        for data in early:
            handler.control_received(data)
        if self._ended.is_set():
            self._tell_ended()

    @property
    def backlog_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def unsent_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(OSError):  # reset by the peer, which the loop tells us next
                self._transport.write_eof()

    def abort(self) -> None:
        """End the connection at once, also for processes that were forked from this one."""
        if self._transport is None:
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._handler is not None:
            self._handler.control_received(data)
        else:
            self._early.append(data)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._cause = exc
        self._ended.set()
        self._tell_ended()

    def _tell_ended(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.control_lost(self._cause)


class MemoryControl:
    """One end of a control connection within one loop."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._peer: MemoryControl | None = None
        self._handler: ControlHandler | None = None
        self._early: list[bytes] = []
        self._ended = asyncio.Event()

    @classmethod
    def pair(cls) -> tuple[MemoryControl, MemoryControl]:
        """Two ends that deliver to each other on the loop's next turn."""
        left, right = cls(), cls()
        left._peer, right._peer = right, left
        return left, right

    def start(self, handler: ControlHandler) -> None:
        self._handler = handler
        early, self._early = self._early, []
        for data in early:
            handler.control_received(data)

    @property
    def backlog_bytes(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        if self._peer is not None:
            self._loop.call_soon(self._peer._receive, data)

    def close(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            self._loop.call_soon(peer._end)
            self._loop.call_soon(self._end)

    abort = close

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def _receive(self, data: bytes) -> None:
        if self._handler is not None:
            self._handler.control_received(data)
        else:
            self._early.append(data)

    def _end(self) -> None:
        self._peer = None
        self._ended.set()
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.control_lost(None)
