"""What a lane is, and what it asks of the one that uses it.

All calls are plain calls on the event loop's thread. A handler may call `post` from within `sent`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from aiordma.wire.frames import ChunkHeader


class LaneHandler(Protocol):
    """The user of a lane."""

    @property
    def is_busy(self) -> bool:
        """Whether something is open, so that the lane may have something to tell soon."""

    def place(self, header: ChunkHeader) -> memoryview:
        """Where this chunk's payload goes: a writable view of `header.length` bytes.

        Asked before the first byte of the payload is stored there. Raises `RemoteProtocolError` if the chunk
        must not come; the lane then reports itself lost.
        """

    def arrived(self, header: ChunkHeader) -> None:
        """The whole payload is where `place` said."""

    def sent(self, headers: Sequence[ChunkHeader]) -> None:
        """The lane needs the payloads of these no more, and may have room again; of none, if it was for other frames
        that room was short."""

    def copied(self, nbytes: int) -> None:
        """The lane copied so much of a payload."""

    def credited(self, slots: int) -> None:
        """The peer gives back the slots whose bits are set."""

    def lost(self, exc: Exception | None) -> None:
        """The lane moves nothing any more; None if the peer ended it between two frames. Called once at most."""


class Lane(Protocol):
    """One bulk path to the peer, in both directions."""

    @property
    def kind(self) -> str:
        """ "memory", "tcp" or "verbs"."""

    @property
    def room(self) -> int:
        """How many chunks `post` takes now."""

    def start(self, handler: LaneHandler) -> None:
        """Begin to move. Until then nothing is read."""

    def post(self, header: ChunkHeader, parts: Sequence[memoryview]) -> None:
        """Send a chunk: its payload is the parts, joined, and belongs to the lane until `sent`.

        Never blocks. There must be room.
        """

    def credit(self, slots: int) -> None:
        """Tell the peer that the slots whose bits are set are its own again. Needs no room."""

    def recall(self, transfer: int, *, is_sending: bool) -> bool:
        """Let go of the memory of this transfer, now: the caller gets it back.

        What the lane still has to send of it is copied aside. A chunk that is being received into memory
        that `place` named is moved to where `place` says on being asked again. False: a device reads the
        memory; ask again when `sent` was told.
        """

    async def aclose(self) -> None:
        """Stop. When this returns, no memory is read or written any more, and `lost` is not called again.

        Cancelled, it makes haste: the same is true when it ends, if it had begun.
        """


async def close_all(lanes: Sequence[Lane]) -> None:
    """Close them. Even if this is cancelled, or one fails (which the loop is told): they all are when it ends."""
    outcomes: Sequence[object] = ()
    try:
        outcomes = await asyncio.gather(*(lane.aclose() for lane in lanes), return_exceptions=True)
    finally:
        cancelled: asyncio.CancelledError | None = None
        for lane in lanes:  # perhaps one was cancelled before it had begun
            try:
                await lane.aclose()
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a lane could not be closed in order", "exception": outcome}
            )
