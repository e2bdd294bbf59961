"""Chunks over a TCP connection, from the sender's memory straight into the receiver's.

The socket is non-blocking and driven by the loop's readiness callbacks. A chunk goes out with one gather
(`sendmsg` of header and payload parts), and comes in with one scatter (`recvmsg_into` of the payload and the
header after it), so neither end copies or allocates per chunk. sendmsg(2), recvmsg(2), tcp(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from aiordma.errors import ChannelBroken, RemoteProtocolError
from aiordma.lanes.base import LaneHandler
from aiordma.wire import frames
from aiordma.wire.frames import HEADER_BYTES, ChunkHeader, CreditHeader

_TURN_BYTES: Final = 4 << 20
"""What one callback moves before other tasks get their turn."""


class TcpLane:
    """One lane over a connected, non-blocking socket, which it owns."""

    kind = "tcp"

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        heartbeat_s: float | None = None,
    ) -> None:
        """With `heartbeat_s`, a CREDIT of no slots goes out so often, for who is between and ends idle connections."""
        self._sock = sock
        self._loop = loop
        self._handler: LaneHandler | None = None
        self._writer = _Writer()
        self._is_flushing = False
        self._wants_write = False
        self._reader = _Reader()
        self._is_closed = False
        self._heartbeat_s = heartbeat_s
        self._heart: asyncio.TimerHandle | None = None

    @property
    def room(self) -> int:
        return 0 if self._is_closed or self._writer.chunk is not None else 1

    def start(self, handler: LaneHandler) -> None:
        self._handler = handler
        self._loop.add_reader(self._sock, self._on_readable)
        self._schedule_beat()

    def post(self, header: ChunkHeader, parts: Sequence[memoryview]) -> None:
        self._writer.chunk = header, parts
        self._flush()

    def credit(self, slots: int) -> None:
        self._writer.credits.append(slots)
        self._flush()

    def recall(self, transfer: int, *, is_sending: bool) -> bool:
        if is_sending:
            self._writer.recall(transfer)
        elif self._handler is not None:
            self._reader.recall(transfer, self._handler)
        return True

    async def aclose(self) -> None:
        if not self._is_closed:
            self._stop()
        # uvloop takes a reader off later than it says; the number must not be reused before.
        await asyncio.sleep(0)
        self._sock.close()

    def _schedule_beat(self) -> None:
        if self._heartbeat_s is not None:
            self._heart = self._loop.call_later(self._heartbeat_s, self._beat)

    def _beat(self) -> None:
        self._schedule_beat()
        self.credit(0)

    def _stop(self) -> None:
        self._is_closed = True
        if self._heart is not None:
            self._heart.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        # A forked process (a DataLoader's worker) may hold a copy of the descriptor: closing alone would
        # not end the connection.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _fail(self, exc: Exception | None) -> None:
        if self._is_closed:
            return
        self._stop()
        if self._handler is not None:
            self._handler.lost(exc)

    # Sending

    def _flush(self) -> None:
        """Send until the socket is full, the turn is over, or there is nothing left."""
        if self._is_flushing or self._is_closed:
            return
        self._is_flushing = True
        try:
            done = self._write_turn()
        except OSError as exc:
            self._fail(_broken(exc))
            return
        finally:
            self._is_flushing = False
        if self._is_closed or done != self._wants_write:
            return
        self._wants_write = not done
        if done:
            self._loop.remove_writer(self._sock)
        else:
            self._loop.add_writer(self._sock, self._flush)

    def _write_turn(self) -> bool:
        turn = _TURN_BYTES
        while self._writer.next():
            if turn <= 0:
                return False
            try:
                n = self._sock.sendmsg(self._writer.views)
            except (BlockingIOError, InterruptedError):
                return False
            turn -= n
            header = self._writer.advance(n)
            if header is not None and self._handler is not None:
                self._handler.sent([header])
                if self._is_closed:
                    return True
        return True

    # Receiving

    def _on_readable(self) -> None:
        reader, turn = self._reader, _TURN_BYTES
        try:
            while turn > 0 and not self._is_closed:
                try:
                    n = self._sock.recvmsg_into(reader.views())[0]
                except (BlockingIOError, InterruptedError):
                    return
                if not n:
                    self._fail(reader.end_of_stream())
                    return
                turn -= n
                if self._handler is not None:
                    reader.advance(n, self._handler)
        except RemoteProtocolError as exc:
            self._fail(exc)
        except OSError as exc:
            self._fail(_broken(exc))


class _Writer:
    """What is on its way out: the rest of one frame, and what comes after it."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self.chunk: tuple[ChunkHeader, Sequence[memoryview]] | None = None
        self.credits: deque[int] = deque()
        self._writing: ChunkHeader | None = None
        self._sequence = 0

    def next(self) -> bool:
        """Have something in `views`, if there is anything; credits go before the next chunk."""
        if self.views:
            return True
        if self.credits:
            slots = 0
            while self.credits:
                slots |= self.credits.popleft()
            self.views = [memoryview(frames.encode_credit(slots, self._count()))]
        elif self.chunk is not None:
            header, parts = self.chunk
            self._writing = header
            self.views = [memoryview(frames.encode_chunk(header, self._count())), *parts]
        return bool(self.views)

    def advance(self, n: int) -> ChunkHeader | None:
        """`n` bytes went out; the header of the chunk that they completed, if so."""
        views = self.views
        while views and n >= views[0].nbytes:
            n -= views.pop(0).nbytes
        if views:
            views[0] = views[0][n:]
            return None
        header, self._writing = self._writing, None
        if header is not None:
            self.chunk = None
        return header

    def recall(self, transfer: int) -> None:
        """Copy aside what is left of this transfer's chunk, so that the stream stays in step."""
        if self.chunk is None or self.chunk[0].transfer != transfer:
            return
        if self._writing is None:
            header, parts = self.chunk
            self.chunk = header, [memoryview(b"".join(parts))]
        else:
            self.views = [memoryview(b"".join(self.views))]
            self.chunk = self._writing, ()

    def _count(self) -> int:
        self._sequence += 1
        return self._sequence


