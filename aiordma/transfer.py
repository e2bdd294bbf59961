"""One transfer: the half that sends, and the half that receives.

Memory belongs to the completion, never to the waiting task: whoever stops waiting first takes the memory
back from every lane (`recall`), and only then returns.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol, TypeAlias

import msgspec

from aiordma.chunk import Chunk
from aiordma.errors import (
    AiordmaError,
    Busy,
    TransferAborted,
    TransferRefused,
    TransferTimeout,
    again,
)
from aiordma.loans import Leases, Loans
from aiordma.outgoing import Outgoing
from aiordma.tensors import Array, Destination, Framework, Take, allocate, destination
from aiordma.wire.manifest import Manifest
from aiordma.wire.receiving import Incoming

OnChunk: TypeAlias = Callable[[Chunk], object]


class Send:
    """The sending half."""

    def __init__(self, transfer: int, outgoing: Outgoing, now: float) -> None:
        loop = asyncio.get_running_loop()
        self.id = transfer
        self.outgoing = outgoing
        self.acknowledged: asyncio.Future[None] = loop.create_future()
        self.consumed: asyncio.Future[None] = loop.create_future()
        self.moved_at = now
        """When it last made progress, on the loop's clock."""

    def stalled(self, idle_s: float) -> TransferTimeout:
        """The error of a transfer that does not move."""
        return TransferTimeout(
            f"transfer {self.id} made no progress for {idle_s:g} s: the peer claimed it, and takes no "
            "chunks; see what it waits for, or raise idle_timeout_s"
        )

    def fail(self, error: AiordmaError) -> None:
        """It will not be acknowledged, or not be consumed."""
        for future in (self.acknowledged, self.consumed):
            if not future.done():
                future.set_exception(again(error))
                future.exception()  # nobody has to wait for both


class Stage(enum.Enum):
    """OFFERED ─▶ RECEIVING ─▶ DONE; a cancelled receive that lost nothing goes back to OFFERED."""

    OFFERED = "offered"
    RECEIVING = "being received"
    DONE = "over"


class ReceptionOwner(Protocol):
    """What the receiving half asks of its link."""

    loans: Loans

    def claim(self, reception: Reception) -> None:
        """Let the chunks come."""

    def unclaim(self, reception: Reception) -> None:
        """Let no more come for now."""

    def done(self, reception: Reception) -> None:
        """It is consumed."""

    def abort(self, reception: Reception, error: AiordmaError | None, reason: str) -> None:
        """It is given up."""

    def recall(self, reception: Reception) -> None:
        """Take its destination back from all lanes."""

    def copied(self, nbytes: int) -> None:
        """Count bytes that were copied."""


