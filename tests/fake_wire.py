"""The sending side of a fake queue pair: work requests in order, some each turn, and what becomes of them."""

from __future__ import annotations

import asyncio
import ctypes
import errno
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiordma.lanes.outbox import Frame, Piece, WindowWork
from aiordma.lanes.statuses import FLUSHED
from aiordma.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from tests.fake_device import FakeQueuePair

PROTECTION, REMOTE_ACCESS, NO_ANSWER, NOT_READY = 4, 10, 12, 13
"""What else becomes of a work request (IBV_WC_...)."""


class Counts:
    """What a queue pair's sending side did."""

    def __init__(self) -> None:
        self.doorbells = 0
        self.frames = 0
        self.work_requests = 0
        self.send_completions = 0
        self.read_bytes = 0
        """Of memory that is not inline."""


class Wire:
    """The send queue of a queue pair, and the way to the peer."""

    def __init__(self, owner: FakeQueuePair, depth: int) -> None:
        self.depth = depth
        self.peer: FakeQueuePair | None = None
        self.has_failed = False
        self.is_gone = False
        self.is_held = False
        self.is_asleep = False
        """As soft-RoCE is when it misses that it may go on: until the next doorbell."""
        self.withholds_acks = False
        """The peer has it, and the sender does not know."""
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._posted: deque[Frame | WindowWork] = deque()
        self._unacked: deque[Frame | WindowWork] = deque()
        self._begun: list[tuple[int, Piece]] = []
        """What is still to come of a message that went through a window."""
        self._taken = 0
        self._is_scheduled = False

    @property
    def is_idle(self) -> bool:
        """Whether it has no work, or is gone."""
        return self.is_gone or not (self._posted or self._unacked)

    def post(self, batch: Sequence[Frame | WindowWork]) -> None:
        """All of it, or none. A place is free again when it, or a later one, has completed."""
        assert self.peer is not None
        count = sum(map(_requests, batch))
        if self.is_gone or self._taken + count > self.depth:
            raise OSError(errno.ENOMEM, "the send queue is full")
        self.is_asleep = False
        self._taken += count
        self._owner.counts.work_requests += count
        # A device knows addresses, and keeps nothing alive.
        self._posted += [
            f._replace(pieces=[p._replace(holder=None) for p in f.pieces])
            if isinstance(f, Frame)
            else f
            for f in batch
        ]
        if self.has_failed:
            self._loop.call_soon(self._flush)
        else:
            self._schedule()

    def carry(self, count: int) -> None:
        """Let so many frames through, now."""
        for _ in range(min(count, len(self._posted))):
            if self.has_failed or self.is_gone or not self._carry_one():
                return

    def hold(self, is_held: bool = True) -> None:
        """From now on frames go only where `carry` lets them; or as they come again."""
        self.is_held = is_held
        self._schedule()

    def fail(self, status: int = FLUSHED) -> None:
        """Go to the error state: all that is under way completes with an error, receives too."""
        if not self.has_failed:
            self.has_failed = True
            self._loop.call_soon(self._flush, status)

    def _schedule(self) -> None:
        if self._posted and not (self._is_scheduled or self.is_held or self.is_asleep):
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        if not (self.is_held or self.is_asleep):
            self.carry(self._owner.device.frames_a_turn)
            self._schedule()

    def _carry_one(self) -> bool:
        frame = self._posted.popleft()
        status = 0
        if isinstance(frame, WindowWork):
            behind = [work for work in self._unacked if isinstance(work, Frame)]
            assert not behind, (
                "soft-RoCE would repeat it, and wait for ever, if one of these were lost"
            )
            self._owner.change(frame)
        elif frame.key is not None and not self._begun:
            status = self._begin(frame)
            if not status:
                self._posted.appendleft(frame)  # the rest of it, and the header, later
                return True
        else:
            status = self._execute(frame)
        self._unacked.append(frame)
        if status == NO_ANSWER and self.peer is not None and self.peer.silent:
            return True
        if status:
            self.fail(status)
        elif frame.is_signalled:
            self._loop.call_soon(self._acknowledge, frame)
        return not status

    def _begin(self, frame: Frame) -> int:
        """A device looks at the window with a message's first packet only."""
        assert self.peer is not None
        assert frame.key is not None
        target = frame.target
        for piece in frame.pieces:
            if not self._owner.device.may_read(piece):
                return PROTECTION
            status = self.peer.may_write(frame.key, target, piece.length)
            if status:
                return status
            half = piece.length // 2
            ctypes.memmove(target, piece.address, half)
            rest = piece._replace(address=piece.address + half, length=piece.length - half)
            self._begun.append((target + half, rest))
            self._owner.counts.read_bytes += piece.length
            target += piece.length
        return 0

    def _execute(self, frame: Frame) -> int:
        assert self.peer is not None
        if frame.key is not None:
            begun, self._begun = self._begun, []
            for at, piece in begun:
                if self.peer.wire.is_gone or self.peer.wire.has_failed:
                    return NO_ANSWER
                ctypes.memmove(at, piece.address, piece.length)
            frame = frame._replace(pieces=())
        target = frame.target
        for piece in frame.pieces:
            if not self._owner.device.may_read(piece):
                return PROTECTION
            status = self.peer.write(target, piece)
            if status:
                return status
            self._owner.counts.read_bytes += piece.length
            target += piece.length
        header = ctypes.create_string_buffer(frame.header)
        inline = Piece(ctypes.addressof(header), len(frame.header), 0)
        status = self.peer.write(frame.cell * HEADER_BYTES, inline)
        if status or frame.immediate is None:
            return status
        return self.peer.announce(frame.immediate)

    def _acknowledge(self, frame: Frame | WindowWork) -> None:
        """The peer's device has all up to this one."""
        if not (self.has_failed or self.is_gone or self.withholds_acks):
            self._complete(frame)

    def acknowledge(self) -> None:
        """All that has gone."""
        if self._unacked:
            self._acknowledge(self._unacked[-1])

    def _complete(self, frame: Frame | WindowWork) -> None:
        while self._unacked:
            done = self._unacked.popleft()
            self._taken -= _requests(done)
            if done.is_signalled:
                self._owner.counts.send_completions += 1
                self._owner.add(done.work_id)
            if done is frame:
                return

    def _flush(self, status: int = FLUSHED) -> None:
        """Each work request completes, the unsignalled ones too."""
        if self.is_gone:
            return
        if status != FLUSHED:  # what is under way arrived, but for the last
            failed = self._unacked.pop()
            if self._unacked:
                self._complete(self._unacked[-1])
            self._unacked.append(failed)
        while self._unacked or self._posted:
            frame = (self._unacked or self._posted).popleft()
            for _ in range(_requests(frame)):
                self._owner.add(frame.work_id, status)
                status = FLUSHED
            self._taken -= _requests(frame)
        self._owner.flush_receives()


def _requests(frame: Frame | WindowWork) -> int:
    return len(frame.pieces) + 1 if isinstance(frame, Frame) else 1
