"""An RDMA device without hardware: queue pairs that move frames between rings, as the manuals say of them.

Memory is reached by its address alone, and only where it is registered; what happens, happens on the loop's turns:
the doorbell in one, the bytes in the next, the acknowledgement in a later one. ibv_post_send(3), ibv_poll_cq(3);
InfiniBand specification 9.7 (reliable connections), 10.3.1 (the states of a queue pair).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from aiordma.lanes.completion import Completion, CompletionPump
from aiordma.lanes.outbox import Frame, Outbox, Piece, Sources
from aiordma.lanes.rdma import EXTRA_RECEIVES, RdmaLane
from aiordma.lanes.registry import Registry, address_of
from aiordma.lanes.statuses import FLUSHED, explain
from aiordma.ring import BUDGET, MemoryBudget, Ring, slot_offset
from aiordma.wire.frames import HEADER_BYTES
from tests.fake_cq import Device as Queues, FakeCompletion, FakeQueue

PROTECTION, REMOTE_ACCESS, NO_ANSWER, NOT_READY = 4, 10, 12, 13
"""What else becomes of a work request (IBV_WC_...)."""
QUEUE_SLACK: Final = 160
"""As `aiordma.lanes.verbs` has it."""
_FRAMES_A_TURN: Final = 3

_numbers = itertools.count(17)
_keys = itertools.count(0x1000)


class _Region:
    """Registered memory. The device forgets it when nobody refers to this any more."""

    def __init__(self, regions: dict[int, tuple[int, int]], at: int, nbytes: int) -> None:
        self.lkey = next(_keys)
        regions[self.lkey] = (at, at + nbytes)
        weakref.finalize(self, regions.pop, self.lkey)


class FakeDevice:
    """What one loop has of a device: its registered memory, and its completion pump while there are queue pairs."""

    def __init__(
        self, make_queue: Callable[[int], FakeQueue] = FakeQueue, *, registered_bytes: int = 1 << 40
    ) -> None:
        self._queues = Queues(make_queue)
        self.regions: dict[int, tuple[int, int]] = {}
        self.pump: CompletionPump[FakeQueue] = self._queues.pump(queue_entries=4096)
        self.registry = Registry(self.pin, registered_bytes)
        self.queue_pairs = 0
        self.frames_a_turn = _FRAMES_A_TURN

    def pin(self, at: int, nbytes: int) -> _Region:
        """Register memory."""
        return _Region(self.regions, at, nbytes)

    def may_read(self, piece: Piece) -> bool:
        """Whether all of it is registered under its key."""
        start, end = self.regions.get(piece.lkey, (0, 0))
        return start <= piece.address and piece.address + piece.length <= end

    async def release(self) -> None:
        """A queue pair is gone; the last one takes the pump along."""
        self.queue_pairs -= 1
        if not self.queue_pairs:
            self.registry.clear()
            assert not self.pump.strays
            await self.pump.aclose()


class FakeQueuePair:
    """A `QueuePair`. `is_held` keeps frames from going on their way, until `carry`.

    A `silent` one that is gone lets its peer wait for answers for ever, as one does for the seconds that a device
    goes on trying; else its peer is told at once.
    """

    def __init__(
        self, device: FakeDevice, ring: Ring, stages: Ring, depth: int, receives: int
    ) -> None:
        self.number = next(_numbers)
        self.reservation = device.pump.reserve(depth + receives)
        self.reservation.queue.queue_pairs += 1
        self.device = device
        self.wire = _Wire(self, depth)
        self.counts = Counts()
        self.receives = 0
        self._memory = ring, stages
        self._regions = [device.pin(address_of(r.memory), r.memory.nbytes) for r in (ring, stages)]
        self._stages_at = address_of(stages.memory)
        self.ring_at = address_of(ring.memory)
        self.ring_end = self.ring_at + ring.memory.nbytes
        self.is_open = False
        self.silent = False
        device.queue_pairs += 1

    @property
    def name(self) -> str:
        return f"fake0/1, queue pair {self.number}"

    def connect(self, peer: FakeQueuePair, *, is_open: bool = True) -> None:
        """Be ready to send and receive. The ring is open to the peer at once, or not before `expose`."""
        self.wire.peer, self.is_open = peer, is_open
        self.post_receives(self.reservation._work_requests - self.wire.depth)

    def stage(self, index: int, length: int) -> Piece:
        at = self._stages_at + slot_offset(index, self._memory[1].slot_bytes)
        return Piece(at, length, self._regions[1].lkey)

    # The protocol

    def submit(self, batch: Sequence[Frame]) -> None:
        assert batch, "a doorbell for nothing"
        self.wire.post(batch)
        self.counts.doorbells += 1
        self.counts.frames += len(batch)

    def post_receives(self, count: int) -> None:
        assert not self.wire.has_failed, "rxe does not flush a receive that is posted in ERR"
        self.receives += count
        assert self.receives <= self.reservation._work_requests - self.wire.depth

    def expose(self, work_id: int) -> bool:
        if self.is_open:
            return False
        asyncio.get_running_loop().call_soon(self._exposed, work_id)
        return True

    def _exposed(self, work_id: int) -> None:
        self.is_open = True
        self.add(work_id)

    def fail(self, work_id: int) -> None:
        self.wire.fail()
        asyncio.get_running_loop().call_soon(self.add, work_id, FLUSHED)

    def explain(self, completion: Completion) -> str:
        return explain(completion.status, completion.vendor_err)

    async def aclose(self) -> None:
        self.wire.is_gone = True
        self.reservation.queue.queue_pairs -= 1
        self.reservation.release()
        self._regions.clear()
        self._memory[1].close()
        await self.device.release()

    # The device's side

    def add(self, work_id: int, status: int = 0, *, imm_data: int = 0) -> None:
        """A completion."""
        if not self.wire.is_gone:
            entry = FakeCompletion(self.number, work_id, status, imm_data=imm_data)
            self.reservation.queue.add(entry)

    def write(self, target: int, piece: Piece) -> int:
        """The peer's device writes to our ring; what becomes of it."""
        start = self.ring_at + target
        if self.wire.is_gone or self.wire.has_failed:
            return NO_ANSWER
        if piece.length and not (self.is_open and start + piece.length <= self.ring_end):
            self.wire.fail()
            return REMOTE_ACCESS
        ctypes.memmove(start, piece.address, piece.length)
        return 0

    def announce(self, immediate: int) -> int:
        """A write with immediate takes a receive."""
        if self.wire.is_gone or self.wire.has_failed:
            return NO_ANSWER
        if not self.receives:
            return NOT_READY
        self.receives -= 1
        self.add(0, imm_data=socket.htonl(immediate))
        return 0

    def flush_receives(self) -> None:
        """They complete with an error."""
        for _ in range(self.receives):
            self.add(0, FLUSHED)
        self.receives = 0


