"""Lanes over RDMA verbs, by way of pyverbs.

Each event loop has one context, protection domain (PD) and completion pump a device, for all of its lanes: so memory
is registered once, however many channels send it. The ring of a lane is open to its own queue pair alone, by a type-2
memory window. A device without these gives each lane a PD of its own, where all is sent through the ring.

ibv_create_qp_ex(3), ibv_modify_qp(3), ibv_reg_mr(3), ibv_bind_mw(3), ibv_wr_post(3).
"""

from __future__ import annotations

import contextlib
from typing import Final

from aiordma.lanes.choice import Choice
from aiordma.lanes.outbox import Outbox, Sources
from aiordma.lanes.rdma import EXTRA_RECEIVES, RdmaLane
from aiordma.lanes.verbs.device import Device, survey
from aiordma.lanes.verbs.queue_pair import VerbsQueuePair
from aiordma.ring import Ring
from aiordma.wire.hello import Limits

__all__ = ["Device", "VerbsQueuePair", "open_lane", "survey"]

_QUEUE_SLACK: Final = 160
"""Send work requests beyond two a slot of the peer's: for chunks of many pieces."""


def open_lane(
    device: Device, choice: Choice, ring: Ring, peer: Limits
) -> tuple[VerbsQueuePair, RdmaLane]:
    """A lane whose queue pair is not connected yet. Takes over one `Device.open`, unless it raises.

    Raises `LaneRefused`, or `Busy` if the memory budget has no room for what it sends from.
    """
    depth, receives = 2 * peer.slots + _QUEUE_SLACK, ring.slots + peer.slots + EXTRA_RECEIVES
    stages = Ring(peer.slots + max(2, peer.slots // 2), peer.slot_bytes)
    with contextlib.ExitStack() as undo:
        undo.callback(stages.close)
        pair = VerbsQueuePair(device, choice, ring, stages, depth, receives)
        undo.pop_all()
    outbox = Outbox(
        Sources(stages, pair.stage, pair.find),
        depth=depth,
        peer_slots=peer.slots,
        peer_slot_bytes=peer.slot_bytes,
    )
    lane = RdmaLane(pair, ring, outbox, watch=pair.reservation.watch)
    pair.reservation.attach(pair.number, lane)
    return pair, lane
