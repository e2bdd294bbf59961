"""Chunks by RDMA WRITE into the slots of the peer's ring, each announced by a write with immediate.

A frame is a few work requests on one queue pair, which the devices carry out in order::

    WRITE           each piece of the payload, to its place in the slot        (chunks only)
    WRITE WITH IMM  the 64-byte header, inline, to a cell beside the slots; `kind << 16 | index` is the immediate

The peer has receives posted for all that may be under way: a chunk needs a slot of its ring, and a CREDIT gives
back at least one slot of ours, so that neither can outnumber the slots. Where the receiver has opened a window
(`aiordma.lanes.rendezvous`) the payload goes to its final place, and the slot stands for the receive.

Nothing here knows a device: a `QueuePair` makes the calls (`aiordma.lanes.verbs`), and a completion pump tells
what became of them. ibv_wr_post(3), ibv_poll_cq(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from aiordma.errors import ChannelBroken, RemoteProtocolError
from aiordma.lanes.base import LaneHandler
from aiordma.lanes.completion import Completion
from aiordma.lanes.outbox import WINDOWS, Frame, Kind, Outbox, WindowWork
from aiordma.lanes.probe import PROBES, PathProbe
from aiordma.lanes.registry import address_of
from aiordma.lanes.rendezvous import Windows
from aiordma.lanes.silence import PATIENCE_S, Silence
from aiordma.ring import CELLS, WINDOW_CELLS, Ring
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader, CreditHeader, WindowHeader

EXTRA_RECEIVES: Final = PROBES + 1 + 3 * WINDOWS
"""For the probe, the END, and what is said of windows; beside one for each slot of either end's ring."""

_EAGER_BYTES: Final = 256 << 10
"""After copying so much the doorbell is rung, so that the device works while the next chunk is copied."""
_LINGER_S: Final = 0.5
"""How long a lane that closes waits for its END to arrive."""
_FLUSH_S: Final = 2.0
"""How long it waits for the device to give its work requests up, before it destroys the queue pair."""


H = TypeVar("H", ChunkHeader, CreditHeader, WindowHeader)


class QueuePair(Protocol):
    """A connected queue pair. No call blocks; a device that fails raises `OSError`.

    The completion of a receive has `wr_id` 0, that of a frame has the frame's `work_id`.
    """

    @property
    def name(self) -> str:
        """What to call it in errors: device, port, the numbers of both queue pairs."""

    def submit(self, batch: Sequence[Frame | WindowWork]) -> None:
        """Post all work requests of these with one doorbell, or none of them. Of nothing: the doorbell alone."""

    def post_receives(self, count: int) -> None:
        """Be ready for so many more writes with immediate."""

    def expose(self, work_id: int) -> bool:
        """Let the peer write to our ring; whether that takes work, of whose end a completion tells."""

    def fail(self, work_id: int) -> None:
        """Go to the error state, which flushes all work requests, and post a last one that is flushed too."""

    def explain(self, completion: Completion) -> str:
        """What the status of a completion that failed means, and its likely cause."""

    async def aclose(self) -> None:
        """Destroy it, before anything is waited for, and what it owns. The device touches no memory of it then."""


