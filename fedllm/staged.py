"""Aggregation at the end: each silo's update waits in memory of its own, or in a file, until all are there."""

from __future__ import annotations

import enum
import mmap
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aiordma import Chunk, Transfer
from fedllm.aggregate import Arrays, check_layout, check_weight, check_weights, tie, ties_of
from fedllm.errors import FedError, SettingError, StagingError, UpdateError, WeightsError
from fedllm.fold import Flat, Reduction, check_finite, shares_of, weighted_mean
from fedllm.memory import Memory, taken

__all__ = ["Stage", "Staged", "StagedContribution"]

MEMORY_BYTES: Final = 4 << 30
FOLDER: Final = "/var/tmp"
"""Where large temporary files belong, since /tmp may be memory (file-hierarchy(7))."""
_ALIGN_BYTES: Final = 64

_Layout: TypeAlias = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


class Stage(enum.Enum):
    OPEN = "open"
    ADDED = "added"
    FOLDED = "folded"
    ABORTED = "aborted"


_MOVES = {
    (Stage.OPEN, "add"): Stage.ADDED,
    (Stage.OPEN, "abort"): Stage.ABORTED,
    (Stage.ADDED, "abort"): Stage.ABORTED,
    (Stage.ABORTED, "abort"): Stage.ABORTED,
    (Stage.ADDED, "fold"): Stage.FOLDED,
}


class Staged:
    """The weighted mean; each update waits until `commit`, and one that aborts leaves no trace.

    Updates are held in memory as long as all of them together fit `memory_bytes`; the next ones in unlinked
    files, one each, whose pages the kernel writes to disk when it needs the memory. The result is in memory, beside
    them. Not thread-safe, but contributions may `add` in threads of their own, also while another one aborts them.
    """

    restarts: Final = 0
    """Updates that are there stay, whoever falls out."""
    takes_parts: Final = True
    """A sharded silo's ranks each fill their rows of the buffers."""

    def __init__(
        self,
        like: Arrays,
        *,
        memory_bytes: int = MEMORY_BYTES,
        folder: str | Path = FOLDER,
        reduce: Reduction = weighted_mean,
        memory: Memory | None = None,
    ) -> None:
        """`like` are the global weights; only their names, shapes, dtypes and ties matter. Raises `WeightsError`.

        `folder`: where the files go, on a disk with room. `reduce`: what is made of the updates. `memory`: where
        that for updates comes from, one for all rounds; without it they are the system's again after each.
        """
        check_weights(like)
        if memory_bytes < 0:
            raise SettingError(f"memory_bytes must not be negative, and is {memory_bytes}")
        self._like: _Layout = {name: (array.shape, array.dtype) for name, array in like.items()}
        self._ties = ties_of(like)
        self._nbytes = _place(self._like)[1]
        self._memory_bytes = memory_bytes
        self._folder = Path(folder)
        self._reduce = reduce
        self._memory = memory
        self._begun: dict[str, StagedContribution] = {}
        self._result: dict[str, NDArray[Any]] | None = None

    def begin(self, name: str, weight: float | None) -> StagedContribution:
        """A silo's place, whose `buffers` are allocated here. Raises `UpdateError`; `StagingError` if a file is
        due, and the disk has no room for it.

        The name of an aborted contribution may begin again.
        """
        if self._result is not None:
            raise FedError("this aggregation is committed: begin a new one")
        check_weight(weight)
        taken = self._begun.get(name)
        if taken is not None and taken.stage is not Stage.ABORTED:
            raise UpdateError(f"silo {name!r} takes part in this round already")
        memory = self._allocate()
        is_filed = memory is None
        buffers = _carve(self._like, self._map_file() if memory is None else memory)
        self._begun[name] = StagedContribution(weight, buffers, is_filed=is_filed)
        return self._begun[name]

    def commit(self) -> None:
        """Fold what was added, in the order of the names; the rest is aborted."""
        added = []
        for _, contribution in sorted(self._begun.items()):
            if contribution.stage is Stage.ADDED:
                added.append(contribution)
            else:
                contribution.abort()
        if not added:
            raise WeightsError("no update was added, so there is no mean")
        shares = shares_of([c.weight for c in added])
        # Global weights that lie in a file would be read from disk by each of the next round's silos.
        fresh = taken(self._memory, self._nbytes) if added[0].is_filed else None
        updates = [c.take() for c in added]
        result = updates[0] if fresh is None else _carve(self._like, fresh)
        for name in self._like:
            rows = [update[name].reshape(-1) for update in updates]
            self._reduce(rows, shares, result[name].reshape(-1))
        tie(result, self._ties)
        self._result = result

    def result(self) -> dict[str, NDArray[Any]]:
        """The mean. Each call gives the same arrays; tensors that are tied in the global weights are one array, as
        long as the silos send the same for them."""
        if self._result is None:
            raise FedError("commit() comes before result()")
        return self._result

    def _allocate(self) -> Flat | None:
        """Memory for one update; None if the budget has not so much left, or the system."""
        held = [c for c in self._begun.values() if c.stage is not Stage.ABORTED and not c.is_filed]
        if (len(held) + 1) * self._nbytes > self._memory_bytes and self._nbytes:
            return None
        try:
            return taken(self._memory, self._nbytes)
        except MemoryError:
            return None

    def _map_file(self) -> Flat:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # All of it now: a page for which the disk has no room later on kills the process (SIGBUS, mmap(2)).
                os.posix_fallocate(file.fileno(), 0, self._nbytes)
                return np.frombuffer(mmap.mmap(file.fileno(), self._nbytes), np.uint8)
        except OSError as exc:
            raise StagingError(
                f"no room for another update: {self._nbytes} bytes go to a file in {self._folder}, beyond the "
                f"{self._memory_bytes} that memory may take ({exc.strerror}): free space there, or give Staged "
                "another folder= or more memory_bytes="
            ) from exc