class Counts:
    """What a queue pair's sending side did."""

    def __init__(self) -> None:
        self.doorbells = 0
        self.frames = 0
        self.work_requests = 0
        self.send_completions = 0
        self.read_bytes = 0
        """Of memory that is not inline."""


class _Wire:
    """The send queue of a queue pair, and the way to the peer."""

    def __init__(self, owner: FakeQueuePair, depth: int) -> None:
        self.depth = depth
        self.peer: FakeQueuePair | None = None
        self.has_failed = False
        self.is_gone = False
        self.is_held = False
        self.withholds_acks = False
        """The peer has it, and the sender does not know."""
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._posted: deque[Frame] = deque()
        self._unacked: deque[Frame] = deque()
        self._taken = 0
        self._is_scheduled = False

    @property
    def is_idle(self) -> bool:
        """Whether it has no work, or is gone."""
        return self.is_gone or not (self._posted or self._unacked)

    def post(self, batch: Sequence[Frame]) -> None:
        """All of it, or none. A place is free again when it, or a later one, has completed."""
        assert self.peer is not None
        count = sum(map(_requests, batch))
        if self.is_gone or self._taken + count > self.depth:
            raise OSError(errno.ENOMEM, "the send queue is full")
        self._taken += count
        self._owner.counts.work_requests += count
        # A device knows addresses, and keeps nothing alive.
        self._posted += [
            f._replace(pieces=[p._replace(holder=None) for p in f.pieces]) for f in batch
        ]
        if self.has_failed:
            self._loop.call_soon(self._flush)
        else:
            self._schedule()

    def carry(self, count: int) -> None:
        """Let so many frames through, now."""
        for _ in range(min(count, len(self._posted))):
            if self.has_failed or self.is_gone or not self._carry_one():
                return

    def hold(self, is_held: bool = True) -> None:
        """From now on frames go only where `carry` lets them; or as they come again."""
        self.is_held = is_held
        self._schedule()

    def fail(self, status: int = FLUSHED) -> None:
        """Go to the error state: all that is under way completes with an error, receives too."""
        if not self.has_failed:
            self.has_failed = True
            self._loop.call_soon(self._flush, status)

    def _schedule(self) -> None:
        if self._posted and not (self._is_scheduled or self.is_held):
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        if not self.is_held:
            self.carry(self._owner.device.frames_a_turn)
            self._schedule()

    def _carry_one(self) -> bool:
        frame = self._posted.popleft()
        self._unacked.append(frame)
        status = self._execute(frame)
        if status == NO_ANSWER and self.peer is not None and self.peer.silent:
            return True
        if status:
            self.fail(status)
        elif frame.is_signalled:
            self._loop.call_soon(self._acknowledge, frame)
        return not status

    def _execute(self, frame: Frame) -> int:
        assert self.peer is not None
        target = frame.target
        for piece in frame.pieces:
            if not self._owner.device.may_read(piece):
                return PROTECTION
            status = self.peer.write(target, piece)
            if status:
                return status
            self._owner.counts.read_bytes += piece.length
            target += piece.length
        header = ctypes.create_string_buffer(frame.header)
        inline = Piece(ctypes.addressof(header), len(frame.header), 0)
        status = self.peer.write(frame.cell * HEADER_BYTES, inline)
        if status or frame.immediate is None:
            return status
        return self.peer.announce(frame.immediate)

    def _acknowledge(self, frame: Frame) -> None:
        """The peer's device has all up to this one."""
        if not (self.has_failed or self.is_gone or self.withholds_acks):
            self._complete(frame)

    def acknowledge(self) -> None:
        """All that has gone."""
        if self._unacked:
            self._acknowledge(self._unacked[-1])

    def _complete(self, frame: Frame) -> None:
        while self._unacked:
            done = self._unacked.popleft()
            self._taken -= _requests(done)
            if done.is_signalled:
                self._owner.counts.send_completions += 1
                self._owner.add(done.work_id)
            if done is frame:
                return

    def _flush(self, status: int = FLUSHED) -> None:
        """Each work request completes, the unsignalled ones too."""
        if self.is_gone:
            return
        if status != FLUSHED:  # what is under way arrived, but for the last
            failed = self._unacked.pop()
            if self._unacked:
                self._complete(self._unacked[-1])
            self._unacked.append(failed)
        while self._unacked or self._posted:
            frame = (self._unacked or self._posted).popleft()
            for _ in range(_requests(frame)):
                self._owner.add(frame.work_id, status)
                status = FLUSHED
            self._taken -= _requests(frame)
        self._owner.flush_receives()


