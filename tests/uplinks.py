"""Uploads without a network: senders with a few slots, whose chunks a test delivers in the order that it likes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ml_dtypes
import numpy as np

import aiordma
from aiordma import Chunk, Manifest, Transfer, TransferAborted
from fedllm import Aggregation, Staged
from fedllm.aligned import AlignedContribution

DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]
Update = dict[str, np.ndarray[Any, Any]]
TURNS = 12
"""Of the loop: more than anything takes that was let loose."""


@dataclass(eq=False)
class Uplink:
    """One silo's sender: rising offsets, chunks of one size, and no more of them unreleased than it has slots.

    A released slot is overwritten at once, with what is no number in any dtype.
    """

    update: Mapping[str, Any]
    chunk_bytes: int
    slots: int
    in_flight: list[Chunk] = field(default_factory=list)
    attempts: int = 0
    _arrived: deque[Chunk] = field(default_factory=deque)
    _next: int = 0
    _held: int = 0
    _asks: asyncio.Event = field(default_factory=asyncio.Event)
    _is_broken: bool = False

    def __post_init__(self) -> None:
        outgoing = aiordma.prepare(self.update)
        self.manifest: Manifest = outgoing.manifest
        self.data = bytearray(self.manifest.total_bytes)
        outgoing.stage(0, len(self.data), memoryview(self.data))

    def begin(self) -> Transfer:
        """A new transfer; the one before is over."""
        self.attempts += 1
        self.in_flight, self._next, self._held, self._is_broken = [], 0, 0, False
        self._arrived.clear()
        self._submit(self.attempts)
        return cast(Transfer, self)

    def deliver(self, index: int) -> None:
        """One of the chunks in flight arrives."""
        self._arrived.append(self.in_flight.pop(index))
        self._asks.set()

    def break_off(self) -> None:
        """The transfer fails."""
        self._is_broken = True
        self._asks.set()

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """As `Transfer.chunks`: what it has lent is released when it is left early."""
        lent: list[Chunk] = []
        try:
            while len(lent) * self.chunk_bytes < len(self.data):
                while not self._arrived and not self._is_broken:
                    self._asks.clear()
                    await self._asks.wait()
                if self._is_broken:
                    raise TransferAborted("broken off")
                lent.append(self._arrived.popleft())
                yield lent[-1]
        finally:
            for chunk in lent:
                chunk.release()

    def _submit(self, attempt: int) -> None:
        while self._held < self.slots and self._next < len(self.data):
            slot = bytearray(self.data[self._next : self._next + self.chunk_bytes])
            release = self._release(slot, attempt)
            chunk = Chunk(self._next, memoryview(slot), is_direct=False, release=release)
            self.in_flight.append(chunk)
            self._next += self.chunk_bytes
            self._held += 1

    def _release(self, slot: bytearray, attempt: int) -> Callable[[], None]:
        def release() -> None:
            slot[:] = b"\xff" * len(slot)
            if attempt == self.attempts:
                self._held -= 1
                self._submit(attempt)

        return release


async def upload(uplink: Uplink, contribution: AlignedContribution) -> int:
    """What `exchange` does about an upload; how many attempts it took."""
    try:
        while True:
            try:
                if await contribution.receive(uplink.begin()):
                    return uplink.attempts
            except TransferAborted:
                continue
    except BaseException:
        contribution.abort()
        raise


async def turns() -> None:
    """Let everything happen that can."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What must be equal."""
    return {name: (a.dtype.name, a.shape, np.asarray(a).tobytes()) for name, a in arrays.items()}


def update(seed: int, items: int = 37) -> Update:
    """All dtypes, of sizes that no chunk's border meets."""
    rng = np.random.default_rng(seed)
    arrays = {
        np.dtype(dtype).name: (
            rng.standard_normal((items + i, 3)) * 10.0 ** rng.integers(-3, 4)
        ).astype(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    return {
        **arrays,
        "none": np.zeros((0, 2), np.float32),
        "one": np.asarray(rng.random(), np.float32),
    }


def weight_of(number: int) -> float:
    return (1.0, 2.0, 0.7, 1e6, 3.0, 1e-3)[number % 6]


def staged(updates: dict[str, tuple[float, Update]]) -> dict[str, Any]:
    """What a round of these silos comes to."""
    whole = Staged(next(iter(updates.values()))[1])
    for name, (weight, arrays) in updates.items():
        contribution = whole.begin(name, weight)
        for key, array in arrays.items():
            contribution.buffers[key][...] = array
        contribution.add()
    whole.commit()
    return bits(whole.result())


def committed(aggregation: Aggregation) -> dict[str, Any]:
    aggregation.commit()
    return bits(aggregation.result())
