"""The in-process lane: the reference for what every lane does, and the fastest way to test what uses one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

from aiordma.lanes.base import LaneHandler
from aiordma.wire.frames import ChunkHeader

_ROOM: Final = 2


class MemoryLane:
    """One end of a pair. A posted payload stays where it is until the loop's next turn delivers it."""

    kind = "memory"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._peer: MemoryLane | None = None
        self._handler: LaneHandler | None = None
        self._queue: deque[tuple[ChunkHeader, Sequence[memoryview]] | int] = deque()
        self._chunks = 0
        self._is_scheduled = False
        self._is_over = False

    @classmethod
    def pair(cls, loop: asyncio.AbstractEventLoop) -> tuple[MemoryLane, MemoryLane]:
        """Two ends that deliver to each other."""
        left, right = cls(loop), cls(loop)
        left._peer, right._peer = right, left
        return left, right

    @property
    def room(self) -> int:
        return 0 if self._is_over else max(0, _ROOM - self._chunks)

    def start(self, handler: LaneHandler) -> None:
        self._handler = handler
        for lane in (self, self._peer):
            if lane is not None:
                lane._schedule()

    def post(self, header: ChunkHeader, parts: Sequence[memoryview]) -> None:
        self._chunks += 1
        self._queue.append((header, parts))
        self._schedule()

    def credit(self, slots: int) -> None:
        self._queue.append(slots)
        self._schedule()

    def recall(self, transfer: int, *, is_sending: bool) -> bool:
        """Copy aside what is queued. Receiving needs nothing: no chunk is ever half written."""
        for i, item in enumerate(self._queue):
            if is_sending and not isinstance(item, int) and item[0].transfer == transfer:
                self._queue[i] = (item[0], [memoryview(b"".join(item[1]))])
        return True

    async def aclose(self) -> None:
        self._is_over = True
        peer, self._peer, self._handler = self._peer, None, None
        self._queue.clear()
        if peer is not None and peer._peer is self:
            self._loop.call_soon(peer._ended)

    def _schedule(self) -> None:
        if self._queue and not self._is_scheduled and self._peer is not None:
            self._is_scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False
        peer = self._peer
        if peer is None or peer._handler is None or not self._queue:
            return
        item = self._queue.popleft()
        try:
            if isinstance(item, int):
                peer._handler.credited(item)
            else:
                _copy(item, peer._handler)
        except Exception as exc:
            peer._fail(exc)
        if not isinstance(item, int):
            self._chunks -= 1
            if self._handler is not None:
                self._handler.sent([item[0]])
        self._schedule()

    def _ended(self) -> None:
        self._peer = None
        self._fail(None)

    def _fail(self, exc: Exception | None) -> None:
        self._is_over = True
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.lost(exc)


def _copy(chunk: tuple[ChunkHeader, Sequence[memoryview]], handler: LaneHandler) -> None:
    header, parts = chunk
    target = handler.place(header)
    start = 0
    for part in parts:
        target[start : start + part.nbytes] = part
        start += part.nbytes
    handler.arrived(header)
