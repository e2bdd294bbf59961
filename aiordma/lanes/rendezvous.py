"""Rendezvous: what a lane receives goes straight to its final place, in memory that the receiver has registered.

The receiver opens a type-2 memory window to it, bound to this lane's queue pair alone, and announces it in order behind
the bind; the sender then writes there what has not gone to the ring yet. In the end::

    all came                receiver  invalidates the window, and returns when its own device says that it is
    before that             receiver  STOP ─────▶  sender
                            receiver  ◀── STOPPED, behind the last write; then the same

Invalidating alone would do for the memory, but not for the sender: a write that is under way then fails its queue pair,
and with it the channel. And a device may go on with a message that it had begun to take (soft-RoCE looks at the
window with the first packet only). So a peer that does not stop loses the lane, and the memory is given back
when the queue pair is destroyed: never on the peer's word. ibv_bind_mw(3), ibv_wr_post(3).

Binding and invalidating wait until nothing of ours is under way on the lane (`Outbox`), a round trip each: it is for
large tensors.

While a window is open the peer may write anywhere within it, more than once; soft-RoCE even lets it write anywhere in
the memory region. Nothing of a transfer is to be believed before the window is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from aiordma.errors import RemoteProtocolError
from aiordma.lanes.outbox import WINDOWS, Outbox, Window
from aiordma.ring import Ring
from aiordma.wire.frames import ChunkHeader, WindowHeader

_MIN_SLOTS: Final = 2
"""Memory for fewer chunks than these is received through the ring."""
_STOP_S: Final = 10.0
"""How long the peer may take to stop, or to the next chunk that it had posted before it heard of it."""


class _Stopping:
    """A window that the peer was told not to write to any more: loses the lane unless it is heeded."""

    def __init__(self, unheard: Callable[[], None], slots: int) -> None:
        self._unheard = unheard
        self._left = slots
        self._timer: asyncio.TimerHandle | None = None

    def said(self) -> None:
        """The peer's device has it: before that it was behind chunks of ours, which is no fault of the peer's."""
        if self._timer is None:
            self._wait()

    def moved(self) -> None:
        """A chunk came. No more can than there are slots: each was posted in one from before."""
        if self._timer is not None and self._left:
            self._left -= 1
            self._wait()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self.cancel()
        self._timer = asyncio.get_running_loop().call_later(_STOP_S, self._unheard)


class _Open(NamedTuple):
    """A window, from its announcement until it is invalidated."""

    lease: Lease
    header: WindowHeader
    window: Window
    memory: memoryview


class Lease:
    """The windows of one receive. The memory is the caller's again when `over` is done."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Windows:
    """The receiving side's windows on one lane."""

    def __init__(
        self,
        outbox: Outbox,
        ring: Ring,
        *,
        post: Callable[[], None],
        fail: Callable[[str], None],
    ) -> None:
        """`post` rings the doorbell soon. `fail` ends the lane, for this reason."""
        self._outbox = outbox
        self._slots, self._min_bytes = ring.slots, _MIN_SLOTS * ring.slot_bytes
        self._post = post
        self._fail = fail
        self._open: dict[int, _Open] = {}
        self._used: set[int] = set()
        self._stopping: dict[int, _Stopping] = {}
        self._is_over = False

    def open(self, transfer: int, parts: Sequence[tuple[int, memoryview]]) -> Lease | None:
        """Let the peer write a transfer to where it belongs, as far as that is registered.

        `parts`: where each begins in the transfer's data, and its memory.
        """
        large = [part for part in parts if part[1].nbytes >= self._min_bytes]
        large.sort(key=lambda part: part[1].nbytes, reverse=True)
        free = [number for number in range(WINDOWS) if number not in self._open]
        lease = Lease()
        for offset, memory in large:
            if self._is_over or not free:
                break
            try:
                window = self._outbox.sources.open(memory)
            except OSError:  # no more windows: the ring does as well
                break
            if window is not None:
                number, piece = free.pop(), window.piece
                header = WindowHeader(
                    number, window.key, transfer, offset, piece.length, piece.address
                )
                self._open[number] = _Open(lease, header, window, memory)
                lease.numbers.add(number)
                self._outbox.announce(window, header)
        if not lease.numbers:
            return None
        self._post()
        return lease

    def moved(self) -> None:
        """A chunk came, wherever it went: what says that the peer stopped is behind all that it had posted."""
        for stopping in self._stopping.values():
            stopping.moved()

    def payload(self, header: ChunkHeader) -> memoryview:
        """Where this chunk was written to. Raises `RemoteProtocolError` if that is nowhere."""
        for number, opened in self._open.items():
            if opened.header.holds(header):
                self._used.add(number)
                first = header.offset - opened.header.offset
                return opened.memory[first : first + header.length]
        raise RemoteProtocolError(
            f"a chunk of transfer {header.transfer}, at {header.offset}, came through a window that was not open"
        )

    def close(self, lease: Lease, *, is_complete: bool) -> None:
        """Let nothing more through. `is_complete`: all of the transfer has come."""
        for number in lease.numbers & self._open.keys():
            # One that nothing came through may not have been heard of yet: its number is not to be used again before.
            if is_complete and number in self._used:
                self._outbox.invalidate(self._open[number].window)
            elif number not in self._stopping:
                self._outbox.stop(number)
                self._stopping[number] = _Stopping(self._unheard, self._slots)
        self._post()

    def said(self) -> None:
        """Work of ours is done, perhaps what tells the peer to stop."""
        for number, stopping in self._stopping.items():
            if not self._outbox.is_stopping(number):
                stopping.said()

    def _unheard(self) -> None:
        self._fail(
            f"the peer was told to stop writing to memory of a transfer that ended, and did not within {_STOP_S:g} s"
        )

    def stopped(self, number: int) -> None:
        """The peer writes no more through it. Raises `RemoteProtocolError` if it was not told to."""
        stopping = self._stopping.pop(number, None)
        if stopping is None:
            raise RemoteProtocolError(f"the peer stopped window {number}, which it was not told to")
        stopping.cancel()
        self._outbox.invalidate(self._open[number].window)

    def invalidated(self, windows: Sequence[Window]) -> None:
        """Nothing comes through these any more."""
        for number in [n for n, opened in self._open.items() if opened.window in windows]:
            self._forget(number)

    def end(self) -> None:
        """The queue pair is destroyed, and with it the way to all of them."""
        self._is_over = True
        self._post, self._fail = _nothing, _nothing  # the lane's: a circle would keep its ring
        for stopping in self._stopping.values():
            stopping.cancel()
        self._stopping.clear()
        for number in list(self._open):
            self._forget(number)

    def _forget(self, number: int) -> None:
        opened = self._open.pop(number)
        self._used.discard(number)
        opened.lease.numbers.discard(number)
        if not opened.lease.numbers:
            opened.lease.over.set_result(None)
        try:
            opened.window.close()
        except (
            OSError
        ) as exc:  # nothing comes through it, and what a device keeps is no matter of the memory
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a memory window could not be closed", "exception": exc}
            )


def _nothing(*_: object) -> None:
    """There is no lane any more."""
