"""What an RDMA lane sends: which frames ride with the next doorbell, and what the device may still read."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from aiordma.errors import RemoteProtocolError
from aiordma.lanes.signals import Completions
from aiordma.ring import CREDIT_CELLS, WINDOW_CELLS, Ring, slot_offset
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader, WindowHeader

MAX_PIECES: Final = 16
"""A chunk of more pieces is copied together before it is sent."""
WINDOWS: Final = 16
"""That a lane may have open at a time."""
_RESERVE: Final = 8 + 5 * WINDOWS
"""Work requests of the send queue that chunks leave to CREDITs, windows (each is bound, announced, stopped and
invalidated here, and stopped for the peer), markers, and the END..."""
_NOT_FOR_CREDITS: Final = 3 + 5 * WINDOWS
"""...and so many of them, CREDITs to the others."""


class Kind(enum.IntEnum):
    """The upper half of an immediate; the lower half is a slot, or the number of a cell or window."""

    CHUNK = 0
    CREDIT = 1
    PROBE = 2
    END = 3
    WINDOW = 4
    STOP = 5
    """Write no more through this window, and say..."""
    STOPPED = 6
    """...when the last that went is there."""


class Piece(NamedTuple):
    """Memory that the device may read."""

    address: int
    length: int
    lkey: int
    holder: object = None
    """What keeps it registered."""


class Window(NamedTuple):
    """Registered memory that the peer's queue pair may write to, once the window is bound."""

    piece: Piece
    key: int
    handle: Any
    close: Callable[[], None]
    """To be called when it is not bound any more. Raises `OSError`."""


class WindowWork(NamedTuple):
    """A work request that binds or invalidates a window. ibv_wr_bind_mw(3), ibv_wr_local_inv(3)."""

    work_id: int
    window: Window
    is_bind: bool
    is_signalled: bool


class Frame(NamedTuple):
    """Work requests in a row: each piece by WRITE, then the header by WRITE WITH IMM.

    `target` counts bytes from the beginning of the peer's ring, `cell` its cells.
    """

    work_id: int
    pieces: Sequence[Piece]
    target: int
    """Where the first piece goes; the others follow it."""
    header: bytes
    """May be empty."""
    cell: int
    """Where the header goes."""
    immediate: int | None
    """None: the header's work request is a plain WRITE, of which the peer sees nothing."""
    is_signalled: bool
    key: int | None = None
    """Of the window that the pieces go through; `target` is then an address."""


W = TypeVar("W", Frame, WindowWork, Frame | WindowWork)


class Sources(NamedTuple):
    """Registered memory to send from."""

    stages: Ring
    """For payloads from elsewhere, which are copied here first."""
    stage: Callable[[int, int], Piece]
    """So many bytes (the second argument) of a stage (the first)."""
    find: Callable[[memoryview], Piece | None]
    """The piece that this is of memory which its owner has registered, if it is."""
    open: Callable[[memoryview], Window | None]
    """A window to such memory, if it may be written to. Raises `OSError`."""


class _Chunk(NamedTuple):
    header: ChunkHeader
    pieces: Sequence[Piece]
    stage: int | None
    parts: Sequence[memoryview]
    """Kept alive, unless they were copied."""


class _Posted(NamedTuple):
    work_id: int
    work_requests: int
    chunk: _Chunk | None
    invalidated: Window | None = None
    immediate: int | None = None


