"""One lane of a channel, seen from the channel: its ring, the fate of its slots, its counters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from aiordma.chunk import Chunk
from aiordma.errors import ChannelBroken, RemoteProtocolError
from aiordma.lanes.base import Lane
from aiordma.lanes.rdma import RdmaLane
from aiordma.outgoing import Outgoing
from aiordma.ring import Ring, SlotState
from aiordma.stats import LaneStats
from aiordma.transfer import Reception
from aiordma.wire.frames import ChunkHeader
from aiordma.wire.receiving import Verdict
from aiordma.wire.sending import Plan

_MAX_PARTS: Final = 256
"""A chunk of more pieces than this is staged: sendmsg(2) gathers at most IOV_MAX (1024)."""

_GRACE_S: Final = 1.0
"""How long a lane that ended waits for the control connection to say why."""

Subject = Reception | Verdict


class PortOwner(Protocol):
    """What a port asks of its link."""

    @property
    def is_busy(self) -> bool:
        """Whether anything is open."""

    def admit(self, header: ChunkHeader) -> Subject:
        """Judge a chunk by its header."""

    def came(self, header: ChunkHeader, chunk: Chunk, subject: Subject) -> None:
        """The chunk is here, whole; its check was not looked at yet."""

    def sent(self, port: Port, transfers: list[int]) -> None:
        """A chunk of each of these is out, and the lane may have room: post what may go."""

    def credited(self, port: Port, slots: int) -> None:
        """The peer gives slots back."""

    def fail(self, error: ChannelBroken) -> None:
        """The channel is over, unless it is already."""

    def copied(self, nbytes: int) -> None:
        """Count bytes that were copied."""


class _Landing(NamedTuple):
    subject: Subject
    view: memoryview
    is_direct: bool


class Port:
    """Handles one lane's events, and owns the receive slots behind it."""

    def __init__(
        self, index: int, lane: Lane, ring: Ring, owner: PortOwner, *, rdma: RdmaLane | None
    ) -> None:
        """`rdma`: the lane, if it is one."""
        self.index = index
        self.lane = lane
        self.ring = ring
        self.windows = rdma.windows if rdma is not None else None
        self._rdma = rdma
        self._owner = owner
        self._landings: dict[int, _Landing] = {}
        self._stages: list[memoryview] = []
        self._staged: dict[tuple[int, int], memoryview] = {}
        self._released = 0
        self._released_count = 0
        self._sent = (0, 0)
        self._received = (0, 0)
        self._credits_sent = 0
        self.loss: ChannelBroken | None = None
        """What the lane was lost by, if it knows more than that its connection ended."""

    @property
    def is_busy(self) -> bool:
        return self._owner.is_busy

    @property
    def whereabouts(self) -> str:
        """To be added to an error of the channel: where its lane was, if on a device."""
        return "" if self._rdma is None else f"; lane {self.index} (verbs) was {self._rdma.name}"

    def watch(self) -> None:
        """The link is busy."""
        if self._rdma is not None:
            self._rdma.watch()

    # Sending

    def post(self, plan: Plan, outgoing: Outgoing, *, checksum: bool) -> None:
        """Send one chunk by reference, or through staging memory if it is on a device or in too many pieces."""
        parts = outgoing.views(plan.offset, plan.length) if outgoing.is_host else []
        if not 0 < len(parts) <= _MAX_PARTS:
            parts = self._stage(plan, outgoing)
        check = outgoing.check(plan.offset, plan.length, parts) if checksum else None
        self._sent = (self._sent[0] + 1, self._sent[1] + plan.length)
        self.lane.post(
            ChunkHeader(plan.slot, plan.length, plan.transfer, plan.offset, check), parts
        )

    def _stage(self, plan: Plan, outgoing: Outgoing) -> list[memoryview]:
        stage = self._stages.pop() if self._stages else memoryview(b"")
        if stage.nbytes < plan.length:
            stage = memoryview(bytearray(plan.length))
        outgoing.stage(plan.offset, plan.length, stage)
        self._owner.copied(plan.length)
        self._staged[plan.transfer, plan.offset] = stage
        return [stage[: plan.length]]

    def sent(self, headers: Sequence[ChunkHeader]) -> None:
        """These chunks are out of the lane's hands."""
        for header in headers:
            # By no means by its slot: the peer may have given that back, and another chunk may be in it.
            stage = self._staged.pop((header.transfer, header.offset), None)
            if stage is not None:
                self._stages.append(stage)
        self._owner.sent(self, [header.transfer for header in headers])

    def copied(self, nbytes: int) -> None:
        self._owner.copied(nbytes)

    def credited(self, slots: int) -> None:
        self._owner.credited(self, slots)

    # Receiving

    def place(self, header: ChunkHeader) -> memoryview:
        """The chunk's final place, if its receiver gave one, else its slot. Judges it when asked first."""
        known = self._landings.get(header.slot)
        subject = self._admit(header) if known is None else known.subject
        view = None
        if isinstance(subject, Reception):
            view = subject.place(header.offset, header.length)
        is_direct = view is not None
        if view is None:
            view = self.ring.view(header.slot, header.length)
        self._landings[header.slot] = _Landing(subject, view, is_direct)
        return view

    def arrived(self, header: ChunkHeader) -> None:
        """The slot is filled, even if the bytes went to their final place: it is free once released."""
        subject, view, is_direct = self._landings.pop(header.slot)
        slot = header.slot
        self.ring.move(slot, "arrived")
        self._received = (self._received[0] + 1, self._received[1] + header.length)
        chunk = Chunk(header.offset, view, is_direct=is_direct, release=lambda: self._release(slot))
        self._owner.came(header, chunk, subject)

    def _admit(self, header: ChunkHeader) -> Subject:
        slot, length = header.slot, header.length
        if slot >= self.ring.slots or self.ring.state(slot) is not SlotState.POSTED:
            raise RemoteProtocolError(f"a chunk came for slot {slot}, which was not granted")
        if not 0 < length <= self.ring.slot_bytes:
            raise RemoteProtocolError(
                f"a chunk of {length} bytes came for a slot of {self.ring.slot_bytes}"
            )
        return self._owner.admit(header)

    # Credits

    def _release(self, slot: int) -> None:
        self.ring.move(slot, "release")
        self._released |= 1 << slot
        self._released_count += 1
        if self._released_count * 4 >= self.ring.slots:
            self.give_credit()
        elif self._released_count == 1:
            # A sender whose share is used up waits for this one, however few they are.
            asyncio.get_running_loop().call_soon(self.give_credit)

    def give_credit(self) -> None:
        """Name all released slots in a CREDIT."""
        slots, self._released, self._released_count = self._released, 0, 0
        if not slots or not self.ring.slots:
            return
        for slot in range(slots.bit_length()):
            if slots >> slot & 1:
                self.ring.move(slot, "credited")
        self._credits_sent += 1
        self.lane.credit(slots)

    # Ends

    def lost(self, exc: Exception | None) -> None:
        """The lane moves nothing any more, and a channel needs all of its lanes."""
        if isinstance(exc, RemoteProtocolError):
            self._owner.fail(exc)
            return
        broken = ChannelBroken(
            f"lane {self.index} ({self.lane.kind}) is lost: {exc or 'it ended'}; connect again"
        )
        broken.__cause__ = exc
        if isinstance(exc, ChannelBroken):
            self.loss = broken
        # A peer that closes ends its lanes and its control connection together; which we see first is chance.
        asyncio.get_running_loop().call_later(_GRACE_S, self._owner.fail, broken)

    def stats(self, in_flight_chunks: int) -> LaneStats:
        """A snapshot."""
        return LaneStats(
            kind=self.lane.kind,
            sent_chunks=self._sent[0],
            sent_bytes=self._sent[1],
            received_chunks=self._received[0],
            received_bytes=self._received[1],
            credits_sent=self._credits_sent,
            in_flight_chunks=in_flight_chunks,
            held_slots=self.ring.count(SlotState.FILLED),
        )