class RdmaLane:
    """One lane over a queue pair, which it owns, between two registered rings."""

    kind = "verbs"

    def __init__(
        self, queue_pair: QueuePair, ring: Ring, outbox: Outbox, *, watch: Callable[[], None]
    ) -> None:
        """`ring`: ours, which the peer writes to. `watch`: the completion pump's, told that work is due; raises
        `OSError` if it cannot tell any more what becomes of it."""
        self._qp = queue_pair
        self._ring = ring
        self._outbox = outbox
        self._watch = watch
        self._handler: LaneHandler | None = None
        self._early: list[Completion] | None = []
        """What came before the start."""
        self._silence = Silence()
        self._sequence = 0
        self._is_scheduled = False
        self._is_over = False
        self._loss: Exception | None = None
        self._flushed = asyncio.Event()
        self._closing: asyncio.Future[None] | None = None
        self.probe = PathProbe()
        self.windows = Windows(outbox, ring, post=self._schedule, fail=self._unheard)

    @property
    def name(self) -> str:
        """Its queue pair's."""
        return self._qp.name

    @property
    def room(self) -> int:
        return 0 if self._is_over or self._closing is not None else self._outbox.room

    def start(self, handler: LaneHandler) -> None:
        self._handler = handler
        asyncio.get_running_loop().call_soon(self._begin)

    def post(self, header: ChunkHeader, parts: Sequence[memoryview]) -> None:
        if self._outbox.waiting_bytes >= _EAGER_BYTES:
            self._flush(goes_on=True)
        copied = self._outbox.add(header, parts)
        if copied and self._handler is not None:
            self._handler.copied(copied)
        self._schedule()

    def credit(self, slots: int) -> None:
        self._outbox.credit(slots)
        self._schedule()

    def recall(self, transfer: int, *, is_sending: bool) -> bool:
        if not is_sending or self._outbox.is_done_with(transfer):
            return True
        self._schedule()
        return False

    async def aclose(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            await self._close(self._closing)
        await asyncio.shield(self._closing)

    async def expose(self, patience_s: float = PATIENCE_S) -> None:
        """Open our ring to the peer, before it is told that it may write. Raises `ChannelBroken`.

        `patience_s`: within it the device has got a packet through, or given up.
        """
        self._silence.patience_s = patience_s
        self._flushed.clear()
        work_id = self._outbox.mark()
        try:
            if self._qp.expose(work_id):
                self._watch()
                await self._flushed.wait()
            else:
                self._outbox.completed(work_id)
        except OSError as exc:
            self._lose(self._broken(f"the device refuses work ({exc})", exc))
        self.probe.check()

    async def send_probe(self, large_bytes: int) -> None:
        """Send a frame of nothing and one of `large_bytes`; returns when both arrived, and both of the peer's.

        Only before `start`. Raises `ChannelBroken` if the queue pair fails. Waits for ever for what is lost:
        whoever ends it by a deadline asks `probe` how far it got.
        """
        self.probe.begin(self._outbox.last_id + 1)
        self._outbox.probe(large_bytes)
        self._submit()
        await self.probe.wait()

    def _begin(self) -> None:
        if self._closing is not None or self._handler is None:
            return
        early, self._early = self._early or [], None
        if self._is_over:
            self._handler.lost(self._loss)
            return
        self.completed(early)

    # Sending

    def _schedule(self) -> None:
        """Ring the doorbell once, for all that is posted in this turn of the loop."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_scheduled)

    def _flush_scheduled(self) -> None:
        self._is_scheduled = False
        self._flush()

    @property
    def _may_submit(self) -> bool:
        return self._early is None and not self._is_over and self._closing is None

    def _flush(self, *, goes_on: bool = False) -> None:
        if self._may_submit:
            self._submit(goes_on=goes_on)

    def _submit(self, *, goes_on: bool = False) -> None:
        batch = self._outbox.batch(goes_on=goes_on)
        if batch:
            self._silence.end()
            self._doorbell(batch)

    def _doorbell(self, batch: Sequence[Frame | WindowWork]) -> None:
        try:
            self._qp.submit(batch)
            self._watch()
        except OSError as exc:
            self._lose(self._broken(f"the device refuses work ({exc})", exc))

    # What the completion pump tells

    def watch(self) -> None:
        """The handler is busy: should the device tell nothing, look as long as it is."""
        if not self._is_over and self._closing is None:
            self._watch()

    def ticked(self, tick_s: float) -> bool:
        """A device that was silent for a whole tick hears the doorbell again, and one that stays silent is lost.

        Soft-RoCE needs it: its sending half sleeps while many packets are under way, may miss that they are gone
        (`need_req_skb` in rxe_req.c and rxe_net.c), and looks up at the next doorbell only.
        """
        silence, posted_bytes = self._silence, self._outbox.posted_bytes
        silence.ticked(tick_s, is_due=self._outbox.is_due)
        if self._outbox.is_busy and self._closing is None and silence.is_too_long(posted_bytes):
            self._unheard(
                f"the device did not tell within {silence.limit_s(posted_bytes):.0f} s what became of its work: "
                "it hangs; see dmesg"
            )
        elif self._outbox.is_busy and self._may_submit and silence.is_notable:
            self._doorbell(self._outbox.remind())
        is_open = self._may_submit and self._handler is not None and self._handler.is_busy
        return is_open or self._outbox.is_busy

    def completed(self, batch: Sequence[Completion]) -> None:
        """Work of ours is done, or frames of the peer's have come: one doorbell for all that follows from it."""
        self._silence.end(is_paid=any(completion.wr_id for completion in batch))
        is_scheduled, self._is_scheduled = self._is_scheduled, True
        for completion in batch:
            try:
                if completion.wr_id:
                    self._done(completion)
                elif completion.status:
                    self._lose(self._broken(self._qp.explain(completion)))
                elif not self._is_over:
                    self._came(completion)
            except RemoteProtocolError as exc:
                self._lose(exc)
            except OSError as exc:
                self._lose(self._broken(f"the device refuses work ({exc})", exc))
        self._is_scheduled = is_scheduled
        self._flush()

    def lost(self, exc: Exception) -> None:
        """The completion queue is gone."""
        self._flushed.set()
        self._lose(self._broken(str(exc), exc))

    def _done(self, completion: Completion) -> None:
        headers = self._outbox.completed(completion.wr_id)
        if completion.wr_id == self._outbox.last_id:
            self._flushed.set()
        if completion.status:
            self._lose(self._broken(self._qp.explain(completion)))
            return
        self.probe.was_sent(completion.wr_id)
        self.windows.said()
        if invalidated := self._outbox.take_invalidated():
            self.windows.invalidated(invalidated)
        if self._handler is not None and not self._is_over:
            self._handler.sent(headers)

    def _came(self, completion: Completion) -> None:
        immediate = socket.ntohl(completion.imm_data)
        kind, index = immediate >> 16, immediate & 0xFFFF
        if kind == Kind.PROBE and index < PROBES:
            self.probe.has_come(index)
            return
        if self._closing is not None:
            if kind == Kind.END:  # nobody listens for ours
                self._flushed.set()
            return
        if self._early is not None:
            self._early.append(completion)
            return
        if self._handler is None:
            return
        self._qp.post_receives(1)  # before what it brought is spent
        if kind == Kind.CHUNK:
            self._take(self._handler, index)
        elif kind == Kind.CREDIT:
            slots = self._frame(index, CreditHeader).slots
            self._outbox.credited(slots.bit_count())
            self._handler.credited(slots)
        elif kind == Kind.END:
            self._lose(None)
        elif kind == Kind.WINDOW:
            self._outbox.aim(self._window(index))
        elif kind == Kind.STOP and index < WINDOWS:
            self._outbox.stopped(index)
        elif kind == Kind.STOPPED:
            self.windows.stopped(index)
        else:
            raise RemoteProtocolError(f"a write with the unknown immediate {immediate:#x}")

    def _take(self, handler: LaneHandler, slot: int) -> None:
        """The peer may go on writing to the slot: what is checked is what is used, so it is copied first."""
        header = self._frame(slot, ChunkHeader)
        if header.slot != slot:
            raise RemoteProtocolError(
                f"a chunk for slot {header.slot} was announced in slot {slot}"
            )
        self.windows.moved()
        target = handler.place(header)
        if header.is_in_place:
            payload = self.windows.payload(header)
            is_there = address_of(payload) == address_of(target)
        else:
            payload = self._ring.view(slot, header.length)
            is_there = target.obj is payload.obj
        if not is_there:
            target[:] = payload
            handler.copied(header.length)
        handler.arrived(header)

    def _window(self, cell: int) -> WindowHeader:
        window = self._frame(cell, WindowHeader)
        if cell != WINDOW_CELLS + window.number:
            raise RemoteProtocolError(f"window {window.number} was announced in cell {cell}")
        return window

    def _frame(self, cell: int, kind: type[H]) -> H:
        if cell >= CELLS:
            raise RemoteProtocolError(f"a header in cell {cell}, which does not exist")
        self._sequence += 1
        header = frames.decode(self._ring.cell(cell), self._sequence)
        if not isinstance(header, kind):
            raise RemoteProtocolError(
                f"a {kind.__name__} was announced, and cell {cell} holds a {type(header).__name__}"
            )
        return header

    # Ends

    def _broken(self, why: str, cause: Exception | None = None) -> ChannelBroken:
        broken = ChannelBroken(f"{self._qp.name}: {why}")
        broken.__cause__ = cause
        return broken

    def _unheard(self, why: str) -> None:
        self._lose(self._broken(why))

    def _lose(self, exc: Exception | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._flushed.set()  # what somebody waits for may not come
        self._outbox.drop()
        self.probe.fail(exc or ChannelBroken(f"{self._qp.name}: the peer gave up"))
        self._loss = exc
        if self._handler is not None and self._early is None and self._closing is None:
            self._handler.lost(exc)

    async def _close(self, closed: asyncio.Future[None]) -> None:
        """Say END, if somebody listens; flush; destroy, and at once if it is cancelled."""
        was_started, self._handler = self._handler is not None, None
        try:
            if was_started and not self._is_over:
                self._outbox.end()
                await self._drain(self._submit, _LINGER_S)
            self._is_over = True
            await self._drain(self._fail, _FLUSH_S)
        finally:
            self._is_over, self._early = True, []
            try:
                await self._qp.aclose()
            finally:
                self._outbox.completed(self._outbox.last_id)
                self.windows.end()
                closed.set_result(None)

    def _fail(self) -> None:
        self._qp.fail(self._outbox.mark())
        self._watch()

    async def _drain(self, post: Callable[[], None], timeout_s: float) -> None:
        """Post something, and wait until that, and all before it, is done."""
        self._flushed.clear()
        with contextlib.suppress(TimeoutError, OSError):
            post()
            async with asyncio.timeout(timeout_s):
                await self._flushed.wait()
