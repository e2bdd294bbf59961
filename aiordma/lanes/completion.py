"""Completion queues on an event loop: what the device has done becomes calls on the loop's thread.

A completion queue (CQ) tells of new completions through its completion channel, a file descriptor, but only
once each time that it is armed, and only of what comes after that. So, each time the descriptor is readable::

    get events ──▶ ack ──▶ ARM ──▶ poll until empty ──▶ deliver
                                   └─ beyond the budget: other callbacks first, then on from here

Polled first and armed after, a completion from between the two would be announced by nobody, ever. Armed
first, it is either polled or announced; at worst an event comes to an empty queue, which is no error.
ibv_get_cq_event(3), ibv_req_notify_cq(3), ibv_poll_cq(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from aiordma.errors import Busy, ChannelBroken

__all__ = ["Completion", "CompletionHandler", "CompletionPump", "CompletionQueue", "Reservation"]

_BUDGET: Final = 64
"""Completions that one callback polls before other callbacks get their turn."""


class Completion(Protocol):
    """One work completion; pyverbs' `WC` is one. Unless `status` is 0, only the first four are valid."""

    @property
    def qp_num(self) -> int: ...
    @property
    def wr_id(self) -> int: ...
    @property
    def status(self) -> int: ...
    @property
    def vendor_err(self) -> int: ...
    @property
    def byte_len(self) -> int: ...
    @property
    def imm_data(self) -> int:
        """In network byte order."""


class CompletionQueue(Protocol):
    """A CQ with a completion channel of its own. No call blocks; a device that fails raises `OSError`."""

    @property
    def capacity(self) -> int:
        """How many completions it holds. One more, and it is lost with all queue pairs on it."""

    def fileno(self) -> int:
        """The completion channel's descriptor, readable while there are events."""

    def get_events(self) -> int:
        """Take the events there are, or some of them; how many. 0 where reading would block (EAGAIN)."""

    def ack(self, events: int) -> None:
        """Acknowledge events that were taken. The CQ cannot be destroyed before."""

    def arm(self) -> None:
        """Ask for one event, at the next completion that is added."""

    def poll(self, count: int) -> Sequence[Completion]:
        """Take up to `count` completions; fewer only when there are no more."""

    def close(self) -> None:
        """Destroy CQ and completion channel. The queue pairs on it are destroyed already."""


class CompletionHandler(Protocol):
    """Whom the completions of one queue pair are for."""

    def ticked(self, tick_s: float) -> bool:
        """The queue was looked at without an event, `tick_s` after the last time. Whether to look again."""

    def completed(self, batch: Sequence[Completion]) -> None:
        """These completions came, in this order.

        If it raises, the rest of the batch is not seen again: `lost` follows, and later batches still come,
        so that flushed work requests give their memory back.
        """

    def lost(self, exc: Exception) -> None:
        """The queue failed, and nothing comes any more, or `completed` raised. Called once at most."""


Q = TypeVar("Q", bound=CompletionQueue)
A = TypeVar("A")
R = TypeVar("R")


