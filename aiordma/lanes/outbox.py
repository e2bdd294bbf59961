"""What an RDMA lane sends: which frames ride with the next doorbell, which of them ask for a completion, and what
the device may still read.

A completion costs a wake-up, and one tells of all work requests before it. So a frame asks for one if so much went
by without that the send queue or the stages run short; else only if none is due, and nothing else is bound to make
us look again. What does so is a CREDIT for chunks that took all the slots which the last CREDIT gave back: as
long as the peer takes chunks that wait for it, the next ones go out with the next CREDIT, and some of them ask. When
fewer follow than could, or somebody wants a chunk's memory back, the last that is under way is asked for.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from aiordma.ring import CELLS, Ring, slot_offset
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader

MAX_PIECES: Final = 16
"""A chunk of more pieces is copied together before it is sent."""
_RESERVE: Final = 8
"""Work requests of the send queue that chunks leave to CREDITs, markers, and the END..."""
_LEFT_FOR_END: Final = 3
"""...and so many of them, CREDITs."""


class Kind(enum.IntEnum):
    """The upper half of an immediate; the lower half is a slot, or a cell's number."""

    CHUNK = 0
    CREDIT = 1
    PROBE = 2
    END = 3


class Piece(NamedTuple):
    """Memory that the device may read."""

    address: int
    length: int
    lkey: int
    holder: object = None
    """What keeps it registered."""


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


class Sources(NamedTuple):
    """Registered memory to send from."""

    stages: Ring
    """For payloads from elsewhere, which are copied here first."""
    stage: Callable[[int, int], Piece]
    """So many bytes (the second argument) of a stage (the first)."""
    find: Callable[[memoryview], Piece | None]
    """The piece that this is of memory which its owner has registered, if it is."""


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
        self._special: deque[Frame] = deque()
        self._waiting: deque[_Chunk] = deque()
        self._posted: deque[_Posted] = deque()
        self._sequence = 0
        self._completions = _Completions(depth // 4, max(4, peer_slots * 3 // 4))

    @property
    def room(self) -> int:
        """Chunks that `add` takes now, whatever they are made of."""
        return max(0, min(len(self._free_stages), self._free // (MAX_PIECES + 1)))

    @property
    def is_busy(self) -> bool:
        """Whether a completion is due."""
        return self._completions.is_due

    @property
    def wants_batch(self) -> bool:
        """Whether `batch` has something to send."""
        return bool(self._special or self._waiting or self._may_credit or self._is_lacking)

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
        """Two frames for the next batch: of nothing, and of so many bytes to the first slots."""
        piece = self._sources.stage(0, large_bytes)
        target = slot_offset(0, self._slot_bytes)
        for index, pieces in enumerate(((), (piece,))):
            immediate = Kind.PROBE << 16 | index
            self._special.append(Frame(0, pieces, target, b"", 0, immediate, is_signalled=True))
            self._free -= len(pieces) + 1

    def end(self) -> None:
        """The END is for the next batch, and nothing comes after it."""
        self.drop()
        self._credits = 0
        self._special.append(Frame(0, (), 0, b"", 0, Kind.END << 16, is_signalled=True))
        self._free -= 1

    def batch(self, *, goes_on: bool = False) -> list[Frame]:
        """What goes with the next doorbell: credits first, then the chunks in order.

        `goes_on`: more chunks come at once, with another batch.
        """
        batch: list[Frame] = []
        self.waiting_bytes = 0
        while self._special:
            batch.append(self._hand_out(self._special.popleft(), None))
        if self._may_credit:
            batch.append(self._hand_out(self._credit_frame(), None))
        while self._waiting:
            chunk = self._waiting.popleft()
            batch.append(self._hand_out(self._chunk_frame(chunk), chunk))
        if not goes_on and self._is_lacking:
            if not batch:
                self._free -= 1
                marker = Frame(0, (), 0, b"", 0, None, is_signalled=False)
                batch.append(self._hand_out(marker, None))
            batch[-1] = batch[-1]._replace(is_signalled=True)
            self._completions.asked(self.last_id)
        if not goes_on:
            self._completions.judge()
        return batch

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
        return bool(self._credits) and self._free > _LEFT_FOR_END - _RESERVE

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
        cell = CELLS // 2 + self._credit_frames % (CELLS // 2)
        self._credit_frames += 1
        header = frames.encode_credit(slots, self._count())
        return Frame(0, (), 0, header, cell, Kind.CREDIT << 16 | cell, is_signalled=False)

    def _chunk_frame(self, chunk: _Chunk) -> Frame:
        slot = chunk.header.slot
        header = frames.encode_chunk(chunk.header, self._count())
        target = slot_offset(slot, self._slot_bytes)
        return Frame(0, chunk.pieces, target, header, slot, slot, is_signalled=False)

    def _hand_out(self, frame: Frame, chunk: _Chunk | None) -> Frame:
        self.last_id += 1
        work_requests = len(frame.pieces) + 1
        self._posted.append(_Posted(self.last_id, work_requests, chunk))
        self._completions.posted(work_requests, is_chunk=chunk is not None)
        is_signalled = frame.is_signalled or self._completions.is_enough
        if is_signalled:
            self._completions.asked(self.last_id)
        return frame._replace(work_id=self.last_id, is_signalled=is_signalled)

    def _count(self) -> int:
        self._sequence += 1
        return self._sequence


class _Completions:
    """Which frames ask for a completion."""

    def __init__(self, most_requests: int, most_chunks: int) -> None:
        """So many work requests, or chunks, may go by without."""
        self.is_wanted = False
        """Whether somebody waits for the memory of chunks that are under way."""
        self._is_bulk = False
        self._limits = most_requests, most_chunks
        self._requests = self._chunks = 0  # since the last that asks
        # Slots that the last CREDIT gave back, and that were spent since, until it was judged.
        self._returned = self._spent = 0
        self._asked_id = self._came_id = 0

    @property
    def is_enough(self) -> bool:
        """Whether the last frame must ask, whatever follows."""
        return self._requests >= self._limits[0] or self._chunks >= self._limits[1]

    @property
    def is_due(self) -> bool:
        """Whether a completion is bound to come."""
        return self._asked_id > self._came_id

    def is_lacking(self, *, is_short: bool) -> bool:
        """Whether chunks are under way, and nothing will come that makes us look again.

        `is_short`: no more chunks can be added before.
        """
        if not self._chunks:
            return False
        return self.is_wanted or (not self.is_due and (is_short or not self._goes_on))

    def judge(self) -> None:
        """All chunks that could follow the last CREDIT have."""
        self.is_wanted = False
        self._is_bulk = self._goes_on
        self._returned = self._spent = 0

    def credited(self, slots: int) -> None:
        # The peer owes another one for the chunks that go out from now on.
        self._returned, self._spent = slots, 0

    def posted(self, work_requests: int, *, is_chunk: bool) -> None:
        self._requests += work_requests
        self._chunks += is_chunk
        self._spent += is_chunk

    def asked(self, work_id: int) -> None:
        self._asked_id = work_id
        self._requests = self._chunks = 0

    def came(self, work_id: int) -> None:
        self._came_id = max(self._came_id, work_id)

    @property
    def _goes_on(self) -> bool:
        """Whether the last chunks took all slots that had come back, so that more are likely to follow."""
        if self._returned or self._spent:
            return 0 < self._returned <= self._spent
        return self._is_bulk


def _gather(parts: Sequence[memoryview], target: memoryview) -> int:
    start = 0
    for part in parts:
        target[start : start + part.nbytes] = part
        start += part.nbytes
    return start
