"""What the tests of lanes and channels run on: pairs in one process, and what must be true of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import importlib
import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig
from aiordma.assembly import join, memory_pair
from aiordma.control import MemoryControl
from aiordma.errors import RemoteProtocolError
from aiordma.handshake import limits_of, reserve
from aiordma.lanes.base import Lane, LaneHandler
from aiordma.lanes.choice import choose
from aiordma.lanes.memory import MemoryLane
from aiordma.lanes.tcp import TcpLane
from aiordma.ring import MemoryBudget, Ring
from aiordma.wire.frames import ChunkHeader
from tests import fake_device
from tests.conftest import LOOPS, no_verbs
from tests.fake_device import FakeDevice

LANES = ("memory", "reordered", "tcp", "rdma")
"""Every lane there is; "reordered" is a memory lane whose chunks overtake each other, "rdma" has a fake device."""

# As `pytest -m verbs` selects them; not even collected where there is no device.
_VERBS = () if no_verbs() else (pytest.mark.verbs,)
LANE_PARAMS = (*LANES, *(pytest.param("verbs", marks=mark) for mark in _VERBS))
"""For tests that run over a real device too, where there is one."""
VERBS_KINDS = [pytest.param(("verbs", 2), marks=mark) for mark in _VERBS]
"""Of these, kind and number of lanes."""

LARGE = 16 << 20
"""More than the kernel takes off a sender whose peer does not read, and more than a turn of the loop moves."""
CANARY = 0xA5
LANE_SLOTS = {"verbs": 4}
"""That the ring of each of a pair of lanes has: 16, unless all of it is pinned."""

_PATIENCE_S = 10.0
"""How long to wait for what must come, on a machine that may be busy. Nothing ever waits so long for nothing."""


class ReorderingLane:
    """A memory lane that keeps a few chunks back, and sends them in any order; credits overtake them all.

    It is a lane and, for the lane within, a handler. The seed is fixed: a failure comes again.
    """

    kind = "memory"
    _DEPTH = 4

    def __init__(self, inner: MemoryLane, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop
        self._handler: LaneHandler | None = None
        self._held: list[tuple[ChunkHeader, Sequence[memoryview]]] = []
        self._random = random.Random(6)

    @classmethod
    def pair(cls, loop: asyncio.AbstractEventLoop) -> tuple[ReorderingLane, ReorderingLane]:
        left, right = MemoryLane.pair(loop)
        return cls(left, loop), cls(right, loop)

    @property
    def room(self) -> int:
        return max(0, self._DEPTH - len(self._held)) if self._inner.room else 0

    def start(self, handler: LaneHandler) -> None:
        self._handler = handler
        self._inner.start(self)

    def post(self, header: ChunkHeader, parts: Sequence[memoryview]) -> None:
        self._held.append((header, parts))
        self._loop.call_soon(self._pump)

    def credit(self, slots: int) -> None:
        self._inner.credit(slots)

    def recall(self, transfer: int, *, is_sending: bool) -> bool:
        if is_sending:
            self._held = [
                (header, [memoryview(b"".join(parts))] if header.transfer == transfer else parts)
                for header, parts in self._held
            ]
        return self._inner.recall(transfer, is_sending=is_sending)

    async def aclose(self) -> None:
        self._held.clear()
        await self._inner.aclose()

    def _pump(self) -> None:
        while self._held and self._inner.room:
            self._inner.post(*self._held.pop(self._random.randrange(len(self._held))))

    # What the lane within says

    @property
    def is_busy(self) -> bool:
        assert self._handler is not None
        return self._handler.is_busy

    def place(self, header: ChunkHeader) -> memoryview:
        assert self._handler is not None
        return self._handler.place(header)

    def arrived(self, header: ChunkHeader) -> None:
        assert self._handler is not None
        self._handler.arrived(header)

    def sent(self, headers: Sequence[ChunkHeader]) -> None:
        assert self._handler is not None
        # The lane within makes room only after this.
        self._loop.call_soon(self._pump)
        self._handler.sent(headers)

    def copied(self, nbytes: int) -> None:
        assert self._handler is not None
        self._handler.copied(nbytes)

    def credited(self, slots: int) -> None:
        assert self._handler is not None
        self._handler.credited(slots)

    def lost(self, exc: Exception | None) -> None:
        assert self._handler is not None
        self._handler.lost(exc)


@dataclass(eq=False)
class LaneUser:
    """Uses a lane: keeps what it is told, in order, and posts its backlog whenever there is room."""

    lane: Lane
    peer: LaneUser | None = None
    """Who gives the slots back, out of band."""
    slots: list[int] = field(default_factory=lambda: list(range(16)))
    """Free ones of the peer's. To the tests every chunk is one for slot 0."""
    posted: dict[int, ChunkHeader] = field(default_factory=dict)
    """By slot, until they have arrived."""
    events: list[tuple[str, object]] = field(default_factory=list)
    payloads: dict[tuple[int, int], bytes] = field(default_factory=dict)
    targets: dict[tuple[int, int], bytearray] = field(default_factory=dict)
    backlog: list[tuple[ChunkHeader, list[memoryview]]] = field(default_factory=list)
    is_busy: bool = False
    refuses: bool = False
    was_touched: bool = False
    copied_bytes: int = 0

    def start(self) -> LaneUser:
        self.lane.start(self)
        return self

    def send(self, *chunks: tuple[ChunkHeader, list[memoryview]]) -> None:
        self.backlog += chunks
        while self.backlog and self.lane.room and self.slots:
            header, parts = self.backlog.pop(0)
            slot = self.slots.pop(0)
            self.posted[slot] = header._replace(slot=slot)
            self.lane.post(self.posted[slot], parts)

    def told(self, name: str) -> list[Any]:
        return [what for event, what in self.events if event == name]

    def has_sent_and_got(self, count: int) -> Callable[[], bool]:
        return lambda: len(self.told("arrived")) == len(self.told("sent")) == count

    # The handler

    def place(self, header: ChunkHeader) -> memoryview:
        assert self.peer is None or header == self.peer.posted[header.slot]
        header = header._replace(slot=0)
        self.events.append(("place", header))
        if self.refuses:
            raise RemoteProtocolError("not this one")
        target = self.targets.setdefault(key(header), bytearray([CANARY]) * header.length)
        if ("arrived", header) not in self.events and self.told("place").count(header) == 1:
            self.was_touched |= any(byte != CANARY for byte in (target[0], target[-1]))
        return memoryview(target)[: header.length]

    def arrived(self, header: ChunkHeader) -> None:
        self.events.append(("arrived", header._replace(slot=0)))
        self.payloads[key(header)] = bytes(self.targets[key(header)][: header.length])
        if self.peer is not None:
            assert header == self.peer.posted.pop(header.slot)
            self.peer.slots.append(header.slot)
            self.peer.send()

    def sent(self, headers: Sequence[ChunkHeader]) -> None:
        self.events += [("sent", header._replace(slot=0)) for header in headers]
        self.send()

    def copied(self, nbytes: int) -> None:
        self.copied_bytes += nbytes

    def credited(self, slots: int) -> None:
        self.events.append(("credited", slots))
        if self.refuses:
            raise RemoteProtocolError("not mine")

    def lost(self, exc: Exception | None) -> None:
        self.events.append(("lost", exc))


