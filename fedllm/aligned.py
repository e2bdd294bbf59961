"""Aggregation on the way: the silos' updates pass by side by side, and are folded where they lie in the receive slots.

What is held is one set of weights, the sums, and the channels' rings, for any number of silos.

All uploads are of one layout, and each comes in chunks of rising offsets. Bytes below `folded_bytes` are in the
sums. As soon as every silo has a chunk with the next byte, all elements up to the nearest end of these chunks are
folded, in the order of the names; a chunk that was folded whole is released, which is its sender's credit. So a fast
silo fills its slots and then waits for the slowest.

Chunk sizes, lanes and order of arrival cannot show in the result: a `Reduction` treats every element by itself, chunks
never split one (their borders are multiples of 64 bytes, and the manifest aligns the tensors), and each element is
folded once, out of all silos' numbers.

Nobody waits in a circle. If no silo lacks the next byte there is something to fold, and folding waits for nothing.
A silo that lacks it is *awaited*, and asked for chunks until it comes. Offsets rise, so what a silo has sent is all
that lies below some byte. Either that includes the next byte: its chunk was given a slot before any that overtook it,
and is under way. Or all that the silo has sent is folded and released: its slots are free, and it sends on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aiordma import (
    ChannelError,
    Chunk,
    Manifest,
    Transfer,
    TransferError,
    TransferTimeout,
    prepare,
)
from fedllm.aggregate import Arrays, check_layout, check_weight, check_weights
from fedllm.config import check_seconds
from fedllm.errors import FedError, UpdateError, WeightsError
from fedllm.fold import BLOCK_ITEMS, Flat, Reduction, check_finite, shares_of, weighted_mean
from fedllm.memory import Memory, taken
from fedllm.patience import patience

__all__ = ["Aligned", "AlignedContribution"]

IDLE_TIMEOUT_S: Final = 30.0


class Aligned:
    """The weighted mean, bit for bit as of `Staged`; no update is ever held.

    A silo that falls out after folding began, because it stalls, dies, or sends what is no number, makes the others
    send once more; the sums begin anew without it. For one event loop, on which it folds, a chunk of every silo's at a
    time: keep `slot_bytes` x silos at what a loop may be kept from other things, some 100 MB for 20 ms.
    """

    takes_parts: Final = False
    """All uploads are of one layout."""

    def __init__(
        self,
        like: Arrays,
        *,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        reduce: Reduction = weighted_mean,
        memory: Memory | None = None,
    ) -> None:
        """`like` are the global weights. Raises `WeightsError`, or `aiordma.TensorError` if they cannot be sent.

        `idle_timeout_s`: a silo that all others wait for, and that sends nothing for so long, is out. The silos'
        own `ChannelConfig.idle_timeout_s` must be larger, or they give up while they are held back. `reduce`: what is
        made of the updates. `memory`: where the sums' comes from, one for all rounds; without it, from the system.
        """
        check_weights(like)
        check_seconds("idle_timeout_s", idle_timeout_s)
        self.idle_timeout_s = idle_timeout_s
        self._like = like
        self._manifest = prepare(like).manifest
        self._reduce = reduce
        self._memory = memory
        self._cohort: dict[str, AlignedContribution] = {}
        """In the order of the names."""
        self._shares: list[float] = []
        self._folded_bytes = 0
        self._restarts = 0
        self._sums: dict[str, Flat] = {}
        """Tensors that are tied in the global weights share theirs."""
        self._is_committed = False

    @property
    def restarts(self) -> int:
        """How often folding began anew without a silo."""
        return self._restarts

    @property
    def folded_bytes(self) -> int:
        """Bytes of the update that are folded."""
        return self._folded_bytes

    def begin(self, name: str, weight: float | None) -> AlignedContribution:
        """A silo's place. Raises `UpdateError`; `FedError` once folding has begun."""
        if self._folded_bytes or self._is_committed:
            raise FedError(
                "the fold has begun: all silos begin before the first update is received"
            )
        check_weight(weight)
        if name in self._cohort:
            raise UpdateError(f"silo {name!r} takes part in this round already")
        contribution = AlignedContribution(name, weight, self)
        self._settle({**self._cohort, name: contribution})
        return contribution

    def commit(self) -> None:
        """Nothing is left to be done: raises `WeightsError` unless every update was received."""
        if not self._cohort or self._folded_bytes < self._manifest.total_bytes:
            raise WeightsError("no update was added, so there is no mean")
        self._is_committed = True
        # They know this aggregation, a circle: it would hold whole models until the collector comes by.
        self._cohort.clear()

    def result(self) -> dict[str, NDArray[Any]]:
        """The mean. Each call gives the same arrays; tensors that are tied in the global weights are one array."""
        if not self._is_committed:
            raise FedError("commit() comes before result()")
        self._allocate()
        return {
            spec.name: self._sums[spec.name].reshape(spec.shape) for spec in self._manifest.tensors
        }

    # What contributions ask

    def check(self, manifest: Manifest) -> None:
        """Raise `UpdateError` unless the update has the layout of the global weights."""
        check_layout(self._like, ((spec.name, spec.dtype, spec.shape) for spec in manifest.tensors))
        places = {spec.name: spec.offset for spec in manifest.tensors}
        for spec in self._manifest.tensors:
            if spec.nbytes and places[spec.name] != spec.offset:
                raise UpdateError(
                    f"tensor {spec.name!r} lies at byte {places[spec.name]} of the update, not at {spec.offset}: "
                    "send the tensors in the order of the global weights, and tied ones as they are tied there"
                )

    def remove(self, contribution: AlignedContribution) -> None:
        """Go on without this silo; if it is in the sums already, from the first byte."""
        if self._cohort.get(contribution.name) is contribution:
            self._without(contribution)
            self.advance()

    def advance(self) -> None:
        """Fold what every silo has."""
        total = self._manifest.total_bytes
        while self._cohort and self._folded_bytes < total:
            members = list(self._cohort.values())
            end = min(member.covered_to for member in members)
            if end <= self._folded_bytes:
                return
            refused = self._fold(members, end)
            if refused is not None:
                self._without(refused)
                continue
            self._folded_bytes = end
            for member in members:
                member.passed(end, is_last=end == total)

    # Folding

    def _fold(self, members: Sequence[AlignedContribution], end: int) -> AlignedContribution | None:
        """Reduce the bytes from `folded_bytes` to `end`; who is to blame if that cannot be."""
        self._allocate()
        start = self._folded_bytes
        for spec, element, byte, nbytes in self._manifest.parts(start, end - start):
            sums = self._sums[spec.name][element : element + nbytes // spec.item_bytes]
            # Block by block, so that what was checked is in the cache when it is summed.
            for at in range(0, sums.size, BLOCK_ITEMS):
                out = sums[at : at + BLOCK_ITEMS]
                rows = [member.row(byte + at * spec.item_bytes, out) for member in members]
                for member, row in zip(members, rows, strict=True):
                    try:
                        check_finite(spec.name, row, spec.shape, element + at)
                    except UpdateError as exc:
                        member.refuse(exc)
                        return member
                self._reduce(rows, self._shares, out)
        return None

    def _without(self, contribution: AlignedContribution) -> None:
        self._settle({n: c for n, c in self._cohort.items() if c is not contribution})
        if self._folded_bytes:
            self._folded_bytes = 0
            self._restarts += 1
            for member in self._cohort.values():
                member.restart()

    def _settle(self, cohort: dict[str, AlignedContribution]) -> None:
        self._cohort = dict(sorted(cohort.items()))
        self._shares = shares_of([member.weight for member in self._cohort.values()])

    def _allocate(self) -> None:
        if self._sums:
            return
        whole = taken(self._memory, self._manifest.total_bytes)
        for spec in self._manifest.tensors:
            self._sums[spec.name] = whole[spec.offset : spec.end].view(self._like[spec.name].dtype)


class _Stage(enum.Enum):
    OPEN = "open"
    FOLDED = "folded"
    OUT = "out"


class AlignedContribution:
    """One silo's part in an `Aligned` aggregation::

    OPEN ──the last byte is folded──▶ FOLDED
      └──abort, or refused──▶ OUT
    """

    def __init__(self, name: str, weight: float | None, owner: Aligned) -> None:
        self.name = name
        self.weight = weight
        self._owner = owner
        self._stage = _Stage.OPEN
        self._current: Chunk | None = None
        """The chunk with the next byte."""
        self._ahead: dict[int, Chunk] = {}
        """By offset: chunks that came and are not their turn."""
        self._refusal: UpdateError | None = None
        self._is_stale = False
        self._news = asyncio.Event()
        """It is awaited, or has nothing to wait for any more."""
        self._news.set()

    @property
    def is_awaited(self) -> bool:
        """Whether the next byte to be folded lacks of this silo."""
        return self._stage is _Stage.OPEN and self._current is None

    @property
    def covered_to(self) -> int:
        """The byte after its chunk with the next byte; 0 if it has none."""
        return 0 if self._current is None else _end(self._current)

    async def receive(self, transfer: Transfer) -> bool:
        """Take part with this upload until the last byte is folded. See `Contribution.receive`.

        Raises `aiordma.TransferTimeout` when the silo was awaited and idle for `idle_timeout_s`. An upload that failed
        may be sent once more: what is folded already is skipped.
        """
        self._owner.check(transfer.manifest)
        self._is_stale = False
        async with contextlib.aclosing(transfer.chunks()) as chunks:
            try:
                while True:
                    await self._news.wait()
                    if self._stage is _Stage.OUT:
                        raise self._refusal or FedError("this contribution was aborted")
                    if self._is_stale:
                        return False
                    # Asking only while it is awaited: whoever is held back does not count as idle, here or in aiordma.
                    chunk = await self._next(chunks)
                    if chunk is None:
                        return True
                    self.take(chunk)
            except (TransferError, ChannelError):
                if self._stage is not _Stage.FOLDED:
                    raise
                return True  # what lacks was folded in an earlier attempt
            finally:
                self._let_go()  # before the slots are the sender's again

    def take(self, chunk: Chunk) -> None:
        """A chunk came, in any order."""
        folded = self._owner.folded_bytes
        if self._stage is not _Stage.OPEN or _end(chunk) <= folded:
            chunk.release()
        elif chunk.offset > folded:
            self._ahead[chunk.offset] = chunk
        else:
            self._current = chunk
            self._news.clear()
            self._owner.advance()

    def row(self, start: int, out: Flat) -> Flat:
        """The silo's numbers from this byte on, as many as `out` has, borrowed from the slot."""
        assert self._current is not None
        offset = start - self._current.offset
        return np.frombuffer(self._current.view, out.dtype, out.size, offset)

    def passed(self, folded_bytes: int, *, is_last: bool) -> None:
        """All bytes up to here are folded."""
        if self._current is not None and _end(self._current) <= folded_bytes:
            self._current.release()
            self._current = self._ahead.pop(folded_bytes, None)
        if is_last:
            self._stage = _Stage.FOLDED
        if self._current is None:
            self._news.set()

    def restart(self) -> None:
        """Another silo fell out: the upload, if there is one, begins anew."""
        self._is_stale = True
        self._let_go()

    def refuse(self, error: UpdateError) -> None:
        """It sent what is no number."""
        self._refusal = error
        self._leave()

    def abort(self) -> None:
        """Take it out again, at the others' cost if it is in the sums. Once the last byte is folded it is too late,
        and nothing happens."""
        if self._stage is _Stage.OPEN:
            self._leave()
            self._owner.remove(self)

    def _leave(self) -> None:
        self._stage = _Stage.OUT
        self._let_go()

    def _let_go(self) -> None:
        current, self._current = self._current, None
        for chunk in (current, *self._ahead.values()):
            if chunk is not None:
                chunk.release()
        self._ahead.clear()
        self._news.set()

    async def _next(self, chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
        idle_s = self._owner.idle_timeout_s
        try:
            async with patience(idle_s) as clock:
                return await anext(chunks, None)
        except TimeoutError as exc:
            if not clock.expired():
                raise
            raise TransferTimeout(
                f"the silo sent nothing for {idle_s:g} s, and all others waited for it: see what it waits for, or "
                "raise Aligned's idle_timeout_s"
            ) from exc


def _end(chunk: Chunk) -> int:
    return chunk.offset + chunk.nbytes
