"""What a channel did so far, as frozen snapshots."""

from __future__ import annotations

import msgspec


class LaneInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A lane that the channel got, and why it is of this kind."""

    index: int
    kind: str
    """"tcp", "memory" or "verbs"."""
    reason: str


class LaneStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one lane since the channel was opened, and what is under way now."""

    kind: str
    sent_bytes: int = 0
    sent_chunks: int = 0
    received_bytes: int = 0
    received_chunks: int = 0
    credits_sent: int = 0
    """CREDIT frames sent."""
    in_flight_chunks: int = 0
    """Slots of the peer that our chunks occupy or are on their way to."""
    held_slots: int = 0
    """Our slots that hold a chunk which nobody released yet."""


class ChannelStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one channel since it was opened, and what is under way now."""

    sent_bytes: int
    sent_chunks: int
    received_bytes: int
    received_chunks: int
    in_flight_chunks: int
    copied_bytes: int
    """Payload bytes that this end copied in user space: out of slots, into staging, or aside."""
    discarded_chunks: int
    """Chunks that came for a transfer which was over."""
    credit_waits: int
    """How often a claimed transfer had to wait for a credit."""
    sent_messages: int
    received_messages: int
    unread_messages: int
    open_sends: int
    """Transfers that this end sends now."""
    open_receives: int
    """Transfers of the peer that are open now."""
    kept_frames: int
    """Control frames that the peer has not acknowledged yet."""
    rtt_s: float
    """The last round-trip time measured over the control connection."""
    lanes: tuple[LaneStats, ...]


class Counters(msgspec.Struct, eq=False):
    """What a link counts as it goes."""

    copied_bytes: int = 0
    discarded_chunks: int = 0
    credit_waits: int = 0
    sent_messages: int = 0
    received_messages: int = 0
    rtt_s: float = 0.0


def total(lanes: tuple[LaneStats, ...], name: str) -> int:
    """The sum of one counter over the lanes."""
    return sum(getattr(lane, name) for lane in lanes)