class _Reader:
    """What is coming in: a header, or a payload with the header that follows it."""

    def __init__(self) -> None:
        self._cell = memoryview(bytearray(HEADER_BYTES))
        self._cell_got = 0
        self._header: ChunkHeader | None = None
        self._payload = memoryview(b"")
        self._got = 0
        self._sequence = 1

    def views(self) -> list[memoryview]:
        """Where the next bytes go."""
        if self._header is None:
            return [self._cell[self._cell_got :]]
        return [self._payload[self._got :], self._cell]

    def advance(self, n: int, handler: LaneHandler) -> None:
        """`n` bytes came in."""
        if self._header is not None:
            taken = min(n, self._header.length - self._got)
            self._got += taken
            n -= taken
            if self._got < self._header.length:
                return
            header, self._header = self._header, None
            self._payload = memoryview(b"")
            handler.arrived(header)
        self._cell_got += n
        if self._cell_got == HEADER_BYTES:
            self._cell_got = 0
            frame = frames.decode(self._cell, self._sequence)
            self._sequence += 1
            if isinstance(frame, CreditHeader):
                handler.credited(frame.slots)
            elif isinstance(frame, ChunkHeader) and not frame.is_in_place:
                self._payload = handler.place(frame)
                self._header, self._got = frame, 0
            else:
                raise RemoteProtocolError(
                    "the peer speaks of memory windows, and this lane has none"
                )

    def recall(self, transfer: int, handler: LaneHandler) -> None:
        """Go on where the handler now says, with what came so far."""
        if self._header is None or self._header.transfer != transfer:
            return
        target = handler.place(self._header)
        target[: self._got] = self._payload[: self._got]
        self._payload = target

    def end_of_stream(self) -> ChannelBroken | None:
        """What it means that the peer ended the connection here."""
        if self._header is not None:
            return ChannelBroken(
                f"the peer ended the connection {self._got} bytes into a chunk of {self._header.length}"
            )
        if self._cell_got:
            return ChannelBroken(
                f"the peer ended the connection {self._cell_got} bytes into a header"
            )
        return None


def _broken(exc: OSError) -> ChannelBroken:
    broken = ChannelBroken(f"a TCP lane broke: {exc.strerror or exc}")
    broken.__cause__ = exc
    return broken
