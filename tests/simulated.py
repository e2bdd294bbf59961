"""Two sessions joined by a simulated network, and the promises that must hold at every moment.

Control bytes arrive in order, in pieces of any size and as late as one likes; each lane delivers in order,
independent of control and of the other lanes. Receive slots are real rings with real bytes. `End` does
with its session what `aiordma.link` and `aiordma.port` do, one step at a time, and keeps books of its own.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from aiordma.ring import MemoryBudget, Ring, SlotState
from aiordma.wire import control, manifest as manifests
from aiordma.wire.credit import Lent, bits
from aiordma.wire.frames import ChunkHeader
from aiordma.wire.hello import Limits
from aiordma.wire.receiving import Incoming, Verdict
from aiordma.wire.session import Event, Refused, Session, open_cost

CHUNK_BYTES = 64


@dataclass(eq=False)
class Sent:
    """One transfer in the books of the end that sends it."""

    data: bytes
    is_sound: bool
    is_live: bool = True
    is_claimed: bool = False
    was_claimed: bool = False
    is_acked: bool = False
    is_aborted: bool = False
    offset: int = 0

    @property
    def has_chunks(self) -> bool:
        return self.is_live and self.offset < len(self.data)


@dataclass(eq=False)
class Received:
    """One transfer in the books of the end that receives it."""

    incoming: Incoming
    data: bytearray
    missing: int
    held: list[tuple[int, ChunkHeader]] = field(default_factory=list)


def limits(slots: int, opens: int = 3) -> Limits:
    return Limits(slots, CHUNK_BYTES, 3, 100, opens, 120)


def session(ours: Limits, peers: Limits, lanes: int) -> Session:
    return Session(ours, peers, lanes=lanes, max_tensors=10, max_transfer_bytes=1 << 20)


class End:
    """One session with its rings, and everything that is on its way from it to its peer."""

    peer: End

    def __init__(self, ours: Limits, peers: Limits, lanes: int) -> None:
        self.session = session(ours, peers, lanes)
        self.limits = ours
        self.window = peers.slots * lanes
        budget = MemoryBudget(1 << 20)
        self.rings = [Ring(ours.slots, CHUNK_BYTES, budget=budget) for _ in range(lanes)]
        self.control_out = bytearray()
        self.lanes_out: list[deque[tuple[ChunkHeader, bytes] | int]] = [
            deque() for _ in range(lanes)
        ]
        self.sent: dict[int, Sent] = {}
        self.ahead: set[int] = set()
        self.owners: dict[tuple[int, int], int] = {}
        self.received: dict[int, Received] = {}
        self.early: dict[int, list[tuple[int, ChunkHeader]]] = {}
        self.landings: dict[int, tuple[ChunkHeader, Incoming | Verdict]] = {}
        self.released = [0] * lanes
        self.messages: deque[bytes] = deque()

    # Sending

    def open(self, nbytes: int, *, is_sound: bool) -> None:
        """Open a transfer of `nbytes` random bytes, if the window has room for it."""
        manifest = manifests.encode(manifests.lay_out([("t", "U8", (nbytes,), None)]))
        if not is_sound:
            manifest = manifest[:-1]
        cost = open_cost(manifest, b"")
        if self.session.opens_out.fits(cost):
            self.session.opens_out.spend(cost)
            transfer = self.session.open(manifest, b"", nbytes)
            assert transfer == len(self.sent) + 1
            sent = Sent(random.Random(transfer).randbytes(nbytes), is_sound)
            sent.is_claimed = sent.was_claimed = transfer in self.ahead
            self.ahead.discard(transfer)
            self.sent[transfer] = sent

    def abort_sending(self, pick: int) -> None:
        """Abort any transfer that was opened; of one that is over, this must not hurt."""
        if self.sent:
            transfer = pick % len(self.sent) + 1
            self.session.abort_sending(transfer, None, "changed my mind")
            self.sent[transfer].is_live = False
            self.sent[transfer].is_aborted = True

    def fill(self, lane: int, count: int = 1 << 16) -> bool:
        """Post up to `count` chunks on the lane, each as the documented policy has it."""
        moved = False
        while count and self._post(lane):
            moved, count = True, count - 1
        return moved

    def _post(self, lane: int) -> bool:
        held = dict.fromkeys(self.sent, 0)
        for transfer in self.owners.values():
            held[transfer] += 1
        turns = [t for t, sent in self.sent.items() if sent.has_chunks and sent.is_claimed]
        share = max(2, (self.window - self.window // 4) // max(1, len(turns)))
        eager = [
            t
            for t, sent in self.sent.items()
            if sent.has_chunks and not sent.is_claimed and not sent.offset
        ]
        if sum(held[t] for t, s in self.sent.items() if not s.is_claimed) >= self.window // 4:
            eager = []
        allowed = [t for t in turns if held[t] < share] or eager
        plan = self.session.sender.next(lane)
        if not allowed or not self.session.sender.ledgers[lane].count(Lent.FREE) + bool(plan):
            assert plan is None, f"{plan} is against the policy"
            return False
        assert plan is not None, f"{allowed} could go"
        assert plan.transfer in allowed
        assert (lane, plan.slot) not in self.owners
        sent = self.sent[plan.transfer]
        assert plan.offset == sent.offset
        assert plan.length == min(CHUNK_BYTES, len(sent.data) - plan.offset)
        sent.offset += plan.length
        self.owners[lane, plan.slot] = plan.transfer
        header = ChunkHeader(plan.slot, plan.length, plan.transfer, plan.offset, None)
        self.lanes_out[lane].append((header, sent.data[plan.offset : sent.offset]))
        return True

    def message(self, nbytes: int) -> None:
        """Send a message, if the window has room for it."""
        if self.session.messages_out.fits(nbytes):
            self.session.messages_out.spend(nbytes)
            self.session.message(bytes(nbytes))

    # Receiving

    def pick(self, pick: int) -> Received | None:
        """One of the transfers that are being received."""
        received = list(self.received.values())
        return received[pick % len(received)] if received else None

    def claim(self, pick: int) -> None:
        received = self.pick(pick)
        if received is not None:
            self.session.claim(received.incoming.id)

    def unclaim(self, pick: int) -> None:
        """Take a claim back; what came of it so far makes room for others."""
        received = self.pick(pick)
        if received is not None:
            self.session.unclaim(received.incoming.id)
            if received.incoming.was_claimed:
                self._release_all(received)

    def refuse(self, pick: int) -> None:
        received = self.pick(pick)
        if received is not None:
            self.session.abort_receiving(received.incoming, None, "no")
            self._drop(received)

    def release(self, pick: int) -> bool:
        """Release a chunk of a claimed transfer, whichever; its bytes must be what was sent until then."""
        choices = [
            (received, i)
            for received in self.received.values()
            if received.incoming.is_claimed
            for i in range(len(received.held))
        ]
        if not choices:
            return False
        received, i = choices[pick % len(choices)]
        self._release(received, *received.held.pop(i))
        return True

    def done(self, pick: int) -> bool:
        """Consume a transfer of which every chunk came and was released."""
        ready = [
            received
            for received in self.received.values()
            if received.incoming.is_complete and not received.held and received.incoming.is_claimed
        ]
        if not ready:
            return False
        received = ready[pick % len(ready)]
        incoming = received.incoming
        assert not received.missing
        assert bytes(received.data) == self.peer.sent[incoming.id].data
        self.session.done(incoming)
        del self.received[incoming.id]
        return True

    def give_credit(self, lane: int, pick: int = -1) -> bool:
        """Name some released slots in a CREDIT."""
        slots = self.released[lane] & pick or self.released[lane]
        self.released[lane] ^= slots
        for slot in bits(slots):
            self.rings[lane].move(slot, "credited")
        if slots:
            self.lanes_out[lane].append(slots)
        return bool(slots)

    def take_message(self) -> bool:
        if not self.messages:
            return False
        self.session.message_taken(len(self.messages.popleft()))
        return True

    # What the network brings

    def deliver_control(self, nbytes: int = 1 << 16) -> bool:
        """Bring the peer the next bytes of the control connection."""
        self.control_out += self.session.data_to_send()
        data = bytes(self.control_out[:nbytes])
        del self.control_out[:nbytes]
        for event in self.peer.session.receive(data):
            self.peer.handle(event)
        return bool(data)

    def begin_lane(self, lane: int) -> None:
        """The header of the lane's next chunk reaches the peer, and its payload is still on its way."""
        if self.lanes_out[lane] and lane not in self.peer.landings:
            item = self.lanes_out[lane][0]
            if not isinstance(item, int):
                verdict = self.peer.session.receiver.admit(item[0])
                self.peer.landings[lane] = (item[0], verdict)

    def deliver_lane(self, lane: int) -> bool:
        """Bring the peer what comes next on the lane."""
        if not self.lanes_out[lane]:
            return False
        self.begin_lane(lane)
        item = self.lanes_out[lane].popleft()
        if isinstance(item, int):
            self.peer.credited(lane, item)
        else:
            self.peer.arrived(lane, *item, self.peer.landings.pop(lane)[1])
        return True

    def credited(self, lane: int, slots: int) -> None:
        transfers = self.session.sender.credited(lane, slots)
        assert transfers == [self.owners.pop((lane, slot)) for slot in bits(slots)]

    def arrived(
        self, lane: int, header: ChunkHeader, payload: bytes, verdict: Incoming | Verdict
    ) -> None:
        self.rings[lane].move(header.slot, "arrived")
        self.rings[lane].view(header.slot, header.length)[:] = payload
        if verdict is Verdict.EARLY:
            if header.transfer > self.session.receiver.last:
                self.early.setdefault(header.transfer, []).append((lane, header))
                return
            verdict = self.session.receiver.admit(header)
        self._keep(lane, header, verdict)

    def _keep(self, lane: int, header: ChunkHeader, verdict: Incoming | Verdict) -> None:
        received = self.received.get(header.transfer)
        if received is None or received.incoming is not verdict:
            assert received is None, "a chunk of a transfer that is being received is discarded"
            self._free(lane, header.slot)
            return
        incoming = received.incoming
        self.session.chunk_came(incoming, header.length)
        received.held.append((lane, header))
        if incoming.was_claimed and not incoming.is_claimed:
            self._release_all(received)

    def handle(self, event: Event) -> None:
        match event:
            case Incoming():
                assert self.peer.sent[event.id].is_sound
                total = event.manifest.total_bytes
                self.received[event.id] = Received(event, bytearray(total), total)
                for lane, header in self.early.pop(event.id, ()):
                    self._keep(lane, header, self.session.receiver.admit(header))
            case Refused():
                assert not self.peer.sent[event.transfer].is_sound
                for lane, header in self.early.pop(event.transfer, ()):
                    self._free(lane, header.slot)
            case control.Claim():
                self._claimed(event.transfer)
            case control.Unclaim():
                self.ahead.discard(event.transfer)
                if event.transfer in self.sent and self.sent[event.transfer].is_live:
                    self.sent[event.transfer].is_claimed = False
            case control.Acked():
                sent = self.sent[event.transfer]
                assert sent.is_live
                assert not sent.has_chunks
                sent.is_acked, sent.is_live = True, False
            case control.Done():
                sent = self.sent[event.transfer]
                assert sent.is_acked or sent.is_aborted
            case control.Abort(by_sender=True):
                self._drop(self.received[event.transfer])
            case control.Abort():
                sent = self.sent[event.transfer]
                assert (event.cause == "manifest") != sent.is_sound
                sent.is_live = False
            case control.Message():
                self.messages.append(event.payload)

    def _claimed(self, transfer: int) -> None:
        if transfer > len(self.sent):
            self.ahead.add(transfer)
        elif self.sent[transfer].is_live:
            self.sent[transfer].is_claimed = self.sent[transfer].was_claimed = True

    def _drop(self, received: Received) -> None:
        del self.received[received.incoming.id]
        for lane, header in received.held:
            self._free(lane, header.slot)

    def _release_all(self, received: Received) -> None:
        while received.held:
            self._release(received, *received.held.pop())

    def _release(self, received: Received, lane: int, header: ChunkHeader) -> None:
        end = header.offset + header.length
        view = self.rings[lane].view(header.slot, header.length)
        assert view == self.peer.sent[header.transfer].data[header.offset : end]
        received.data[header.offset : end] = view
        received.missing -= header.length
        self._free(lane, header.slot)

    def _free(self, lane: int, slot: int) -> None:
        self.rings[lane].move(slot, "release")
        self.released[lane] |= 1 << slot

    # What must hold

    def check(self) -> None:
        """Hold this end's promises against the books of both."""
        sender = self.session.sender
        for lane, ledger in enumerate(sender.ledgers):
            ring, there = self.rings[lane], self.peer
            assert sum(ring.count(state) for state in SlotState) == self.limits.slots
            lent = {slot for at, slot in self.owners if at == lane}
            assert ledger.free + len(lent) == there.limits.slots
            assert ledger.count(Lent.POSTED) == len(lent)
            flying = [item[0].slot for item in self.lanes_out[lane] if not isinstance(item, int)]
            back = [
                s for item in there.lanes_out[lane] if isinstance(item, int) for s in bits(item)
            ]
            posted = {
                s
                for s in range(there.limits.slots)
                if there.rings[lane].state(s) is SlotState.POSTED
            }
            assert len(flying) + len(back) + there.limits.slots - len(posted) == len(lent)
            assert {*flying, *back} == posted & lent
        never = [t for t in self.owners.values() if not self.sent[t].was_claimed]
        assert len(never) <= self.window // 4, "unclaimed transfers hold too much"
        assert len({*never}) == len(never), "an unclaimed transfer sent two chunks"
        assert len(self.received) <= self.limits.open_transfers
        assert self.session.unread_messages == (len(self.messages), sum(map(len, self.messages)))
        assert len(self.messages) <= self.limits.messages
        assert sum(map(len, self.messages)) <= self.limits.message_bytes

    def check_empty(self) -> None:
        """Everything is over: nothing is kept for it."""
        sender, receiver = self.session.sender, self.session.receiver
        assert not sender._live
        assert not sender._turns
        assert not sender._unclaimed
        assert not any(sender._owners)
        assert sender._unclaimed_held == 0
        assert not sender._claimed_ahead
        assert not receiver._live
        assert not receiver._early
        assert not any(receiver._ahead.values())
        assert all(receiver.last < transfer for transfer in receiver._ahead)
        assert not self.early
        assert self.session._opens_in.outstanding == (0, 0)
        assert self.session.kept_frames < 32
        for window in (self.session.opens_out, self.session.messages_out):
            assert window.fits(window.capacity_bytes)