class Outbox:
    """The sending side of an RDMA lane, without the device."""

    def __init__(
        self, sources: Sources, *, depth: int, peer_slots: int, peer_slot_bytes: int
    ) -> None:
        """`depth`: work requests that the send queue holds. The rest: the ring that is written to."""
        self.last_id = 0
        """Of the last frame that was handed out."""
        self.waiting_bytes = 0
        """Copied for the next batch."""
        self._sources = sources
        self._slot_bytes = peer_slot_bytes
        self._free = depth - _RESERVE
        self._free_stages = list(range(sources.stages.slots))
        self._credits = 0
        self._credit_frames = 0
        self._special: deque[Frame | WindowWork] = deque()
        """The work on windows comes first, and goes out only while nothing is under way: soft-RoCE, when it sends
        again what was lost, repeats what was bound behind it, which fails, and then waits for ever."""
        self._aims: dict[int, WindowHeader] = {}
        self._invalidated: list[Window] = []
        self._waiting: deque[_Chunk] = deque()
        self._posted: deque[_Posted] = deque()
        self._sequence = 0
        self._completions = Completions(depth // 4, max(6, peer_slots * 3 // 4))

    @property
    def room(self) -> int:
        """Chunks that `add` takes now, whatever they are made of."""
        return max(0, min(len(self._free_stages), self._free // (MAX_PIECES + 1)))

    @property
    def sources(self) -> Sources:
        """What is sent from."""
        return self._sources

    @property
    def is_busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._posted)

    @property
    def is_due(self) -> bool:
        """Whether a completion is."""
        return self._completions.is_due

    @property
    def posted_bytes(self) -> int:
        """Of the chunks that are under way."""
        return sum(posted.chunk.header.length for posted in self._posted if posted.chunk)

    def add(self, header: ChunkHeader, parts: Sequence[memoryview]) -> int:
        """Take a chunk for the next batch: by reference if all of it is registered, else copied.

        Returns how many bytes were copied.
        """
        pieces, stage, copied = self._find(parts), None, 0
        if pieces is None:
            stage = self._free_stages.pop()
            copied = _gather(parts, self._sources.stages.view(stage, header.length))
            pieces, parts = [self._sources.stage(stage, header.length)], ()
        self._free -= len(pieces) + 1
        self.waiting_bytes += copied
        self._waiting.append(_Chunk(header, pieces, stage, parts))
        return copied

    def drop(self) -> None:
        """Chunks that wait are not sent."""
        self._waiting.clear()

    def credited(self, slots: int) -> None:
        """The peer gave so many slots back."""
        self._completions.credited(slots)

    def credit(self, slots: int) -> None:
        """Give slots of our ring back with the next batch."""
        self._credits |= slots

    def probe(self, large_bytes: int) -> None:
        """Two frames for the next batch: of nothing, and of so many bytes, or a slot's, to the first slot."""
        piece = self._sources.stage(0, min(large_bytes, self._slot_bytes))
        target = slot_offset(0, self._slot_bytes)
        for index, pieces in enumerate(((), (piece,))):
            immediate = Kind.PROBE << 16 | index
            self._special.append(Frame(0, pieces, target, b"", 0, immediate, is_signalled=True))
            self._free -= len(pieces) + 1

    # Windows of ours

    def announce(self, window: Window, header: WindowHeader) -> None:
        """Bind a window and tell the peer of it with the next batch."""
        cell = WINDOW_CELLS + header.number
        frame = frames.encode_window(header, self._count())
        self._special.appendleft(WindowWork(0, window, is_bind=True, is_signalled=False))
        self._special.append(
            Frame(0, (), 0, frame, cell, Kind.WINDOW << 16 | cell, is_signalled=False)
        )
        self._free -= 2

    def stop(self, number: int) -> None:
        """Ask the peer to write no more through it."""
        self._say(Kind.STOP, number)

    def is_stopping(self, number: int) -> bool:
        """Whether the peer may not have heard that it is to stop."""
        said, work = Kind.STOP << 16 | number, (*self._special, *self._posted)
        return any(isinstance(one, Frame | _Posted) and one.immediate == said for one in work)

    def invalidate(self, window: Window) -> None:
        """Let nothing more through; `take_invalidated` has it when that is so."""
        self._special.appendleft(WindowWork(0, window, is_bind=False, is_signalled=True))
        self._free -= 1

    def take_invalidated(self) -> list[Window]:
        """The windows that nothing comes through any more, since this was called last."""
        invalidated, self._invalidated = self._invalidated, []
        return invalidated

    # Windows of the peer's

    def aim(self, window: WindowHeader) -> None:
        """From now on chunks that belong there go there. Raises `RemoteProtocolError`."""
        said = Kind.STOPPED << 16 | window.number
        if any(isinstance(work, Frame) and work.immediate == said for work in self._special):
            raise RemoteProtocolError(f"window {window.number} came anew before it had stopped")
        self._aims[window.number] = window

    def stopped(self, number: int) -> None:
        """No more go there; the peer is told behind the last that did. Raises `RemoteProtocolError`."""
        if self._aims.pop(number, None) is None:
            raise RemoteProtocolError(f"the peer stopped window {number}, which was not open")
        self._say(Kind.STOPPED, number)

    def _say(self, kind: Kind, number: int) -> None:
        self._special.append(Frame(0, (), 0, b"", 0, kind << 16 | number, is_signalled=True))
        self._free -= 1

    def end(self) -> None:
        """The END is for the next batch, and nothing else comes with it, or after it."""
        self.drop()
        self._special.clear()
        self._credits = 0
        self._special.append(Frame(0, (), 0, b"", 0, Kind.END << 16, is_signalled=True))
        self._free -= 1

    def batch(self, *, goes_on: bool = False) -> list[Frame | WindowWork]:
        """What goes with the next doorbell: credits first, then the chunks in order.

        `goes_on`: more chunks come at once, with another batch.
        """
        self.waiting_bytes = 0
        if self._posted and self._special and isinstance(self._special[0], WindowWork):
            return self._marker() if self._completions.asked_id < self.last_id else []
        batch: list[Frame | WindowWork] = []
        while self._special:
            batch.append(self._hand_out(self._special.popleft(), None))
        if self._may_credit:
            batch.append(self._hand_out(self._credit_frame(), None))
        while self._waiting:
            chunk = self._waiting.popleft()
            batch.append(self._hand_out(self._chunk_frame(chunk), chunk))
        if not goes_on and self._is_lacking:
            batch = batch or self._marker()
            batch[-1] = batch[-1]._replace(is_signalled=True)
            self._completions.asked(self.last_id)
        if not goes_on:
            self._completions.judge()
        return batch

    def _marker(self) -> list[Frame | WindowWork]:
        """Something that completes when all before it is done."""
        self._free -= 1
        return [self._hand_out(Frame(0, (), 0, b"", 0, None, is_signalled=True), None)]

    def remind(self) -> list[Frame | WindowWork]:
        """For a doorbell without news: nothing, if a completion is due for what is under way."""
        return [] if self._completions.is_due else self._marker()

    def mark(self) -> int:
        """A number for one more work request, which the queue pair posts on its own."""
        self.last_id += 1
        self._posted.append(_Posted(self.last_id, 0, None))
        self._completions.asked(self.last_id)
        return self.last_id

    def completed(self, work_id: int) -> list[ChunkHeader]:
        """All up to this frame is done, one way or the other; the chunks among it."""
        headers = []
        posted = self._posted
        while posted and posted[0].work_id <= work_id:
            done = posted.popleft()
            self._free += done.work_requests
            if done.chunk is not None:
                headers.append(done.chunk.header)
                if done.chunk.stage is not None:
                    self._free_stages.append(done.chunk.stage)
            if done.invalidated is not None:
                self._invalidated.append(done.invalidated)
        self._completions.came(work_id)
        return headers

    def is_done_with(self, transfer: int) -> bool:
        """Whether the device reads nothing more of this transfer's own memory.

        If it does, the next batch sees to it that a completion tells.
        """
        chunks = [*self._waiting, *(posted.chunk for posted in self._posted)]
        is_reading = any(
            chunk and chunk.parts and chunk.header.transfer == transfer for chunk in chunks
        )
        self._completions.is_wanted |= is_reading
        return not is_reading

    @property
    def _is_lacking(self) -> bool:
        return self._completions.is_lacking(is_short=not self.room)

    @property
    def _may_credit(self) -> bool:
        return bool(self._credits) and self._free > _NOT_FOR_CREDITS - _RESERVE

    def _find(self, parts: Sequence[memoryview]) -> list[Piece] | None:
        if len(parts) > MAX_PIECES:
            return None
        pieces = []
        for part in parts:
            piece = self._sources.find(part)
            if piece is None:
                return None
            pieces.append(piece)
        return pieces

    def _credit_frame(self) -> Frame:
        slots, self._credits = self._credits, 0
        self._free -= 1
        cell = CREDIT_CELLS + self._credit_frames % (WINDOW_CELLS - CREDIT_CELLS)
        self._credit_frames += 1
        header = frames.encode_credit(slots, self._count())
        return Frame(0, (), 0, header, cell, Kind.CREDIT << 16 | cell, is_signalled=False)

    def _chunk_frame(self, chunk: _Chunk) -> Frame:
        header, slot = chunk.header, chunk.header.slot
        target, key = slot_offset(slot, self._slot_bytes), None
        for window in self._aims.values():
            if window.holds(header):
                target, key = window.address + header.offset - window.offset, window.key
                header = header._replace(is_in_place=True)
                break
        cell = frames.encode_chunk(header, self._count())
        return Frame(0, chunk.pieces, target, cell, slot, slot, is_signalled=False, key=key)

    def _hand_out(self, work: W, chunk: _Chunk | None) -> W:
        self.last_id += 1
        work_requests, invalidated, immediate = 1, None, None
        if isinstance(work, Frame):
            work_requests += len(work.pieces)
            immediate = work.immediate
        elif not work.is_bind:
            invalidated = work.window
        self._posted.append(_Posted(self.last_id, work_requests, chunk, invalidated, immediate))
        self._completions.posted(work_requests, is_chunk=chunk is not None)
        is_signalled = work.is_signalled or self._completions.is_enough
        if is_signalled:
            self._completions.asked(self.last_id)
        return work._replace(work_id=self.last_id, is_signalled=is_signalled)

    def _count(self) -> int:
        self._sequence += 1
        return self._sequence


def _gather(parts: Sequence[memoryview], target: memoryview) -> int:
    start = 0
    for part in parts:
        target[start : start + part.nbytes] = part
        start += part.nbytes
    return start