class Reception:
    """The receiving half: chunks come in by `take`, and go to a destination or to a consumer of chunks."""

    def __init__(self, incoming: Incoming, owner: ReceptionOwner, now: float) -> None:
        self.incoming = incoming
        self.stage = Stage.OFFERED
        self.held: deque[Chunk] = deque()
        self.moved_at = now
        self._owner = owner
        self._destination: Destination | None = None
        self._on_chunk: OnChunk | None = None
        self._placed_bytes = 0
        self._aside_bytes = 0
        self._lent: set[Chunk] = set()
        self._error: AiordmaError | None = None
        self._objection: Exception | None = None
        """What `on_chunk` raised."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether chunks that still come are of no use."""
        return self.stage is Stage.DONE

    @property
    def is_offered(self) -> bool:
        """Whether it can be taken (again)."""
        return self.stage is Stage.OFFERED

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for chunks to come."""
        return self._waiter is not None

    def stalled(self, idle_s: float) -> TransferTimeout:
        """The error of a transfer that does not move."""
        return TransferTimeout(
            f"transfer {self.incoming.id} made no progress for {idle_s:g} s: no chunk came, and "
            f"{len(self._lent)} that came were not released; see what the peer waits for, or raise "
            "idle_timeout_s"
        )

    def place(self, offset: int, length: int) -> memoryview | None:
        """The final place of a chunk, if it is known and contiguous."""
        return None if self._destination is None else self._destination.view(offset, length)

    def take(self, chunk: Chunk) -> None:
        """A chunk came, and its check was right."""
        if self._destination is None:
            self.held.append(chunk)
        else:
            self._store(chunk)
        if self._destination is None or self.incoming.is_complete:
            self._wake()

    def move_aside(self, limit_bytes: int) -> None:
        """Chunks that an outdated claim let loose must not keep the slots from the other transfers.

        A peer that goes on sending after the claim was taken back finds its slots kept, beyond the limit.
        """
        for chunk in self.held:
            if self._aside_bytes + chunk.nbytes <= limit_bytes:
                copied = chunk.move_aside()
                self._aside_bytes += copied
                self._owner.copied(copied)

    def fail(self, error: AiordmaError) -> None:
        """It will not succeed. What came of it is dropped."""
        self._error = error
        self.stage = Stage.DONE
        self._destination = None
        while self.held:
            self.held.popleft().release()
        self._wake()

    def begin(self, destination: Destination | None, on_chunk: OnChunk | None = None) -> None:
        """Claim the transfer; without a `destination` its chunks go to `next_chunk`."""
        if self._error is not None:
            raise again(self._error)
        if self.stage is not Stage.OFFERED:
            raise Busy(
                f"transfer {self.incoming.id} is {self.stage.value}: it is received only once"
            )
        self.stage = Stage.RECEIVING
        self._destination, self._on_chunk = destination, on_chunk
        self._owner.claim(self)
        while self._destination is not None and self.held:
            self._store(self.held.popleft())

    async def complete(self) -> None:
        """Wait until the destination has everything.

        Cancelled before the first chunk came, the transfer is offered again; later, it is aborted. Either
        way no byte of the destination is written after this returns.
        """
        leases = Leases()
        if self._destination is not None and not self.incoming.is_complete:
            leases = self._owner.loans.lend(self.incoming.id, self._destination)
        try:
            while self._error is None and not self.incoming.is_complete:
                await self._wait()
            await leases.end(is_complete=self.incoming.is_complete)
        except asyncio.CancelledError:
            self.let_go()
            await leases.end(is_complete=self.incoming.is_complete)
            raise
        if self._objection is not None:
            raise self._objection
        if self._error is not None:
            raise again(self._error)
        if self._destination is not None:
            self._owner.copied(self._destination.finish())
        self._finish()

    async def next_chunk(self) -> Chunk | None:
        """The next chunk that came, in any order; None after the last."""
        while not self.held:
            if self._error is not None:
                raise again(self._error)
            if self.incoming.is_complete:
                return None
            await self._wait()
        chunk = self.held.popleft()
        self._lent.add(chunk)
        return chunk.lend(self.incoming.manifest, lambda: self._returned(chunk))

    def end_chunks(self) -> None:
        """The consumer of chunks asks for no more: DONE once it released all, or ABORT if some are missing."""
        if self.stage is not Stage.RECEIVING:
            return
        if self.held or not self.incoming.is_complete:
            self.give_up(None, "the receiver stopped before the last chunk")
            # Nobody may be left who would: the slots are for all transfers.
            for chunk in list(self._lent):
                chunk.release()
        else:
            self._finish()

    def let_go(self) -> bool:
        """Undo `begin`, losing nothing, if no chunk is in the destination yet; else abort. Whether it can be
        received again."""
        if self.is_offered:
            self._owner.unclaim(
                self
            )  # it may have been claimed in advance, for a taker that it did not suit
        if self.stage is not Stage.RECEIVING:
            return self.is_offered
        self._destination = None
        self._owner.recall(self)
        if self._placed_bytes:
            self.give_up(None, "the receiver was cancelled")
        else:
            self.stage = Stage.OFFERED
            self._owner.unclaim(self)
        return self.is_offered

    def give_up(self, error: AiordmaError | None, reason: str) -> None:
        """Abort, and tell the sender why."""
        if self.stage is Stage.DONE:
            return
        self._destination = None
        self._owner.recall(self)
        self._owner.abort(self, error, reason)
        self.fail(error or TransferAborted(reason))

    def _store(self, chunk: Chunk) -> None:
        assert self._destination is not None
        if self._on_chunk is not None and not chunk.is_direct:
            # A device's peer may go on writing to the slot: what is looked at is to be what is kept.
            self._owner.copied(chunk.move_aside())
        if not chunk.is_direct:
            self._owner.copied(self._destination.scatter(chunk.offset, chunk.view))
        self._placed_bytes += chunk.nbytes
        if self._on_chunk is not None:
            self._show(chunk, self._on_chunk)
        chunk.release()

    def _show(self, chunk: Chunk, on_chunk: OnChunk) -> None:
        try:
            on_chunk(chunk.lend(self.incoming.manifest, lambda: None))
        except Exception as exc:
            self._objection = exc
            self.give_up(None, f"the receiver objects to what came: {exc}")

    def _returned(self, chunk: Chunk) -> None:
        self._lent.discard(chunk)
        self.moved_at = asyncio.get_running_loop().time()
        if self.stage is Stage.DONE and not self._lent and self._error is None:
            self._owner.done(self)

    def _finish(self) -> None:
        self.stage = Stage.DONE
        self._destination = None
        if not self._lent:
            self._owner.done(self)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self.moved_at = loop.time()
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Transfer:
    """A transfer that the peer opened. Nothing is claimed until one of `arrays`, `into`, `chunks` is called.

    One that nobody wants should be refused, since the peer waits for it.
    """

    def __init__(self, reception: Reception) -> None:
        self.reception = reception
        self._meta = reception.incoming.meta

    @property
    def id(self) -> int:
        """Rises by one with each transfer of the peer's on this channel, from 1."""
        return self.reception.incoming.id

    @property
    def manifest(self) -> Manifest:
        """Names, dtypes, shapes and offsets."""
        return self.reception.incoming.manifest

    @property
    def meta(self) -> object:
        """What the sender gave as `meta`, decoded anew on each access; None if it gave none."""
        return msgspec.msgpack.decode(self._meta) if self._meta else None

    async def arrays(
        self,
        framework: Framework = "numpy",
        *,
        take: Take | None = None,
        on_chunk: OnChunk | None = None,
    ) -> dict[str, Array]:
        """Receive into new arrays, by name in the sender's order; all share one allocation.

        `take`, called with a number of bytes, gives its memory as a 1-D, writable numpy array of uint8. `on_chunk`:
        see `into`.
        Raises `TensorError` (nothing is claimed then) for a dtype that the framework does not have, and a
        `TransferError` if the transfer fails. Cancelled before the first chunk came, it can be called again;
        later, the transfer is aborted. The channel stays usable.
        """
        buffer, arrays = allocate(self.manifest, framework, take)
        self.reception.begin(Destination(self.manifest, buffer), on_chunk)
        await self.reception.complete()
        return arrays

    async def into(self, mapping: Mapping[str, Array], *, on_chunk: OnChunk | None = None) -> None:
        """Receive into the caller's arrays: exactly the manifest's names, dtypes and shapes.

        `on_chunk` is called with each chunk, in any order, when it is in its place and its check was right: to show
        progress, or to look at its numbers while they are in the cache. It keeps the loop from other things. What it
        raises is raised here, and the transfer is aborted. To registered memory a peer's device can still write then.
        Raises and is cancelled like `arrays`; the arrays hold undefined bytes unless it succeeds.
        """
        self.reception.begin(destination(self.manifest, mapping), on_chunk)
        await self.reception.complete()

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Receive chunk by chunk, in any order, straight from the receive slots.

        Release each chunk before asking for many more: the slots are few, and a released one is the
        sender's credit; best by ``with chunk:``. Leaving the loop early, or cancelling it, aborts the transfer
        and releases the chunks that are left, so that what was taken from them must not be read any more.
        """
        self.reception.begin(None)
        try:
            while (chunk := await self.reception.next_chunk()) is not None:
                yield chunk
        finally:
            self.reception.end_chunks()

    async def refuse(self, reason: object) -> None:
        """Do not want it: the sender's call raises `TransferRefused` with the reason, a text or an exception.

        A sender whose only chunk came whole before has returned already, unless it asked to `confirm`. Refusing
        what is over, because the sender gave it up, does nothing.
        """
        if self.reception.stage is Stage.RECEIVING:
            raise Busy(
                f"transfer {self.id} is {self.reception.stage.value}: it cannot be refused now"
            )
        self.reception.give_up(TransferRefused(str(reason)), str(reason))
