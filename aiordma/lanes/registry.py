"""Memory that its owner has registered with a device, so that lanes send it by reference and receive into it.

Registering pins pages, at a few gigabytes a second and with the interpreter held; so what is registered stays so
until its owner goes, releases it, or others need the room. A device reads the pages that were pinned, whatever the
process has done with the addresses since: an entry must not outlive its owner. What work requests still read is
unpinned when they are done, since they refer to it. ibv_reg_mr(3).
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from aiordma.errors import RegistrationError
from aiordma.lanes.outbox import Piece


class Region(Protocol):
    """Registered memory; unpinned when nobody refers to it."""

    @property
    def lkey(self) -> int:
        """What work requests name it by."""


_Key = tuple[int, int, int]
"""Address, bytes, and the owner's identity."""


@dataclass(eq=False)
class _Holders:
    count: int = 1
    """How often it was asked for and not released."""


class _Entry(NamedTuple):
    region: Region
    is_writable: bool
    watch: weakref.ref[object]
    memory: memoryview | None
    """Kept, so that no other memory gets its address while the owner lives: `parameter.data = ...` lets go of it.
    None if that would keep the owner alive."""
    holders: _Holders


class Registry:
    """What is registered with one device. Calls come from one thread; owners may die in any."""

    def __init__(self, register: Callable[[int, int, bool], Region], limit_bytes: int) -> None:
        """`register` pins so many bytes (the second argument) at an address; also to be written to, or not."""
        self._register = register
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._sorted: list[_Key] = []
        self._reach: list[int] = []
        """The furthest end of all entries up to the one of this place among the sorted: they may overlap."""

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(nbytes for _, nbytes, _ in list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, owner: object, memory: memoryview) -> Callable[[], None]:
        """Register memory for as long as its owner lives, or until what is returned is called, once by each who asked.

        Once, however often this is called. What was asked for least recently makes room. Raises
        `RegistrationError` for more than the limit, and for an owner whose end cannot be watched.
        """
        address = address_of(memory)
        key = (address, memory.nbytes, id(owner))
        if entry := self._entries.get(key):
            self._entries.move_to_end(key)
            entry.holders.count += 1
            return partial(self._release, key, entry.holders)
        if memory.nbytes > self._limit_bytes:
            raise RegistrationError(
                f"{memory.nbytes} bytes are more than registered_bytes={self._limit_bytes} allows: raise it, or "
                "send them unregistered, through the ring"
            )
        while self.nbytes + memory.nbytes > self._limit_bytes:
            self._forget(next(iter(self._entries)))
        try:
            watch = weakref.ref(owner, lambda _: self._forget(key))
        except TypeError as exc:
            raise RegistrationError(
                f"a {type(owner).__qualname__} cannot be registered, since nobody is told when it goes: register "
                "a numpy array or a torch tensor of it"
            ) from exc
        is_writable = not memory.readonly
        region = self._register(address, memory.nbytes, is_writable)
        kept = None if _holds(memory, owner) else memory
        holders = _Holders()
        self._entries[key] = _Entry(region, is_writable, watch, kept, holders)
        self._sorted = []
        return partial(self._release, key, holders)

    def find(self, memory: memoryview, *, is_to_write: bool = False) -> Piece | None:
        """This memory as a piece of what is registered (to be written to), if it lies within."""
        if not self._entries:
            return None
        address, nbytes = address_of(memory), memory.nbytes
        if len(self._sorted) != len(self._entries):
            self._sorted = sorted(self._entries)
            self._reach = list(accumulate((key[0] + key[1] for key in self._sorted), max))
        place = bisect_right(self._sorted, address, key=lambda key: key[0]) - 1
        while place >= 0 and self._reach[place] >= address + nbytes:
            key = self._sorted[place]
            entry = self._entries.get(key)
            if (
                entry is not None
                and address + nbytes <= key[0] + key[1]
                and entry.is_writable >= is_to_write
            ):
                return Piece(address, nbytes, entry.region.lkey, entry.region)
            place -= 1
        return None

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _release(self, key: _Key, holders: _Holders) -> None:
        holders.count -= 1
        entry = self._entries.get(key)
        if entry is not None and entry.holders is holders and not holders.count:
            self._forget(key)

    def _forget(self, key: _Key) -> None:
        """One step, since it comes from whichever thread drops the owner."""
        self._entries.pop(key, None)


def _holds(memory: memoryview, owner: object) -> bool:
    """Whether the memory keeps its owner alive."""
    link: object = memory
    while link is not None and link is not owner:
        link = link.obj if isinstance(link, memoryview) else getattr(link, "base", None)
    return link is owner


def address_of(memory: memoryview) -> int:
    """Where it lies; it may be read-only."""
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