def key(header: ChunkHeader) -> tuple[int, int]:
    return header.transfer, header.offset


def chunk(
    payload: bytes | bytearray, *, transfer: int = 1, offset: int = 0
) -> tuple[ChunkHeader, list[memoryview]]:
    """What `post` takes."""
    return ChunkHeader(0, len(payload), transfer, offset, None), [memoryview(payload)]


async def lane_users(kind: str) -> tuple[LaneUser, LaneUser]:
    """Two users of lanes that are each other's peer, not started."""
    slots = LANE_SLOTS.get(kind, 16)
    left, right = (
        LaneUser(lane, slots=list(range(slots))) for lane in await lane_pair(kind, slots)
    )
    left.peer, right.peer = right, left
    return left, right


async def lane_pair(kind: str, slots: int) -> tuple[Lane, Lane]:
    """Two lanes that are each other's peer, not started."""
    loop = asyncio.get_running_loop()
    if kind == "memory":
        return MemoryLane.pair(loop)
    if kind == "reordered":
        return ReorderingLane.pair(loop)
    budget = MemoryBudget(1 << 40)  # slots of this size cost nothing before they are used
    if kind == "rdma":
        near_ring, far_ring = (Ring(slots, LARGE, budget=budget) for _ in range(2))
        (_, left), (_, right) = fake_device.lane_pair(near_ring, far_ring, budget=budget)
        return left, right
    if kind == "verbs":
        return await verbs_lanes(*(Ring(slots, LARGE, budget=budget) for _ in range(2)))
    near, far = socket_pair()
    return TcpLane(near, loop), TcpLane(far, loop)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A non-blocking TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


async def verbs_lanes(*rings: Ring) -> tuple[Lane, Lane]:
    """Two lanes over queue pairs of this machine's first device."""
    gc.collect()  # users of lanes know each other: the rings of those before, all pinned, are in circles
    verbs = importlib.import_module("aiordma.lanes.verbs")
    choice = choose(verbs.survey())
    limits = limits_of(ChannelConfig(slot_bytes=LARGE), list(rings))
    ends = []
    for ring in rings:
        device = verbs.Device.open(choice.port.device, registered_bytes=1 << 30)
        ends.append(verbs.open_lane(device, choice, ring, limits))
    for (pair, lane), (peer, _) in zip(ends, reversed(ends), strict=True):
        pair.connect(peer.address, 0.0)
        await lane.expose()
    return ends[0][1], ends[1][1]


