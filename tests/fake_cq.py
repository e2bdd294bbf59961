"""A completion queue without a device: what the manuals say of one, and what they warn of.

ibv_get_cq_event(3), ibv_req_notify_cq(3), ibv_poll_cq(3), ibv_create_cq(3).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aiordma.lanes.completion import Completion, CompletionPump, Reservation

MOMENTS = (
    "before get_events",
    "after get_events",
    "after ack",
    "before arm",
    "after arm",
    "before poll",
    "after poll",
)


class FakeCompletion(NamedTuple):
    qp_num: int
    wr_id: int
    status: int = 0
    vendor_err: int = 0
    byte_len: int = 0
    imm_data: int = 0


class FakeQueue:
    """The pump's side is the protocol `CompletionQueue`; the device's side is `add`.

    `at` is called at each of the MOMENTS, so that a test can make the device do something just then.
    """

    def __init__(self, capacity: int, at: Callable[[str], None] = lambda moment: None) -> None:
        self.capacity = capacity
        self.at = at
        self.calls: list[str] = []
        self.entries: deque[FakeCompletion] = deque()
        self.failure: OSError | None = None
        self.loses_events = False
        self.is_armed = False
        self.is_closed = False
        self.queue_pairs = 0
        self.unacked = 0
        self._false_alarms = 0
        # As the completion channel's: blocking, until somebody sets it otherwise.
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    # The device's side

    def add(self, *entries: FakeCompletion) -> None:
        """Work requests complete. One more than the capacity, and the queue is lost."""
        for entry in entries:
            if len(self.entries) == self.capacity:
                self.failure = OSError(errno.EIO, "the CQ has overrun")
                return
            self.entries.append(entry)
            if self.is_armed:
                self.is_armed = False
                self.announce(0 if self.loses_events else 1)

    def announce(self, events: int) -> None:
        """Events, with or without a completion."""
        os.eventfd_write(self._fd, events)

    def alarm_falsely(self) -> None:
        """The descriptor is readable, but reading it would block."""
        self._false_alarms += 1
        self.announce(1)

    # The pump's side

    def fileno(self) -> int:
        return self._fd

    def get_events(self) -> int:
        self._step("get_events")
        assert not os.get_blocking(self._fd), "a read without an event would hold the interpreter"
        events = -self._false_alarms
        self._false_alarms = 0
        try:
            while os.eventfd_read(self._fd):
                events += 1
        except BlockingIOError:
            self.unacked += events
        self.at("after get_events")
        return events

    def ack(self, events: int) -> None:
        assert 0 < events <= self.unacked
        self._step("ack", f" {events}")
        self.unacked -= events
        self.at("after ack")

    def arm(self) -> None:
        """For what comes from now on: what is in the queue already raises no event."""
        self._step("arm")
        self.is_armed = True
        self.at("after arm")

    def poll(self, count: int) -> list[FakeCompletion]:
        self._step("poll")
        polled = [self.entries.popleft() for _ in range(min(count, len(self.entries)))]
        self.at("after poll")
        return polled

    def close(self) -> None:
        assert not self.is_closed
        assert not self.unacked, "ibv_destroy_cq would wait for ever for the ack"
        if self.queue_pairs:
            raise OSError(errno.EBUSY, "queue pairs use the CQ")
        self.is_closed = True
        os.close(self._fd)

    def _step(self, call: str, detail: str = "") -> None:
        assert not self.is_closed
        self.at(f"before {call}")
        self.calls.append(call + detail)
        if self.failure is not None:
            raise self.failure


class PolledFirst(FakeQueue):
    """Serves whoever arms first and polls then as if it had polled first and armed then: the known mistake."""

    _is_arming = False

    def arm(self) -> None:
        self._is_arming = True

    def poll(self, count: int) -> list[FakeCompletion]:
        polled = super().poll(count)
        if self._is_arming:
            self._is_arming = False
            super().arm()
        return polled


class Device:
    """Makes queues for the pumps of the running loop, and keeps them at hand."""

    def __init__(self, make: Callable[[int], FakeQueue] = FakeQueue) -> None:
        self.make = make
        self.queues: list[FakeQueue] = []

    def open_queue(self, entries: int) -> FakeQueue:
        queue = self.make(entries)
        self.queues.append(queue)
        return queue

    def pump(self, *, queue_entries: int = 1024, tick_s: float = 3600) -> CompletionPump[FakeQueue]:
        """A pump. Its tick is out of the way, unless a test asks for it."""
        return CompletionPump(self.open_queue, queue_entries=queue_entries, tick_s=tick_s)

    def discard(self) -> None:
        """Close what is open still, with no regard to what a device would say to that."""
        for queue in self.queues:
            if not queue.is_closed:
                asyncio.get_running_loop().remove_reader(queue.fileno())
                queue.queue_pairs = queue.unacked = 0
                queue.close()


class Recorder:
    """A handler that keeps what it gets, and `then` does something."""

    def __init__(self) -> None:
        self.is_busy = False
        """Whether it wants more ticks."""
        self.batches: list[list[int]] = []
        self.losses: list[Exception] = []
        self.then: Callable[[], None] = lambda: None

    def ticked(self, tick_s: float) -> bool:
        return self.is_busy

    def completed(self, batch: Sequence[Completion]) -> None:
        self.batches.append([entry.wr_id for entry in batch])
        self.then()

    def lost(self, exc: Exception) -> None:
        self.losses.append(exc)
        self.then()

    @property
    def got(self) -> list[int]:
        return [wr_id for batch in self.batches for wr_id in batch]


def of(qp_num: int, *wr_ids: int) -> list[FakeCompletion]:
    """Completions of one queue pair."""
    return [FakeCompletion(qp_num, wr_id) for wr_id in wr_ids]


def join(
    pump: CompletionPump[FakeQueue], qp_num: int = 7, work_requests: int = 64
) -> tuple[Recorder, Reservation[FakeQueue]]:
    """One more queue pair."""
    handler, reservation = Recorder(), pump.reserve(work_requests)
    reservation.attach(qp_num, handler)
    return handler, reservation


async def turns(count: int = 20) -> None:
    """Let everything run that can, and what descriptors that are readable bring."""
    for _ in range(count):
        await asyncio.sleep(0)
