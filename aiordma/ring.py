"""Rings: who owns which bytes now, and how much of them one process may hold.

A ring is one anonymous mapping: cells, for headers that a device writes, then equal slots. Pages are touched only
when a chunk lands in them, so a ring that is never used costs address space and no memory.

Life of a slot, seen from the receiver; any other move raises::

    POSTED ──arrived──▶ FILLED ──release──▶ RELEASED ──credited──▶ POSTED
    (the sender's)      (the consumer's)    (ours, until a CREDIT names it)
"""

from __future__ import annotations

import enum
import mmap
import threading
import weakref
from typing import Final

from aiordma.config import MAX_SLOTS, MIN_SLOTS
from aiordma.errors import Busy, ConfigError

__all__ = [
    "BUDGET",
    "CELLS",
    "CREDIT_CELLS",
    "WINDOW_CELLS",
    "MemoryBudget",
    "Ring",
    "SlotState",
    "set_memory_budget",
    "slot_offset",
]

CREDIT_CELLS: Final = MAX_SLOTS
"""The first cells are for the chunks of the largest ring, from here on as many for CREDITs..."""
WINDOW_CELLS: Final = 2 * MAX_SLOTS
"""...and the last for windows."""
CELLS: Final = WINDOW_CELLS + 64
_CELL_BYTES: Final = 64


def slot_offset(slot: int, slot_bytes: int) -> int:
    """Where a slot begins in a ring. Cell c begins at 64 c."""
    return CELLS * _CELL_BYTES + slot * slot_bytes


class SlotState(enum.StrEnum):
    POSTED = "posted"
    FILLED = "filled"
    RELEASED = "released"


_MOVES = {
    (SlotState.POSTED, "arrived"): SlotState.FILLED,
    (SlotState.FILLED, "release"): SlotState.RELEASED,
    (SlotState.RELEASED, "credited"): SlotState.POSTED,
}


class MemoryBudget:
    """How many bytes of rings this process may hold; thread-safe, since loops may run in threads."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes reserved by rings that live now."""
        return self._used_bytes

    def reserve(self, slots: int, slot_bytes: int) -> int:
        """Reserve a ring; how many of the `slots` wanted are granted.

        A ring takes at most a quarter of what is left, so that early channels leave room for later ones,
        but no fewer than 4 slots: when not even these are left, raises `Busy`.
        """
        with self._lock:
            left = self.total_bytes - self._used_bytes
            granted = min(slots, max(MIN_SLOTS, left // 4 // slot_bytes))
            if granted * slot_bytes > left:
                raise Busy(
                    f"the memory budget of {self.total_bytes} bytes has {left} left, and a ring needs "
                    f"{MIN_SLOTS} slots of {slot_bytes}: close channels, lower slot_bytes or lanes, or "
                    "raise it with aiordma.set_memory_budget()"
                )
            self._used_bytes += granted * slot_bytes
            return granted

    def give_back(self, nbytes: int) -> None:
        """Return what `reserve` granted."""
        with self._lock:
            self._used_bytes -= nbytes


BUDGET = MemoryBudget(1 << 30)
"""The budget of this process."""


def set_memory_budget(total_bytes: int) -> None:
    """Set how many bytes of rings this process may hold (default 1 GiB).

    Rings that exist keep their size; only later channels are affected.
    """
    if total_bytes <= 0:
        raise ConfigError(f"the memory budget must be positive, not {total_bytes}")
    BUDGET.total_bytes = total_bytes


class Ring:
    """The receive slots of one lane, or the slots that an RDMA lane sends from."""

    def __init__(self, slots: int, slot_bytes: int, *, budget: MemoryBudget = BUDGET) -> None:
        """Reserve and map up to `slots` slots of `slot_bytes`; see `MemoryBudget.reserve`."""
        self.slot_bytes = slot_bytes
        self.slots = budget.reserve(slots, slot_bytes)
        self._free_budget = weakref.finalize(self, budget.give_back, self.nbytes)
        self._memory = memoryview(mmap.mmap(-1, slot_offset(self.slots, slot_bytes)))
        self._states = [SlotState.POSTED] * self.slots

    @property
    def nbytes(self) -> int:
        """All slots together."""
        return self.slots * self.slot_bytes

    def state(self, slot: int) -> SlotState:
        """Who owns the slot now. An unknown slot raises `IndexError`."""
        return self._states[slot]

    def move(self, slot: int, verb: str) -> None:
        """Make a move of the table above. An illegal one is a bug in this library."""
        state = self._states[slot]
        try:
            self._states[slot] = _MOVES[state, verb]
        except KeyError:
            raise RuntimeError(f"slot {slot} is {state.value}: it cannot be {verb}") from None

    def count(self, state: SlotState) -> int:
        """How many slots are in this state."""
        return self._states.count(state)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """The first `nbytes` of the slot's memory, writable."""
        start = slot_offset(slot, self.slot_bytes)
        return self._memory[start : start + nbytes]

    def cell(self, index: int) -> bytes:
        """A copy of a cell, which its writer may change at any time."""
        return bytes(self._memory[index * _CELL_BYTES : (index + 1) * _CELL_BYTES])

    @property
    def memory(self) -> memoryview:
        """All of it, cells and slots."""
        return self._memory

    def close(self) -> None:
        """Give the budget back. The memory itself goes when the last borrowed view of it does."""
        self._free_budget()
        self._memory = memoryview(b"")
