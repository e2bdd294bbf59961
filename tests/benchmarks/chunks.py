"""What Python costs a chunk over queue pairs: a whole channel, both ends on one core, over a device that costs nothing.

The same calls in a bare loop, with nothing between them, are what the device's own Python costs.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from aiordma import Channel, ChannelConfig
from aiordma.assembly import join
from aiordma.control import MemoryControl
from aiordma.handshake import limits_of, reserve
from aiordma.lanes.completion import Completion, CompletionPump
from aiordma.lanes.outbox import Frame, Outbox, Piece, Sources, WindowWork
from aiordma.lanes.rdma import RdmaLane
from aiordma.lanes.registry import Registry, address_of
from aiordma.ring import Ring, slot_offset
from aiordma.wire.frames import HEADER_BYTES
from tests.fake_cq import FakeCompletion

AIM_CHUNKS_A_SECOND: Final = 25_000
_DEPTH: Final = 176
_numbers = itertools.count(1)


class Figures(NamedTuple):
    """Of one run."""

    chunk_bytes: int
    chunks_a_second: float
    bare_chunks_a_second: float

    @property
    def ratio(self) -> float:
        """How many times as long a chunk takes as the bare calls."""
        return self.bare_chunks_a_second / self.chunks_a_second


class _Queue:
    """A completion queue, and no more of it than the pump needs."""

    capacity = 4096

    def __init__(self) -> None:
        self.entries: deque[Completion] = deque()
        self._is_armed = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def add(self, number: int, work_id: int, imm_data: int = 0) -> None:
        self.entries.append(FakeCompletion(number, work_id, imm_data=imm_data))
        if self._is_armed:
            self._is_armed = False
            os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def get_events(self) -> int:
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0

    def ack(self, events: int) -> None:
        pass

    def arm(self) -> None:
        self._is_armed = True

    def poll(self, count: int) -> Sequence[Completion]:
        entries = self.entries
        return [entries.popleft() for _ in range(min(count, len(entries)))]

    def close(self) -> None:
        os.close(self._fd)


class _QueuePair:
    """Carries frames out as they are posted."""

    name = "bare"

    def __init__(self, ring: Ring, stages: Ring, pump: CompletionPump[_Queue]) -> None:
        self.number = next(_numbers)
        self.peer = self
        self.pump = pump
        self.reservation = pump.reserve(_DEPTH)
        self._ring_at = address_of(ring.memory)
        self._stages = stages
        self._stages_at = address_of(stages.memory)

    def submit(self, batch: Sequence[Frame | WindowWork]) -> None:
        peer, move = self.peer, ctypes.memmove
        ring_at = peer._ring_at
        for frame in batch:
            assert isinstance(frame, Frame)
            target = ring_at + frame.target
            for piece in frame.pieces:
                move(target, piece.address, piece.length)
                target += piece.length
            if frame.header:
                move(ring_at + frame.cell * HEADER_BYTES, frame.header, HEADER_BYTES)
            if frame.immediate is not None:
                peer.reservation.queue.add(peer.number, 0, socket.htonl(frame.immediate))
            if frame.is_signalled:
                self.reservation.queue.add(self.number, frame.work_id)

    def post_receives(self, count: int) -> None:
        pass

    def expose(self, work_id: int) -> bool:
        return False

    def fail(self, work_id: int) -> None:
        self.reservation.queue.add(self.number, work_id)

    def explain(self, completion: Completion) -> str:
        raise AssertionError(completion)

    def stage(self, index: int, length: int) -> Piece:
        at = self._stages_at + slot_offset(index, self._stages.slot_bytes)
        return Piece(at, length, 0)

    async def aclose(self) -> None:
        self._stages.close()
        self.reservation.release()
        await self.pump.aclose()


class _Region:
    lkey = 1


def _lane(ring: Ring, peer: Ring, registry: Registry) -> tuple[_QueuePair, RdmaLane]:
    stages = Ring(12, peer.slot_bytes)
    pair = _QueuePair(ring, stages, CompletionPump(lambda entries: _Queue()))
    outbox = Outbox(
        Sources(stages, pair.stage, registry.find, lambda memory: None),
        depth=_DEPTH,
        peer_slots=peer.slots,
        peer_slot_bytes=peer.slot_bytes,
    )
    lane = RdmaLane(pair, ring, outbox, watch=pair.reservation.watch)
    pair.reservation.attach(pair.number, lane)
    return pair, lane


def _channels(config: ChannelConfig) -> tuple[Channel, Channel]:
    rings = [reserve(config, 1), reserve(config, 1)]
    registries = [Registry(lambda at, nbytes, is_writable: _Region(), 1 << 40) for _ in rings]
    lanes = [_lane(rings[i][0], rings[1 - i][0], registries[i]) for i in (0, 1)]
    lanes[0][0].peer, lanes[1][0].peer = lanes[1][0], lanes[0][0]
    controls = MemoryControl.pair()
    near, far = (
        join(
            controls[i],
            [lanes[i][1]],
            rings[i],
            limits_of(config, rings[1 - i]),
            config,
            peer="bare",
            reason="bare",
            rtt_s=0.0,
            registry=registries[i],
        )
        for i in (0, 1)
    )
    return near, far


async def through_a_channel(chunk_bytes: int, chunks: int, config: ChannelConfig) -> float:
    """Chunks a second, of which each byte is verified."""
    near, far = _channels(config)
    async with near, far:
        array = np.random.default_rng(7).integers(0, 256, chunk_bytes * chunks, np.uint8)
        into = np.zeros_like(array)
        near.register(array)
        begun = time.perf_counter()
        await asyncio.gather(near.send_tensor(array), far.recv_tensor(into=into))
        took_s = time.perf_counter() - begun
        assert np.array_equal(into, array)
        assert near.stats().sent_chunks == chunks
        assert near.stats().copied_bytes == 0
    return chunks / took_s


async def bare(chunk_bytes: int, chunks: int) -> float:
    """Chunks a second of the same calls: two chunks a batch, and a CREDIT for them; nobody looks at them."""
    ring, stages = Ring(8, chunk_bytes), Ring(4, chunk_bytes)
    pump = CompletionPump(lambda entries: _Queue())
    left, right = _QueuePair(ring, stages, pump), _QueuePair(ring, stages, pump)
    left.peer, right.peer = right, left
    header, piece = bytes(HEADER_BYTES), left.stage(0, chunk_bytes)
    begun = time.perf_counter()
    for i in range(0, chunks, 2):
        batch = [
            Frame(
                i + j + 1, [piece], slot_offset(j, chunk_bytes), header, j, j, j == 1 and not i % 3
            )
            for j in (0, 1)
        ]
        left.submit(batch)
        for far in (right, left):
            queue = far.reservation.queue
            queue.arm()
            queue.get_events()
            for _ in queue.poll(64):
                far.post_receives(1)
            if far is right:
                right.submit([Frame(i + 1, [], 0, header, 256, 1 << 16 | 256, False)])
    took_s = time.perf_counter() - begun
    for pair in (left, right):
        pair.reservation.release()
    await pump.aclose()
    ring.close()
    stages.close()
    return chunks / took_s


async def measure(chunk_bytes: int, chunks: int, *, slots: int = 8) -> Figures:
    """One run of both."""
    config = ChannelConfig(slot_bytes=chunk_bytes, slots=slots)
    return Figures(
        chunk_bytes,
        await through_a_channel(chunk_bytes, chunks, config),
        await bare(chunk_bytes, chunks),
    )
