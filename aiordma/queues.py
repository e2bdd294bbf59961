"""Two small first-in-first-out things that cancellation cannot break: a queue, and a gate to a window."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from aiordma.errors import AiordmaError, again
from aiordma.wire.credit import SendWindow

T = TypeVar("T")


def _ignore(item: object) -> None:
    pass


def _keep(item: object) -> bool:
    return True


class Fifo(Generic[T]):
    """Items in order, for any number of waiting takers in order.

    Not bounded here: the peer's window bounds what can be in it.
    """

    def __init__(
        self,
        *,
        undo: Callable[[T], bool] = _keep,
        on_waiting: Callable[[int], None] = _ignore,
        order: Callable[[T], int] | None = None,
    ) -> None:
        """`undo` takes back what a taker's `accept` did, and says whether the item is still whole;
        `on_waiting` is told how many takers that bring an `accept` wait, whenever that may have changed;
        `order` numbers the items, which rise as they are put."""
        self._items: deque[tuple[int, T]] = deque()
        self._takers: deque[tuple[asyncio.Future[tuple[int, T]], Callable[[T], None]]] = deque()
        self._count = 0
        self._order = order
        self._undo = undo
        self._on_waiting = on_waiting
        self._error: AiordmaError | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def waiting(self) -> int:
        """How many takers wait."""
        return len(self._takers)

    @property
    def accepting(self) -> int:
        """How many of them bring an `accept`: they want the next item, whatever it is."""
        return sum(accept is not _ignore for _, accept in self._takers)

    def put(self, item: T) -> None:
        """Hand the item to the first taker that waits, else keep it."""
        self._count += 1
        self._items.append((self._count if self._order is None else self._order(item), item))
        self._hand_over()

    def put_back(self, item: T) -> None:
        """Make it the first item again, behind those of a lower `order` that came back too."""
        self._restore((0 if self._order is None else self._order(item), item))

    def discard(self, is_gone: Callable[[T], bool]) -> None:
        """Drop the items that nobody took and nobody should."""
        self._items = deque(entry for entry in self._items if not is_gone(entry[1]))

    def fail(self, error: AiordmaError) -> None:
        """Nothing will be put any more: takers get the error once the items are gone."""
        self._error = error
        takers, self._takers = self._takers, deque()
        for future, _ in takers:
            if not future.done():
                future.set_exception(again(error))

    async def take(self, accept: Callable[[T], None] = _ignore) -> T:
        """The next item. `accept` is called with it the moment that it is there; if it raises, so does
        this, and the item stays first. Cancelling loses no item."""
        if self._items and not self._takers:
            _, item = self._items[0]
            accept(item)
            self._items.popleft()
            return item
        if self._error is not None:
            raise again(self._error)
        future: asyncio.Future[tuple[int, T]] = asyncio.get_running_loop().create_future()
        self._takers.append((future, accept))
        self._on_waiting(self.accepting)
        try:
            return (await future)[1]
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                if self._undo(future.result()[1]):
                    self._restore(future.result())
            else:
                self._takers = deque(t for t in self._takers if t[0] is not future)
                self._on_waiting(self.accepting)
            raise

    def _restore(self, entry: tuple[int, T]) -> None:
        # Several takers may be cancelled with an item in hand, and give them back in any order.
        at = 0
        while at < len(self._items) and self._items[at][0] < entry[0]:
            at += 1
        self._items.insert(at, entry)
        self._hand_over()

    def _hand_over(self) -> None:
        if not (self._items and self._takers):
            return
        while self._items and self._takers:
            future, accept = self._takers.popleft()
            if future.done():
                continue
            entry = self._items[0]
            try:
                accept(entry[1])
            except Exception as exc:
                # Whatever the taker's own arrays raise is the taker's to know, not the putter's.
                self._undo(entry[1])
                future.set_exception(exc)
                continue
            self._items.popleft()
            future.set_result(entry)
        self._on_waiting(self.accepting)


class Gate:
    """Whoever wants to send waits here, in order, until the peer's window has room."""

    def __init__(self, window: SendWindow) -> None:
        self._window = window
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._error: AiordmaError | None = None

    async def enter(self, nbytes: int) -> None:
        """Spend `nbytes` of the window. A cancelled wait spends nothing."""
        if self._error is not None:
            raise again(self._error)
        if not self._waiting and self._window.fits(nbytes):
            self._window.spend(nbytes)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (nbytes, future)
        self._waiting.append(waiter)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._window.refund(nbytes)
            raise
        finally:
            # Only now: who was let in and does not run yet must not be overtaken by a newcomer.
            self._waiting.remove(waiter)
            self.open()

    def open(self) -> None:
        """The window may have grown: let in whom it fits."""
        for nbytes, future in self._waiting:
            if future.done():
                continue
            if not self._window.fits(nbytes):
                break
            self._window.spend(nbytes)
            future.set_result(None)

    def fail(self, error: AiordmaError) -> None:
        """Nobody gets in any more."""
        self._error = error
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(again(error))


class Gates(NamedTuple):
    """What this end may send only as the peer's windows allow."""

    opens: Gate
    messages: Gate