def _requests(frame: Frame) -> int:
    return len(frame.pieces) + 1


def open_lane(
    device: FakeDevice, ring: Ring, peer: Ring, *, budget: MemoryBudget = BUDGET
) -> tuple[FakeQueuePair, RdmaLane]:
    """A lane whose queue pair is not connected yet, made as `aiordma.lanes.verbs` makes it."""
    depth, receives = 2 * peer.slots + QUEUE_SLACK, ring.slots + peer.slots + EXTRA_RECEIVES
    stages = Ring(peer.slots + max(2, peer.slots // 2), peer.slot_bytes, budget=budget)
    pair = FakeQueuePair(device, ring, stages, depth, receives)
    sources = Sources(stages, pair.stage, device.registry.find)
    outbox = Outbox(sources, depth=depth, peer_slots=peer.slots, peer_slot_bytes=peer.slot_bytes)
    lane = RdmaLane(pair, ring, outbox, watch=pair.reservation.watch)
    pair.reservation.attach(pair.number, lane)
    return pair, lane


def lane_pair(
    left: Ring,
    right: Ring,
    devices: tuple[FakeDevice, FakeDevice] | None = None,
    *,
    budget: MemoryBudget = BUDGET,
    is_open: bool = True,
) -> tuple[tuple[FakeQueuePair, RdmaLane], tuple[FakeQueuePair, RdmaLane]]:
    """Two lanes that are connected, with their queue pairs; each end has a device of its own."""
    near, far = devices or (FakeDevice(), FakeDevice())
    one = open_lane(near, left, right, budget=budget)
    other = open_lane(far, right, left, budget=budget)
    one[0].connect(other[0], is_open=is_open)
    other[0].connect(one[0], is_open=is_open)
    return one, other
