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
from collections.abc import Callable, Sequence
from typing import Final

from aiordma import Channel
from aiordma.lanes.completion import Completion, CompletionPump
from aiordma.lanes.needs import needs
from aiordma.lanes.outbox import Frame, Outbox, Piece, Sources, Window, WindowWork
from aiordma.lanes.rdma import RdmaLane
from aiordma.lanes.registry import Registry, address_of
from aiordma.lanes.statuses import FLUSHED, explain
from aiordma.ring import BUDGET, MemoryBudget, Ring, slot_offset
from tests.fake_cq import Device as Queues, FakeCompletion, FakeQueue
from tests.fake_wire import NO_ANSWER, NOT_READY, REMOTE_ACCESS, Counts, Wire

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

    def pin(self, at: int, nbytes: int, is_writable: bool = False) -> _Region:
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
        self.wire = Wire(self, depth)
        self.counts = Counts()
        self.receives = 0
        self.windows: dict[int, tuple[int, int]] = {}
        """Bound ones: the first and the last address behind a key."""
        self.unbound: set[int] = set()
        self.is_out_of_windows = False
        self.window_failure: OSError | None = None
        """What closing one raises."""
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

    def open_window(self, memory: memoryview) -> Window | None:
        piece = self.device.registry.find(memory, is_to_write=True)
        if piece is None:
            return None
        if self.is_out_of_windows:
            raise OSError(errno.ENOMEM, "no more windows")
        key = next(_keys)
        self.unbound.add(key)

        def close() -> None:
            assert key not in self.windows or self.wire.is_gone, "it is bound"
            self.unbound.remove(key)
            if self.window_failure is not None:
                raise self.window_failure

        return Window(piece, key, None, close)

    # The protocol

    def submit(self, batch: Sequence[Frame | WindowWork]) -> None:
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
        self.windows.clear()
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

    def may_write(self, key: int, target: int, nbytes: int) -> int:
        """Whether the peer's device may begin a message to memory behind a window; what becomes of it."""
        if self.wire.is_gone or self.wire.has_failed:
            return NO_ANSWER
        start, end = self.windows.get(key, (0, 0))
        if start <= target and target + nbytes <= end:
            return 0
        self.wire.fail()
        return REMOTE_ACCESS

    def change(self, work: WindowWork) -> None:
        """Bind or invalidate a window."""
        window, piece = work.window, work.window.piece
        if work.is_bind:
            assert window.key in self.unbound, "a second bind"
            assert self.device.may_read(piece), "a window to what is not registered"
            self.windows[window.key] = (piece.address, piece.address + piece.length)
        else:
            del self.windows[window.key]

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


def queue_pair(channel: Channel) -> FakeQueuePair:
    """Of a channel's only lane."""
    (port,) = channel._link.ports
    assert isinstance(port.lane, RdmaLane)
    assert isinstance(port.lane._qp, FakeQueuePair)
    return port.lane._qp


def open_lane(
    device: FakeDevice, ring: Ring, peer: Ring, *, budget: MemoryBudget = BUDGET
) -> tuple[FakeQueuePair, RdmaLane]:
    """A lane whose queue pair is not connected yet, made as `aiordma.lanes.verbs` makes it."""
    asked = needs(ring.slots, ring.slot_bytes, peer.slots, peer.slot_bytes)
    stages = Ring(asked.stages, peer.slot_bytes, budget=budget)
    pair = FakeQueuePair(device, ring, stages, asked.sends, asked.receives)
    sources = Sources(stages, pair.stage, device.registry.find, pair.open_window)
    outbox = Outbox(
        sources, depth=asked.sends, peer_slots=peer.slots, peer_slot_bytes=peer.slot_bytes
    )
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
