"""Flow control: no slot is lost or lent twice, no window is passed, and nobody waits for ever."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from aiordma.errors import RemoteProtocolError
from aiordma.ring import MemoryBudget, Ring, SlotState
from aiordma.wire.credit import GrantWindow, Lent, SendWindow, SlotLedger, bits

picks = st.integers(0, 1 << 16)


@given(st.sets(st.integers(0, 300)))
def test_bits_are_the_positions_of_a_bitmap(positions: Any) -> None:
    assert bits(sum(1 << p for p in positions)) == sorted(positions)


class Slots(RuleBasedStateMachine):
    """A sender's ledger and the receiver's ring, with chunks and CREDITs on their way between them."""

    @initialize(slots=st.integers(4, 9))
    def begin(self, slots: int) -> None:
        self.window = slots
        self.ledger = SlotLedger(slots)
        self.ring = Ring(slots, 64, budget=MemoryBudget(1 << 20))
        self.chunks: list[int] = []
        self.filled: list[int] = []
        self.released: list[int] = []
        self.credits: deque[int] = deque()

    @precondition(lambda self: self.ledger.free)
    @rule()
    def post(self) -> None:
        slot = self.ledger.post()
        assert slot not in self.chunks
        assert self.ring.state(slot) is SlotState.POSTED
        self.chunks.append(slot)

    @precondition(lambda self: self.chunks)
    @rule(pick=picks)
    def arrive(self, pick: int) -> None:
        slot = self.chunks.pop(pick % len(self.chunks))
        self.ring.move(slot, "arrived")
        self.filled.append(slot)

    @precondition(lambda self: self.filled)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        slot = self.filled.pop(pick % len(self.filled))
        self.ring.move(slot, "release")
        self.released.append(slot)

    @precondition(lambda self: self.released)
    @rule(pick=picks)
    def credit(self, pick: int) -> None:
        n = pick % len(self.released) + 1
        named, self.released = self.released[:n], self.released[n:]
        for slot in named:
            self.ring.move(slot, "credited")
        self.credits.append(sum(1 << slot for slot in named))

    @precondition(lambda self: self.credits)
    @rule()
    def credited(self) -> None:
        bitmap = self.credits.popleft()
        assert self.ledger.credited(bitmap) == bits(bitmap)

    @rule(pick=picks, others=st.integers(0, 1 << 9))
    def a_credit_of_what_is_not_held_changes_nothing(self, pick: int, others: int) -> None:
        foreign = [s for s in range(self.window + 4) if s not in self._lent()]
        before = self.ledger.free
        with pytest.raises(
            RemoteProtocolError, match=r"gives back slot \d+, which it does not hold"
        ):
            self.ledger.credited(others | 1 << foreign[pick % len(foreign)])
        assert self.ledger.free == before

    def _lent(self) -> list[int]:
        on_their_way_back = [slot for bitmap in self.credits for slot in bits(bitmap)]
        return [*self.chunks, *self.filled, *self.released, *on_their_way_back]

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.free == self.ledger.count(Lent.FREE)
        assert self.ledger.free + self.ledger.count(Lent.POSTED) == self.window
        assert sorted({*self._lent()}) == sorted(self._lent())
        assert self.ledger.count(Lent.POSTED) == len(self._lent())
        assert sum(self.ring.count(state) for state in SlotState) == self.window
        assert self.ring.count(SlotState.FILLED) == len(self.filled)
        assert self.ring.count(SlotState.RELEASED) == len(self.released)


TestSlots = Slots.TestCase


def test_a_slot_cannot_be_credited_twice() -> None:
    ledger = SlotLedger(4)
    slot = ledger.post()
    ledger.credited(1 << slot)
    with pytest.raises(RemoteProtocolError, match=f"slot {slot}, which it does not hold"):
        ledger.credited(1 << slot)


def test_a_post_without_a_credit_is_a_bug_here() -> None:
    ledger = SlotLedger(4)
    assert sorted(ledger.post() for _ in range(4)) == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        ledger.post()


class Windows(RuleBasedStateMachine):
    """Counted things on their way one way, grants on their way back, each late, twice or out of order."""

    @initialize(count=st.integers(1, 9), nbytes=st.integers(4, 99))
    def begin(self, count: int, nbytes: int) -> None:
        self.window = (count, nbytes)
        self.sender = SendWindow(count, nbytes)
        self.receiver = GrantWindow(count, nbytes, "message")
        self.on_their_way: deque[int] = deque()
        self.here: list[int] = []
        self.grants: list[tuple[int, int]] = []
        self.granted = (count, nbytes)

    @rule(share=st.floats(0, 1))
    def send(self, share: float) -> None:
        nbytes = int(share * self.sender.capacity_bytes)
        if self.sender.fits(nbytes):
            self.sender.spend(nbytes)
            self.on_their_way.append(nbytes)

    @rule(nbytes=st.integers(0, 99))
    def spend_and_take_back(self, nbytes: int) -> None:
        if self.sender.fits(nbytes):
            self.sender.spend(nbytes)
            self.sender.refund(nbytes)

    @precondition(lambda self: self.on_their_way)
    @rule()
    def come(self) -> None:
        nbytes = self.on_their_way.popleft()
        self.receiver.charge(nbytes)
        self.here.append(nbytes)

    @precondition(lambda self: self.here)
    @rule(pick=picks)
    def take(self, pick: int) -> None:
        limits = self.receiver.settle(self.here.pop(pick % len(self.here)))
        if limits is not None:
            gained = [new - old for new, old in zip(limits, self.granted, strict=True)]
            assert min(gained) >= 0
            assert any(g * 4 >= w for g, w in zip(gained, self.window, strict=True))
            self.granted = limits
            self.grants.append(limits)
            assert self.receiver.count_limit == limits[0]

    @precondition(lambda self: self.grants)
    @rule(pick=picks)
    def grant(self, pick: int) -> None:
        self.sender.grant(*self.grants[pick % len(self.grants)])

    @rule()
    def settle_everything(self) -> None:
        while self.on_their_way:
            self.come()
        while self.here:
            self.take(0)
        for limits in reversed(self.grants):
            self.sender.grant(*limits)
        assert self.sender.count_limit == self.granted[0]
        assert self.sender.fits(self.sender.capacity_bytes), "the largest would wait for ever"

    @invariant()
    def never_beyond_the_window(self) -> None:
        if not hasattr(self, "sender"):
            return
        pending = [*self.on_their_way, *self.here]
        assert len(pending) <= self.window[0]
        assert sum(pending) <= self.window[1]
        assert self.receiver.outstanding == (len(self.here), sum(self.here))


TestWindows = Windows.TestCase


@pytest.mark.parametrize("sizes", [[0] * 4, [101], [50, 51], [100, 1]])
def test_more_than_was_granted_is_an_error(sizes: list[int]) -> None:
    window = GrantWindow(3, 100, "OPEN")
    for nbytes in sizes[:-1]:
        window.charge(nbytes)
    with pytest.raises(
        RemoteProtocolError, match=f"OPEN number {len(sizes)} .* beyond the window of 3"
    ):
        window.charge(sizes[-1])


def test_a_window_fits_exactly_what_was_granted() -> None:
    window = SendWindow(2, 100)
    assert window.fits(100)
    assert not window.fits(101)
    window.spend(100)
    assert window.fits(0)
    assert not window.fits(1)
    window.spend(0)
    assert not window.fits(0)
    window.grant(2, 1000)
    assert not window.fits(0)
    window.grant(3, 0)
    assert window.fits(900)
    window.grant(1, 1)
    assert window.fits(900)
    assert window.count_limit == 3


def test_grants_come_a_quarter_at_a_time() -> None:
    window = GrantWindow(8, 8000, "message")
    grants = []
    for _ in range(8):
        window.charge(1)
        grants.append(window.settle(1))
    assert grants == [None, (10, 8002), None, (12, 8004), None, (14, 8006), None, (16, 8008)]
    window.charge(2000)
    assert window.settle(2000) == (17, 10008)
