"""The receiver's half: which transfers are open, and whether a chunk may come now.

Control connection and lanes are separate, so a chunk may overtake its OPEN: it is early, and waits in its
slot. A chunk of a transfer that is over (refused, aborted, finished) is discarded and its slot given back:
the peer could not know yet. Everything else that does not fit is a protocol error.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from aiordma.errors import RemoteProtocolError
from aiordma.wire.credit import GrantWindow
from aiordma.wire.frames import ChunkHeader
from aiordma.wire.manifest import Manifest

_MOST_OUT_OF_ORDER: Final = 1 << 16
"""Chunks of one transfer that may overtake one that still lacks: a lane far behind the others, not a peer
that never sends it and fills our memory with what came besides."""


class Verdict(enum.Enum):
    """What becomes of a chunk that belongs to no open transfer."""

    EARLY = "early"
    DISCARD = "discard"


class Incoming(msgspec.Struct, eq=False, kw_only=True):
    """One transfer that is being received."""

    id: int
    manifest: Manifest
    meta: bytes
    chunk_bytes: int
    open_bytes: int
    """What it costs of the OPEN window."""
    is_claimed: bool
    was_claimed: bool
    """A claim that was taken back may still have let chunks loose."""
    came_bytes: int = 0
    """Bytes of chunks that came and whose check was right."""
    chunks: int = 0
    """Chunks let in."""
    _low: int = 0
    _beyond: set[int] = msgspec.field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has come."""
        return self.came_bytes == self.manifest.total_bytes

    def admit(self, header: ChunkHeader) -> None:
        """Let a chunk in, once; raises `RemoteProtocolError` if it is not one of this transfer's chunks."""
        total, offset = self.manifest.total_bytes, header.offset
        index, rest = divmod(offset, self.chunk_bytes)
        if rest or offset >= total or header.length != min(self.chunk_bytes, total - offset):
            raise RemoteProtocolError(
                f"transfer {self.id} of {total} bytes in chunks of {self.chunk_bytes} has no chunk of "
                f"{header.length} bytes at {offset}"
            )
        if not self.was_claimed and self.chunks:
            raise RemoteProtocolError(f"a second chunk of transfer {self.id}, which is not claimed")
        if index < self._low or index in self._beyond:
            raise RemoteProtocolError(f"transfer {self.id}: the chunk at {offset} came twice")
        if len(self._beyond) >= _MOST_OUT_OF_ORDER:
            raise RemoteProtocolError(
                f"transfer {self.id}: {len(self._beyond)} chunks came before the one at {self._low * self.chunk_bytes}"
            )
        self.chunks += 1
        # Senders submit rising offsets: out of order is only what overtakes a chunk on a slower lane.
        self._beyond.add(index)
        while self._low in self._beyond:
            self._beyond.remove(self._low)
            self._low += 1


class Receiver:
    """All transfers of one direction."""

    def __init__(self, window: GrantWindow) -> None:
        self._window = window
        self._live: dict[int, Incoming] = {}
        self._ahead: dict[int, bool] = {}
        self._early: dict[int, int] = {}
        self._last = 0

    @property
    def last(self) -> int:
        """The id of the last OPEN."""
        return self._last

    def next_id(self, transfer: int) -> bool | None:
        """Count an OPEN in; ids rise by one. Whether it is claimed in advance; False: no longer; None: never."""
        if transfer != self._last + 1:
            raise RemoteProtocolError(f"OPEN of transfer {self._last + 1} was due, {transfer} came")
        self._last = transfer
        self._early.pop(transfer, None)
        return self._ahead.pop(transfer, None)

    def add(self, incoming: Incoming) -> None:
        """An open transfer."""
        self._live[incoming.id] = incoming

    def get(self, transfer: int) -> Incoming | None:
        """The open transfer with this id."""
        return self._live.get(transfer)

    def forget(self, transfer: int) -> Incoming | None:
        """The transfer is over; chunks that still come are discarded."""
        return self._live.pop(transfer, None)

    def claim_next(self, count: int) -> list[tuple[int, bool]]:
        """Want the next `count` transfers, and no later ones; what changed: (id, is it wanted now).

        Of one that is no longer wanted, chunks may be on their way already.
        """
        wanted = range(self._last + 1, min(self._last + count, self._window.count_limit) + 1)
        changed = [(i, True) for i in wanted if not self._ahead.get(i)]
        changed += [
            (i, False) for i, is_wanted in self._ahead.items() if is_wanted and i not in wanted
        ]
        self._ahead.update(changed)
        return changed

    def admit(self, header: ChunkHeader) -> Incoming | Verdict:
        """Judge a chunk by its header, before a byte of it is stored."""
        transfer = header.transfer
        incoming = self._live.get(transfer)
        if incoming is not None:
            incoming.admit(header)
            return incoming
        if transfer <= self._last:
            if transfer < 1:
                raise RemoteProtocolError(f"a chunk of transfer {transfer}: ids begin with 1")
            return Verdict.DISCARD
        if transfer > self._window.count_limit:
            raise RemoteProtocolError(
                f"a chunk of transfer {transfer}, beyond the {self._window.count_limit} that may be open"
            )
        early = self._early.get(transfer, 0)
        if early and transfer not in self._ahead:
            raise RemoteProtocolError(
                f"a second chunk of transfer {transfer}, which is neither open nor claimed"
            )
        self._early[transfer] = early + 1
        return Verdict.EARLY
