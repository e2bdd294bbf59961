"""Receive rings: the slots' table, their memory, and the budget of the process."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

import aiordma
from aiordma.errors import Busy, ConfigError
from aiordma.ring import BUDGET, MemoryBudget, Ring, SlotState, set_memory_budget

LEGAL = {
    ("posted", "arrived"): "filled",
    ("filled", "release"): "released",
    ("released", "credited"): "posted",
}
WAY = ["arrived", "release", "credited"]


def ring(slots: int = 4, slot_bytes: int = 64) -> Ring:
    return Ring(slots, slot_bytes, budget=MemoryBudget(1 << 30))


@pytest.mark.parametrize("verb", [*WAY, "post", ""])
@pytest.mark.parametrize("state", list(SlotState))
def test_moves_are_those_of_the_table(state: SlotState, verb: str) -> None:
    it = ring()
    for step in WAY[: list(SlotState).index(state)]:
        it.move(2, step)
    assert it.state(2) is state
    if (state.value, verb) in LEGAL:
        it.move(2, verb)
        assert it.state(2).value == LEGAL[state.value, verb]
    else:
        with pytest.raises(RuntimeError, match=f"slot 2 is {state.value}: it cannot be {verb}"):
            it.move(2, verb)
        assert it.state(2) is state
    assert [it.state(slot) for slot in (0, 1, 3)] == [SlotState.POSTED] * 3


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(WAY)), max_size=40))
def test_the_states_always_add_up_to_the_window(moves: Any) -> None:
    it = ring(5)
    expected = ["posted"] * 5
    for slot, verb in moves:
        if (expected[slot], verb) in LEGAL:
            it.move(slot, verb)
            expected[slot] = LEGAL[expected[slot], verb]
        else:
            with pytest.raises(RuntimeError):
                it.move(slot, verb)
        assert [it.state(s).value for s in range(5)] == expected
        assert sum(it.count(state) for state in SlotState) == 5


def test_an_unknown_slot() -> None:
    with pytest.raises(IndexError):
        ring().state(4)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 128), st.integers(0, 255)), max_size=20)
)
def test_slots_share_no_byte(writes: Any) -> None:
    it = ring(5, 128)
    expected = [bytearray(128) for _ in range(5)]
    for slot, nbytes, value in writes:
        view = it.view(slot, nbytes)
        assert view.nbytes == nbytes
        view[:] = bytes([value]) * nbytes
        expected[slot][:nbytes] = bytes([value]) * nbytes
    assert [bytes(it.view(slot, 128)) for slot in range(5)] == [bytes(e) for e in expected]


# The budget


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.integers(4, 40), st.sampled_from([64, 128, 640])), max_size=30),
    st.randoms(use_true_random=False),
)
def test_rings_get_a_fair_share_and_never_too_much(total: Any, wanted: Any, random: Any) -> None:
    budget = MemoryBudget(total)
    rings: list[Ring] = []
    for slots, slot_bytes in wanted:
        if rings and random.random() < 0.4:
            rings.pop(random.randrange(len(rings))).close()
        left = total - sum(r.slots * r.slot_bytes for r in rings)
        share = min(slots, max(4, left // 4 // slot_bytes))
        if share * slot_bytes <= left:
            rings.append(Ring(slots, slot_bytes, budget=budget))
            assert rings[-1].slots == share
        else:
            with pytest.raises(Busy):
                Ring(slots, slot_bytes, budget=budget)
        assert budget.used_bytes == sum(r.slots * r.slot_bytes for r in rings) <= total
    for it in rings:
        it.close()
        it.close()
    assert budget.used_bytes == 0


def test_early_rings_leave_room_for_later_ones() -> None:
    budget = MemoryBudget(64 * 100)
    assert [budget.reserve(50, 64) for _ in range(8)] == [25, 18, 14, 10, 8, 6, 4, 4]


def test_busy_says_what_is_left_and_what_to_do() -> None:
    budget = MemoryBudget(1000)
    budget.reserve(4, 192)
    with pytest.raises(Busy) as caught:
        budget.reserve(8, 64)
    assert str(caught.value) == (
        "the memory budget of 1000 bytes has 232 left, and a ring needs 4 slots of 64: close channels, "
        "lower slot_bytes or lanes, or raise it with aiordma.set_memory_budget()"
    )
    assert budget.used_bytes == 768


def test_the_last_byte_can_be_had() -> None:
    budget = MemoryBudget(4 * 64)
    assert budget.reserve(4, 64) == 4
    with pytest.raises(Busy):
        budget.reserve(4, 64)


def test_closing_gives_the_budget_back_once() -> None:
    budget = MemoryBudget(1 << 20)
    it, other = Ring(4, 64, budget=budget), Ring(4, 64, budget=budget)
    it.close()
    it.close()
    del it
    gc.collect()
    assert budget.used_bytes == other.slots * 64


def test_a_forgotten_ring_gives_the_budget_back() -> None:
    budget = MemoryBudget(1 << 20)
    it = Ring(4, 64, budget=budget)
    assert budget.used_bytes == 256
    del it
    gc.collect()
    assert budget.used_bytes == 0


def test_a_ring_that_cannot_be_mapped_gives_the_budget_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    budget = MemoryBudget(1 << 20)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Ring(4, 64, budget=budget)
    gc.collect()
    assert budget.used_bytes == 0


def test_a_borrowed_view_outlives_the_ring() -> None:
    it = ring()
    view = it.view(1, 64)
    view[:] = bytes(range(64))
    it.close()
    del it
    gc.collect()
    assert bytes(view) == bytes(range(64))


def test_the_sum_is_read_and_written_under_the_lock_alone() -> None:
    class Watched(int):
        def __add__(self, other: int) -> Watched:
            assert budget._lock.locked()
            return Watched(int(self) + other)

        def __sub__(self, other: int) -> Watched:
            assert budget._lock.locked()
            return Watched(int(self) - other)

    budget = MemoryBudget(Watched(1000))
    budget._used_bytes = Watched(0)
    granted = budget.reserve(8, 64)
    budget.give_back(granted * 64)
    assert isinstance(budget._used_bytes, Watched)
    assert budget.used_bytes == 0


@pytest.fixture
def budget_restored() -> Iterator[None]:
    before = BUDGET.total_bytes
    yield
    BUDGET.total_bytes = before


@pytest.mark.usefixtures("budget_restored")
def test_the_budget_of_the_process_can_be_set() -> None:
    gc.collect()
    before = BUDGET.used_bytes
    it = Ring(4, 64)
    assert BUDGET.used_bytes == before + 256
    set_memory_budget(before + 256)
    with pytest.raises(Busy, match="has 0 left"):
        Ring(4, 64)
    set_memory_budget(1)  # less than what lives: rings stay, new ones wait
    with pytest.raises(Busy):
        Ring(4, 64)
    it.close()
    set_memory_budget(before + 256)
    Ring(4, 64).close()
    assert BUDGET.used_bytes == before


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_budget_is_positive(nbytes: int) -> None:
    with pytest.raises(ConfigError, match=f"must be positive, not {nbytes}"):
        aiordma.set_memory_budget(nbytes)
