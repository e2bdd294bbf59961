"""The sender's half: which chunk of which transfer goes next, into which slot of the peer.

A transfer's chunks flow when the receiver has claimed it. Until then it may send one, and all unclaimed
transfers together hold at most a quarter of the slots. Claimed transfers take turns, and share the other
three quarters: each takes at most its share, but may always hold two. So a transfer that nobody asks for
never keeps the others from moving, and one whose consumer is slow keeps no more slots than were its share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from aiordma.errors import RemoteProtocolError
from aiordma.wire.credit import SlotLedger


class Plan(NamedTuple):
    """One chunk to send: a range of a transfer's data, and the slot that it may occupy."""

    transfer: int
    offset: int
    length: int
    slot: int


class Sending(msgspec.Struct, eq=False):
    """One transfer that is being sent."""

    id: int
    total_bytes: int
    chunk_bytes: int
    is_claimed: bool
    next_offset: int = 0
    held: int = 0
    """Slots of the peer that its chunks occupy, or are on their way to."""

    @property
    def is_sent(self) -> bool:
        """Whether the last chunk was handed to a lane."""
        return self.next_offset >= self.total_bytes


class Sender:
    """All transfers of one direction, and the credits of all lanes."""

    def __init__(self, slots: Sequence[int]) -> None:
        """`slots`: the size of the peer's ring, for each lane."""
        self.ledgers = [SlotLedger(n) for n in slots]
        self._window = sum(slots)
        self._owners: list[dict[int, Sending]] = [{} for _ in slots]
        self._live: dict[int, Sending] = {}
        self._turns: deque[Sending] = deque()
        self._unclaimed: deque[Sending] = deque()
        self._unclaimed_held = 0
        self._claimed_ahead: set[int] = set()
        self._last = 0

    @property
    def has_waiting(self) -> bool:
        """Whether a claimed transfer has chunks left."""
        return bool(self._turns)

    def open(self, total_bytes: int, chunk_bytes: int) -> int:
        """A new transfer; its id is one more than the last one's."""
        self._last += 1
        is_claimed = self._last in self._claimed_ahead
        self._claimed_ahead.discard(self._last)
        sending = Sending(self._last, total_bytes, chunk_bytes, is_claimed)
        self._live[self._last] = sending
        if not sending.is_sent:
            (self._turns if is_claimed else self._unclaimed).append(sending)
        return self._last

    def claim(self, transfer: int, count_limit: int) -> None:
        """The receiver claims a transfer, perhaps one that is not open yet (up to the OPEN window's limit)."""
        if transfer > self._last:
            if transfer > count_limit:
                raise RemoteProtocolError(
                    f"the peer claims transfer {transfer}; it allowed {count_limit} so far"
                )
            self._claimed_ahead.add(transfer)
            return
        sending = self._live.get(transfer)
        if sending is None or sending.is_claimed:
            return
        sending.is_claimed = True
        self._unclaimed_held -= sending.held
        if sending in self._unclaimed:
            self._unclaimed.remove(sending)
        if not sending.is_sent:
            self._turns.append(sending)

    def unclaim(self, transfer: int) -> None:
        """The receiver takes its claim back."""
        self._claimed_ahead.discard(transfer)
        sending = self._live.get(transfer)
        if sending is None or not sending.is_claimed:
            return
        sending.is_claimed = False
        self._unclaimed_held += sending.held
        if sending in self._turns:
            self._turns.remove(sending)
        if not sending.next_offset and not sending.is_sent:
            self._unclaimed.append(sending)

    def acknowledged(self, transfer: int) -> bool:
        """The peer has every chunk. False if the transfer is over already."""
        if self.is_over(transfer):
            return False
        sending = self._live.get(transfer)
        if sending is None:
            raise RemoteProtocolError(
                f"the peer acknowledges transfer {transfer}, which was never opened"
            )
        if not sending.is_sent:
            raise RemoteProtocolError(
                f"the peer acknowledges transfer {transfer} at {sending.next_offset} of {sending.total_bytes} bytes"
            )
        self.finish(transfer)
        return True

    def is_over(self, transfer: int) -> bool:
        """Whether the transfer was opened, and is acknowledged or given up."""
        return 0 < transfer <= self._last and transfer not in self._live

    def is_claimed(self, transfer: int) -> bool:
        """Whether the peer wants it, and has not acknowledged it yet."""
        sending = self._live.get(transfer)
        return sending is not None and sending.is_claimed

    def finish(self, transfer: int) -> None:
        """Submit nothing more of this transfer. Its slots come back with their credits."""
        sending = self._live.pop(transfer, None)
        if sending is None:
            return
        for queue in (self._turns, self._unclaimed):
            if sending in queue:
                queue.remove(sending)

    def next(self, lane: int) -> Plan | None:
        """Spend one of the lane's credits on the next chunk; None when nothing may be sent on it now."""
        if not self.ledgers[lane].free:
            return None
        if self._turns:
            share = max(2, (self._window - self._window // 4) // len(self._turns))
            for _ in range(len(self._turns)):
                sending = self._turns[0]
                if sending.held < share:
                    plan = self._spend(lane, sending)
                    if sending.is_sent:
                        self._turns.popleft()
                    else:
                        self._turns.rotate(-1)
                    return plan
                self._turns.rotate(-1)
        if self._unclaimed and self._unclaimed_held < self._window // 4:
            self._unclaimed_held += 1
            return self._spend(lane, self._unclaimed.popleft())
        return None

    def credited(self, lane: int, bitmap: int) -> list[int]:
        """The peer gives slots of this lane back; the ids of the transfers whose chunks were in them."""
        transfers = []
        for slot in self.ledgers[lane].credited(bitmap):
            sending = self._owners[lane].pop(slot)
            sending.held -= 1
            if not sending.is_claimed:
                self._unclaimed_held -= 1
            transfers.append(sending.id)
        return transfers

    def _spend(self, lane: int, sending: Sending) -> Plan:
        slot = self.ledgers[lane].post()
        self._owners[lane][slot] = sending
        sending.held += 1
        offset = sending.next_offset
        length = min(sending.chunk_bytes, sending.total_bytes - offset)
        sending.next_offset = offset + length
        return Plan(sending.id, offset, length, slot)
