"""Memory for whole models that is used again, round after round, rather than given to the system and taken anew.

The system clears each page before a process has it, and one that it has lent out itself (a virtual machine's to its
host, by balloon or free page reporting) it has to get back first, which can take longer than filling it over a network.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np

from fedllm.fold import Flat

__all__ = ["Memory", "taken"]


class Memory:
    """Pieces of memory that come back by themselves, for the next who takes as much.

    It keeps what came back: between rounds as much as was in use at once, until it is gone itself.
    """

    def __init__(self) -> None:
        self._spare: list[mmap.mmap] = []

    @property
    def spare_bytes(self) -> int:
        """What has come back and is not in use."""
        return sum(len(block) for block in self._spare)

    def take(self, nbytes: int) -> Flat:
        """So many undefined bytes, as uint8; they come back when the last array in them is gone, views included.

        Spare pieces of another size go to the system. Raises `MemoryError`.
        """
        if not nbytes:
            return np.empty(0, np.uint8)
        self._spare[:] = [block for block in self._spare if len(block) == nbytes]
        block = self._spare.pop() if self._spare else _map(nbytes)
        # numpy's views refer to this array, and not to the block, since the block is no array.
        piece = np.frombuffer(block, np.uint8)
        weakref.finalize(piece, self._spare.append, block).atexit = False
        return piece


def taken(memory: Memory | None, nbytes: int) -> Flat:
    """So many undefined bytes of this memory, or of the system's. Raises `MemoryError`."""
    return np.empty(nbytes, np.uint8) if memory is None else memory.take(nbytes)


def _map(nbytes: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise MemoryError(f"no memory for {nbytes} bytes") from exc
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)  # as numpy asks for its own
    return block
