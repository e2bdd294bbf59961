"""What one RDMA lane asks of its device, and of the memory that a process may lock."""

from __future__ import annotations

from typing import Final, NamedTuple

from aiordma.lanes.outbox import WINDOWS
from aiordma.lanes.rdma import EXTRA_RECEIVES
from aiordma.ring import slot_offset

_QUEUE_SLACK: Final = 160 + 5 * WINDOWS
"""Send work requests beyond two a slot of the peer's: for chunks of many pieces, and windows."""

COMPLETIONS: Final = 4096
"""Held by each completion queue, at least; the lanes of a device share it."""


class Needs(NamedTuple):
    """Of one queue pair."""

    sends: int
    """Work requests that its send queue holds."""
    receives: int
    stages: int
    """Slots that it sends from."""
    ring_bytes: int
    """Registered for the peer to write to."""
    stages_bytes: int
    """Registered to send from."""

    @property
    def pinned_bytes(self) -> int:
        """All that it registers."""
        return self.ring_bytes + self.stages_bytes


def needs(slots: int, slot_bytes: int, peer_slots: int, peer_slot_bytes: int) -> Needs:
    """Of a lane with a ring of `slots`, to a peer with one of `peer_slots`."""
    stages = peer_slots + max(4, peer_slots // 2)
    return Needs(
        sends=2 * peer_slots + _QUEUE_SLACK,
        receives=slots + peer_slots + EXTRA_RECEIVES,
        stages=stages,
        ring_bytes=slot_offset(slots, slot_bytes),
        stages_bytes=slot_offset(stages, peer_slot_bytes),
    )