class StagedContribution:
    """One silo's part in a `Staged` aggregation::

    OPEN ──add──▶ ADDED ──fold──▶ FOLDED
      └───abort─────┴──abort──▶ ABORTED
    """

    is_awaited: Final = True
    """No silo waits for another here."""

    def __init__(
        self, weight: float | None, buffers: dict[str, NDArray[Any]], *, is_filed: bool = False
    ) -> None:
        self.weight = weight
        self.stage = Stage.OPEN
        self.is_filed = is_filed
        """Whether its buffers are a file's."""
        self._buffers = buffers
        self._moving = threading.Lock()

    @property
    def buffers(self) -> Mapping[str, NDArray[Any]]:
        """Where the update is to be received; empty once it was folded or aborted."""
        return self._buffers

    async def receive(self, transfer: Transfer) -> bool:
        """Receive into `buffers`, look at each number on the way, and take part. See `Contribution.receive`; never has
        to be repeated."""
        specs = transfer.manifest.tensors
        check_layout(self._buffers, ((spec.name, spec.dtype, spec.shape) for spec in specs))
        await transfer.into(self._buffers, on_chunk=_check_chunk)
        self._move("add")
        return True

    def add(self) -> None:
        """`buffers` are filled, otherwise than by `receive`: check that every number is finite, and take part. Raises
        `UpdateError`, and is aborted then."""
        try:
            for name, array in self._buffers.items():
                check_finite(name, array.reshape(-1), array.shape)
        except UpdateError:
            self.abort()
            raise
        self._move("add")

    def abort(self) -> None:
        """Take it out again; its memory is given up."""
        self._move("abort")
        self._buffers = {}

    def take(self) -> dict[str, NDArray[Any]]:
        """Hand its arrays over to the fold."""
        self._move("fold")
        buffers, self._buffers = self._buffers, {}
        return buffers

    def _move(self, verb: str) -> None:
        # `add` may run in a thread whose waiter was cancelled, and who aborts then: one comes first.
        with self._moving:
            stage = _MOVES.get((self.stage, verb))
            if stage is None:
                raise FedError(
                    f"this contribution is {self.stage.value}: it is too late to {verb} it"
                )
            self.stage = stage


def _check_chunk(chunk: Chunk) -> None:
    for spec, first, row in chunk.parts():
        check_finite(spec.name, row, spec.shape, first)


def _place(layout: _Layout) -> tuple[dict[str, int], int]:
    """The first byte of each array in one piece of memory, and how large that is."""
    starts, end = {}, 0
    for name, (shape, dtype) in layout.items():
        starts[name] = end
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        end += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return starts, end


def _carve(layout: _Layout, memory: Flat) -> dict[str, NDArray[Any]]:
    """Arrays of this layout in one piece of memory."""
    starts, _ = _place(layout)
    return {
        name: np.ndarray(shape, dtype, memory.data, starts[name])
        for name, (shape, dtype) in layout.items()
    }
