"""Chunks that overtook the OPEN of their transfer: they wait in their slots."""

from __future__ import annotations

from aiordma.chunk import Chunk
from aiordma.wire.frames import ChunkHeader


class EarlyChunks:
    """By transfer. The session bounds how many may come."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[float, ChunkHeader, Chunk]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, header: ChunkHeader, chunk: Chunk, now: float) -> None:
        """Keep a chunk until its transfer is open."""
        self._waiting.setdefault(header.transfer, []).append((now, header, chunk))

    def take(self, transfer: int) -> list[tuple[ChunkHeader, Chunk]]:
        """The transfer is open: its chunks, in the order they came."""
        return [(header, chunk) for _, header, chunk in self._waiting.pop(transfer, ())]

    def overdue(self, since: float) -> int | None:
        """A transfer whose first chunk came before `since`, if there is one."""
        for transfer, chunks in self._waiting.items():
            if chunks[0][0] < since:
                return transfer
        return None

    def clear(self) -> None:
        """The channel is over; the slots go with their ring."""
        self._waiting.clear()