@asynccontextmanager
async def channel_pair(
    kind: str, left: ChannelConfig | None = None, right: ChannelConfig | None = None
) -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a channel over lanes of this kind; `right` has the left one's configuration by default."""
    right = right or left
    if kind == "verbs":
        left, right = (_patient(config) for config in (left, right))
    async with contextlib.AsyncExitStack() as stack:
        if kind in ("tcp", "verbs"):
            listener = await stack.enter_async_context(aiordma.listen(config=right))
            near = await stack.enter_async_context(
                aiordma.connect(
                    *listener.address,
                    config=left,
                    require=kind,  # type: ignore[arg-type]
                    timeout_s=30,
                )
            )
            far = await listener.accept()
        elif kind == "rdma":
            near, far = rdma_channels(left or ChannelConfig(), right or ChannelConfig())
            await stack.enter_async_context(near)
        else:
            lane = ReorderingLane if kind == "reordered" else MemoryLane
            with mock.patch("aiordma.assembly.MemoryLane", lane):
                near, far = await memory_pair(left, right)
            await stack.enter_async_context(near)
        async with far:
            yield near, far


def _patient(config: ChannelConfig | None) -> ChannelConfig:
    """A real device's processor may be an emulated one, on a machine that does other things."""
    return dataclasses.replace(config or ChannelConfig(), probe_s=20, connect_timeout_s=30)


def rdma_channels(left: ChannelConfig, right: ChannelConfig) -> tuple[Channel, Channel]:
    """Both ends of a channel over queue pairs of two fake devices, one for either end."""
    count = min(left.lanes, right.lanes)
    devices = FakeDevice(), FakeDevice()
    ends = [(config, reserve(config, count)) for config in (left, right)]
    pairs = [
        fake_device.lane_pair(*rings, devices) for rings in zip(ends[0][1], ends[1][1], strict=True)
    ]
    limits = [limits_of(config, rings) for config, rings in ends]
    controls = MemoryControl.pair()
    near, far = (
        join(
            controls[i],
            [pair[i][1] for pair in pairs],
            ends[i][1],
            limits[1 - i],
            ends[i][0],
            peer="fake",
            reason="a fake device",
            rtt_s=0.0,
            registry=devices[i].registry,
        )
        for i in (0, 1)
    )
    return near, far


def run(coroutine: Coroutine[Any, Any, None], loop_kind: str = "asyncio") -> None:
    """Run on a loop of its own: a hypothesis test cannot be `async`."""
    with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(coroutine)


async def turns(count: int) -> None:
    """Let the loop turn so often."""
    for _ in range(count):
        await asyncio.sleep(0)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Returns when the task is over, whichever way."""
    task.cancel()
    await asyncio.wait([task])


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop turn until it is so."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"it never came to be: {what or condition}"
        await asyncio.sleep(0)


async def round_trips(*channels: Channel, count: int = 3) -> None:
    """Until whatever was on its way when this was called has come, and been answered."""
    for _ in range(count):
        for channel in channels:
            await channel.ping()


def is_at_rest(channel: Channel) -> bool:
    """Nothing is open, nothing under way, every slot where it belongs."""
    stats = channel.stats()
    held = sum(lane.held_slots for lane in stats.lanes)
    return not (stats.in_flight_chunks or held or stats.open_sends or stats.open_receives)


async def at_rest(*channels: Channel) -> None:
    """Every slot comes back, without any more being asked."""
    await until(lambda: all(map(is_at_rest, channels)), f"{[c.stats() for c in channels]} at rest")


async def usable(left: Channel, right: Channel) -> None:
    """A message and a transfer, of several chunks if these are small, go each way; both ends come to rest."""
    for near, far in ((left, right), (right, left)):
        array = noise(min(2 * near._link.session._chunk_bytes, 1 << 20) + 100)
        _, got, _, message = await asyncio.gather(
            near.send_tensor(array, confirm=True), far.recv_tensor(), near.send("well?"), far.recv()
        )
        assert np.array_equal(got, array)
        assert message == "well?"
    await at_rest(left, right)


_NOISE = np.frombuffer(random.Random(9).randbytes(16 << 20), np.uint8)


def noise(nbytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of which no two ranges are alike, nor those of two seeds; at most 8 MiB."""
    first = seed * 4099
    assert first + nbytes <= _NOISE.nbytes
    return _NOISE[first : first + nbytes].copy()


def alike(got: Any, sent: Any) -> bool:
    """The same dtype, shape and bits."""
    if got.dtype != sent.dtype or got.shape != sent.shape:
        return False
    flat = (array.reshape(-1).view(_byte(array)) for array in (got, sent))
    return bool((next(flat) == next(flat)).all())


def _byte(array: Any) -> Any:
    return np.uint8 if isinstance(array, np.ndarray) else sys.modules["torch"].uint8


@asynccontextmanager
async def program(source: str, *args: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another Python process that runs this source; killed if it still runs at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", source, *map(str, args)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