class CompletionPump(Generic[Q]):
    """The completion queues that one device has on one event loop: the one that runs when this is made.

    All calls, here and on a `Reservation`, are for the loop's own thread; elsewhere they raise
    `RuntimeError`. Each loop makes its own pump.
    """

    def __init__(
        self,
        open_queue: Callable[[int], Q],
        *,
        queue_entries: int = 4096,
        tick_s: float = 0.25,
    ) -> None:
        """`open_queue(entries)` makes a CQ that holds at least so many; what it raises, `reserve` raises.

        Should a driver lose an event, a look at the queues every `tick_s` finds what it was for. It is taken
        only while a handler wants it or completions come, and once after.
        """
        self._loop = asyncio.get_running_loop()
        self._open_queue = open_queue
        self._queue_entries = queue_entries
        self._tick_s = tick_s
        self._queues: list[_SharedQueue[Q]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def missed_events(self) -> int:
        """How often an open queue held completions that no event had announced: a driver's fault, or ours."""
        return sum(queue.missed_events for queue in self._queues)

    @property
    def strays(self) -> int:
        """Completions that were dropped because no handler was attached for their queue pair."""
        return sum(queue.strays for queue in self._queues)

    def reserve(self, work_requests: int) -> Reservation[Q]:
        """Room for one queue pair's completions, on a CQ that has it, or else on a new one.

        `work_requests` is all that can be outstanding: its send and receive queues' lengths together.
        Unsignalled ones count, since they complete too when they fail.
        """
        self.check_loop()
        if work_requests < 1:
            raise ValueError(f"a queue pair of {work_requests} work requests")
        if self._is_closed:
            raise RuntimeError("the completion pump is closed")
        for queue in self._queues:
            if queue.has_room(work_requests):
                break
        else:
            cq = self._open_queue(max(work_requests, self._queue_entries))
            queue = _SharedQueue(cq, self._loop, self.watch)
            self._queues.append(queue)
        queue.reserved += work_requests
        return Reservation(self, queue, work_requests)

    async def aclose(self) -> None:
        """Destroy the queues. Raises `Busy`, and goes on, while there are reservations.

        Their queue pairs live, and work requests of theirs may still hold memory. Cancelling it does not
        keep the queues.
        """
        self.check_loop()
        if any(queue.reserved for queue in self._queues):
            raise Busy(
                "queue pairs still use the completion queues: destroy them and release their reservations"
            )
        self._is_closed = True
        queues, self._queues = self._queues, []
        with contextlib.ExitStack() as stack:
            for queue in queues:
                queue.stop()
                stack.callback(queue.cq.close)
            # uvloop takes a reader off later than it says; the number must not be reused before.
            await asyncio.sleep(0)

    def check_loop(self) -> None:
        """Raises `RuntimeError` unless the loop of this pump is running this."""
        running = None
        with contextlib.suppress(RuntimeError):
            running = asyncio.get_running_loop()
        if running is not self._loop:
            raise RuntimeError(
                "a completion pump is used outside its event loop: each loop makes its own, and other "
                "threads go through loop.call_soon_threadsafe()"
            )

    def watch(self) -> None:
        """Tick until nothing moves and no handler wants it."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if sum(queue.tick(self._tick_s) for queue in self._queues):  # all of them are asked
            self.watch()


class Reservation(Generic[Q]):
    """Room for one queue pair's completions. Made by `CompletionPump.reserve`."""

    def __init__(
        self, pump: CompletionPump[Q], shared: _SharedQueue[Q], work_requests: int
    ) -> None:
        self._pump = pump
        self._shared = shared
        self._work_requests = work_requests
        self._qp_num: int | None = None

    @property
    def queue(self) -> Q:
        """The CQ to make the queue pair on, for its sends and its receives."""
        return self._shared.cq

    def attach(self, qp_num: int, handler: CompletionHandler) -> None:
        """Completions of the queue pair go to the handler from now on: attach before anything is posted.

        Raises `ChannelBroken` if the CQ has failed since it was reserved.
        """
        self._pump.check_loop()
        if not self._work_requests or self._qp_num is not None:
            raise RuntimeError("a reservation is attached once, and not after its release")
        self._shared.join(qp_num, handler)
        self._qp_num = qp_num

    def watch(self) -> None:
        """Look after the queue as long as the handler wants. Raises `OSError` if that has failed."""
        self._pump.check_loop()
        self._shared.check()
        self._pump.watch()

    def release(self) -> None:
        """Give the room back, after the queue pair was destroyed. The handler is not called again.

        What it left in the CQ is taken out, so that neither the room nor the queue pair's number, which the
        device may give to another, means anything old. Released twice is released once.
        """
        self._pump.check_loop()
        self._shared.leave(self._work_requests, self._qp_num)
        self._work_requests, self._qp_num = 0, None


class _User:
    """A handler, until it was told that it is lost, and what it raises."""

    def __init__(self, handler: CompletionHandler, loop: asyncio.AbstractEventLoop) -> None:
        self.handler = handler
        self.is_over = False
        self._loop = loop

    def deliver(self, batch: Sequence[Completion]) -> None:
        self._call("a completion", self.handler.completed, batch)

    def ticked(self, tick_s: float) -> bool:
        return bool(self._call("a tick", self.handler.ticked, tick_s))

    def lose(self, exc: Exception) -> None:
        if not self.is_over:
            self.is_over = True
            self._call("being lost", self.handler.lost, exc)

    def _call(self, when: str, call: Callable[[A], R], argument: A) -> R | None:
        """Whatever the handler raises is its own affair: the others' completions must go on."""
        try:
            return call(argument)
        except Exception as exc:
            message = f"{type(self.handler).__qualname__} raised on {when}"
            self._loop.call_exception_handler({"message": message, "exception": exc})
            self.lose(exc)
            return None


class _SharedQueue(Generic[Q]):
    """One CQ, who shares it, and what was polled and not delivered yet."""

    def __init__(self, cq: Q, loop: asyncio.AbstractEventLoop, watch: Callable[[], None]) -> None:
        """Takes the CQ over: if it cannot be armed, it is closed."""
        self.cq = cq
        self.reserved = 0
        self.missed_events = 0
        self.strays = 0
        self._loop = loop
        self._watch = watch
        self._users: dict[int, _User] = {}
        self._polled: defaultdict[int, list[Completion]] = defaultdict(list)
        self._is_moving = False
        self._is_scheduled = False
        self._is_stopped = False
        self._failure: OSError | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(cq.close)
            # Neither loop promises it, and a blocking read would hold the interpreter.
            os.set_blocking(cq.fileno(), False)
            cq.arm()
            loop.add_reader(cq.fileno(), self._turn)
            stack.pop_all()

    def has_room(self, work_requests: int) -> bool:
        return self._failure is None and self.reserved + work_requests <= self.cq.capacity

    def check(self) -> None:
        if self._failure is not None:
            raise OSError(self._failure.errno, "the completion queue failed") from self._failure

    def join(self, qp_num: int, handler: CompletionHandler) -> None:
        if self._failure is not None:
            raise ChannelBroken(
                f"the completion queue failed: {self._failure}; connect again"
            ) from self._failure
        if qp_num in self._users:
            raise RuntimeError(f"queue pair {qp_num} has a handler already")
        self._users[qp_num] = _User(handler, self._loop)

    def leave(self, work_requests: int, qp_num: int | None) -> None:
        if qp_num is not None:
            self._users.pop(qp_num).is_over = True
            # All that a destroyed queue pair left is among the first `capacity`, whatever others add.
            self._poll(self.cq.capacity)
            self._polled.pop(qp_num, None)
            if self._polled:
                self._schedule()
        self.reserved -= work_requests

    def tick(self, tick_s: float) -> bool:
        """Look without an event. Whether to look again later."""
        self._turn(is_tick=True)
        is_moving, self._is_moving = self._is_moving, False
        is_wanted = sum(user.ticked(tick_s) for user in list(self._users.values()))
        return not self._is_stopped and (is_moving or is_wanted > 0)

    def stop(self) -> None:
        """No more callbacks."""
        if not self._is_stopped:
            self._is_stopped = True
            self._loop.remove_reader(self.cq.fileno())

    def _turn(self, *, is_tick: bool = False) -> None:
        if self._is_stopped:
            return
        is_announced = self._is_scheduled
        try:
            events = self.cq.get_events()
            if events:
                self.cq.ack(events)
            elif not is_tick:
                return  # a false alarm: it is still armed
            self.cq.arm()
        except OSError as exc:
            self._fail(exc)
            return
        if self._drain() and not events and not is_announced:
            self.missed_events += 1

    def _drain(self) -> int:
        """Poll and deliver up to a budget, and see to the rest. It was armed since it was last empty."""
        count = self._poll(_BUDGET)
        if count:
            self._is_moving = True
            self._watch()
        try:
            self._deliver()
        finally:
            # After what the batch woke up.
            if count == _BUDGET or self._polled:
                self._schedule()
        return count

    def _deliver(self) -> None:
        while self._polled:
            qp_num = next(iter(self._polled))
            batch = self._polled.pop(qp_num)
            if qp_num in self._users:
                self._users[qp_num].deliver(batch)
            else:
                self.strays += len(batch)

    def _poll(self, count: int) -> int:
        if self._is_stopped:
            return 0
        try:
            batch = self.cq.poll(count)
        except OSError as exc:
            self._fail(exc)
            return 0
        for completion in batch:
            self._polled[completion.qp_num].append(completion)
        return len(batch)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._is_scheduled = False
        self._drain()

    def _fail(self, exc: OSError) -> None:
        self._failure = exc
        self.stop()
        for user in list(self._users.values()):
            user.lose(exc)
