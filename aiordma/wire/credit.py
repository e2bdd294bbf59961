"""Flow control as plain arithmetic: the sender's slots of one lane, and windows of counted things.

Life of a slot, seen from the sender that may write to it; any other move raises::

    FREE ──post──▶ POSTED ──credited──▶ FREE
    (a credit)     (a chunk is in it, or on its way)
"""

from __future__ import annotations

import enum

from aiordma.errors import RemoteProtocolError

__all__ = ["GrantWindow", "Lent", "SendWindow", "SlotLedger", "bits"]


class Lent(enum.StrEnum):
    FREE = "free"
    POSTED = "posted"


_MOVES = {
    (Lent.FREE, "post"): Lent.POSTED,
    (Lent.POSTED, "credited"): Lent.FREE,
}


def bits(bitmap: int) -> list[int]:
    """The positions of the set bits, rising."""
    positions = []
    while bitmap:
        lowest = bitmap & -bitmap
        positions.append(lowest.bit_length() - 1)
        bitmap ^= lowest
    return positions


class SlotLedger:
    """Which slots of the peer's ring the sender may write to. Free slots are its credits."""

    def __init__(self, slots: int) -> None:
        self._states = [Lent.FREE] * slots
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """Credits left."""
        return len(self._free)

    def count(self, state: Lent) -> int:
        """How many slots are in this state; the counts of all states add up to the window."""
        return self._states.count(state)

    def post(self) -> int:
        """Spend a credit: a slot that a chunk may go to. There must be one."""
        slot = self._free.pop()
        self._move(slot, "post")
        return slot

    def credited(self, bitmap: int) -> list[int]:
        """The peer gives slots back. One that it does not hold is a protocol error."""
        slots = bits(bitmap)
        for slot in slots:
            if slot >= len(self._states) or self._states[slot] is not Lent.POSTED:
                raise RemoteProtocolError(
                    f"the peer gives back slot {slot}, which it does not hold"
                )
        for slot in slots:
            self._move(slot, "credited")
            self._free.append(slot)
        return slots

    def _move(self, slot: int, verb: str) -> None:
        state = self._states[slot]
        try:
            self._states[slot] = _MOVES[state, verb]
        except KeyError:
            raise RuntimeError(f"slot {slot} is {state.value}: it cannot be {verb}") from None


class SendWindow:
    """How many things, and bytes of them, the peer still accepts. Limits are cumulative (RFC 9000, 4.1):
    granting one twice or late does no harm."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._window = (count, nbytes)
        self._count_limit = count
        self._bytes_limit = nbytes
        # The peer may keep less than a quarter of the window ungranted: more would not fit for sure.
        self.capacity_bytes = nbytes - nbytes // 4
        self._count = 0
        self._bytes = 0

    @property
    def count_limit(self) -> int:
        """How many things the peer allowed since the beginning."""
        return self._count_limit

    def fits(self, nbytes: int) -> bool:
        """Whether one more thing of this size may be sent now."""
        return self._count < self._count_limit and self._bytes + nbytes <= self._bytes_limit

    def spend(self, nbytes: int) -> None:
        """Count one thing as sent."""
        self._count += 1
        self._bytes += nbytes

    def refund(self, nbytes: int) -> None:
        """Take back a `spend` of something that was not sent after all."""
        self._count -= 1
        self._bytes -= nbytes

    def may_grant(self, count_limit: int, bytes_limit: int) -> bool:
        """Whether a peer may set these limits: one window more than what was sent, at most."""
        return (
            count_limit <= self._count + self._window[0]
            and bytes_limit <= self._bytes + self._window[1]
        )

    def grant(self, count_limit: int, bytes_limit: int) -> None:
        """Raise the limits; lower ones than before are old news."""
        self._count_limit = max(self._count_limit, count_limit)
        self._bytes_limit = max(self._bytes_limit, bytes_limit)


class GrantWindow:
    """The receiver's side of a `SendWindow`: what came, what was dealt with, what to grant and when."""

    def __init__(self, count: int, nbytes: int, what: str, *, is_prompt: bool = False) -> None:
        """`is_prompt`: grant at once whatever was gained when the peer has little left. For things that need
        not be dealt with in order: those that stay would else keep the window's last quarter shut for good."""
        self._is_prompt = is_prompt
        self._window = (count, nbytes)
        self._limits = (count, nbytes)
        self._came = (0, 0)
        self._done = (0, 0)
        self._what = what

    @property
    def outstanding(self) -> tuple[int, int]:
        """Things, and bytes of them, that came and are not dealt with."""
        return self._came[0] - self._done[0], self._came[1] - self._done[1]

    @property
    def count_limit(self) -> int:
        """How many things were allowed since the beginning."""
        return self._limits[0]

    def charge(self, nbytes: int) -> None:
        """One more thing came. Beyond the limits it is a protocol error."""
        self._came = (self._came[0] + 1, self._came[1] + nbytes)
        if self._came[0] > self._limits[0] or self._came[1] > self._limits[1]:
            raise RemoteProtocolError(
                f"the peer sent {self._what} number {self._came[0]} ({self._came[1]} bytes in all) beyond "
                f"the window of {self._limits[0]} ({self._limits[1]} bytes)"
            )

    def settle(self, nbytes: int) -> tuple[int, int] | None:
        """One thing is dealt with. New limits to grant, once a quarter of the window would be gained (or as
        `is_prompt` says)."""
        self._done = (self._done[0] + 1, self._done[1] + nbytes)
        limits = (self._done[0] + self._window[0], self._done[1] + self._window[1])
        gained = (limits[0] - self._limits[0], limits[1] - self._limits[1])
        left = (self._limits[0] - self._came[0], self._limits[1] - self._came[1])
        is_low = left[0] * 4 < self._window[0] or left[1] * 4 < self._window[1]
        is_worth_it = gained[0] * 4 >= self._window[0] or gained[1] * 4 >= self._window[1]
        if not (is_worth_it or (self._is_prompt and is_low)):
            return None
        self._limits = limits
        return limits
