"""Lanes over RDMA verbs, by way of pyverbs.

Each event loop has one context, protection domain (PD) and completion pump a device, for all of its lanes: so memory
is registered once, however many channels send it. The ring of a lane is open to its own queue pair alone, by a type-2
memory window. A device without these gives each lane a PD of its own, where all is sent through the ring.

ibv_create_qp_ex(3), ibv_modify_qp(3), ibv_reg_mr(3), ibv_bind_mw(3), ibv_wr_post(3).
"""

from __future__ import annotations

import contextlib

from aiordma.lanes.choice import Choice
from aiordma.lanes.needs import needs
from aiordma.lanes.outbox import Outbox, Sources
from aiordma.lanes.rdma import RdmaLane
from aiordma.lanes.verbs.api import refused
from aiordma.lanes.verbs.device import Device, describe, names, survey
from aiordma.lanes.verbs.fork import fork_support
from aiordma.lanes.verbs.queue_pair import VerbsQueuePair
from aiordma.ring import Ring
from aiordma.wire.hello import Limits

__all__ = [
    "Device",
    "VerbsQueuePair",
    "describe",
    "fork_support",
    "names",
    "open_lane",
    "refused",
    "survey",
]


def open_lane(
    device: Device, choice: Choice, ring: Ring, peer: Limits
) -> tuple[VerbsQueuePair, RdmaLane]:
    """A lane whose queue pair is not connected yet. Takes over one `Device.open`, unless it raises.

    Raises `LaneRefused`, or `Busy` if the memory budget has no room for what it sends from.
    """
    asked = needs(ring.slots, ring.slot_bytes, peer.slots, peer.slot_bytes)
    stages = Ring(asked.stages, peer.slot_bytes)
    with contextlib.ExitStack() as undo:
        undo.callback(stages.close)
        pair = VerbsQueuePair(device, choice, ring, stages, asked.sends, asked.receives)
        undo.pop_all()
    outbox = Outbox(
        Sources(stages, pair.stage, pair.find, pair.open_window),
        depth=asked.sends,
        peer_slots=peer.slots,
        peer_slot_bytes=peer.slot_bytes,
    )
    lane = RdmaLane(pair, ring, outbox, watch=pair.reservation.watch)
    pair.reservation.attach(pair.number, lane)
    return pair, lane
