"""A peer that speaks the wire by hand over raw sockets, so that a test can bend any one thing of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig, ChannelError, Manifest, RemoteProtocolError, TensorSpec
from aiordma.ring import BUDGET
from aiordma.wire import control, frames, hello, manifest as manifests
from aiordma.wire.control import Frame, Open, Ping, Pong
from aiordma.wire.frames import ChunkHeader, CreditHeader
from aiordma.wire.hello import Answer, Body, Hello, LaneProof, Limits
from tests.conftest import leak_check

ROLES = ("client", "server")
"""What the foreign peer is: it connects to our listener, or our `connect` reaches it."""

CONFIG = ChannelConfig(
    slots=4,
    slot_bytes=4096,
    messages=4,
    message_bytes=1 << 14,
    open_transfers=4,
    manifest_bytes=1 << 17,
    max_tensors=100,
    max_transfer_bytes=1 << 20,
    close_timeout_s=0.2,
)
"""Windows so small that a test reaches beyond them in a few frames."""

LIMITS = Limits(8, 4096, 8, 1 << 14, 8, 1 << 17)
"""What the foreign peer says that it accepts."""

REMEDY = "same version on both ends"
AGAIN = "connect again"

CONTROL_HEADER = struct.Struct("<IB3xQQ")
_KINDS: dict[int, type[Frame]] = {kind.kind: kind for kind in Frame.__subclasses__()}
F = TypeVar("F", bound=Frame)


def row(
    name: str,
    act: Callable[[Foreign], Awaitable[object]],
    *texts: str,
    error: type[ChannelError] = RemoteProtocolError,
    remedy: str = REMEDY,
) -> Any:
    return pytest.param(act, error, (*texts, remedy), id=name)


async def fate(channel: Channel) -> ChannelError:
    """The error that a channel ends with. Takes nothing from its queues, so that no window is moved."""
    while True:
        try:
            await channel.ping()
        except ChannelError as exc:
            return exc


async def ends(channel: Channel, foreign: Foreign, error: type[Exception], texts: tuple[str, ...]):
    """The channel fails with exactly this error, for everybody, and hangs up."""
    found = await fate(channel)
    assert type(found) is error
    for text in texts:
        assert text in str(found)
    await foreign.ended()
    for call in (
        channel.send(1),
        channel.send_tensor(np.zeros(3)),
        channel.recv_tensor(),
        channel.ping(),
    ):
        with pytest.raises(error):
            await call


class HungUp(Exception):
    """The end under test closed this connection."""


class Wire:
    """A non-blocking socket, read in exact lengths."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    @classmethod
    async def dial(cls, address: tuple[str, int]) -> Wire:
        wire = cls(socket.socket())
        await asyncio.get_running_loop().sock_connect(wire.sock, address)
        return wire

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `read` tells of it
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            try:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, n - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise HungUp(f"after {len(data)} of {n} bytes")
            data += piece
        return data

    async def greet(self, kind: bytes, body: Body) -> None:
        await self.write(hello.encode(kind, body))

    async def hear(self) -> Body:
        """A handshake message."""
        _, length = hello.decode_preface(await self.read(hello.PREFACE_BYTES))
        return hello.decode_body(await self.read(length))

    async def ended(self) -> bytes:
        """Read until the other end hangs up; what came until then."""
        data = b""
        with contextlib.suppress(HungUp):
            while True:
                data += await self.read(1)
        return data

    def reset(self) -> None:
        """End the connection as a dying host's kernel does: RST, whatever was still to be sent is lost."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Foreign:
    """One end of a channel. Rightly numbered, checked and credited, unless it is told otherwise."""

    def __init__(self, control_wire: Wire, lanes: list[Wire], slots: int) -> None:
        self.control = control_wire
        self.lanes = lanes
        self.free = [list(range(slots)) for _ in lanes]
        self.sent = 0
        self._received = 0
        self._lane_sent = [0] * len(lanes)
        self._lane_received = [0] * len(lanes)
        self.transfers = 0

    # The control connection

    async def say(
        self, frame: Frame, *, sequence: int | None = None, ack: int | None = None
    ) -> None:
        body = (
            frame.payload if isinstance(frame, control.Message) else msgspec.msgpack.encode(frame)
        )
        if sequence is None and not frame.sequenced:
            sequence = 0
        await self.say_body(frame.kind, body, sequence=sequence, ack=ack)

    async def say_body(
        self, kind: int, body: bytes, *, sequence: int | None = None, ack: int | None = None
    ) -> None:
        """A control frame of any kind and body."""
        if sequence is None:
            self.sent = sequence = self.sent + 1
        ack = self._received if ack is None else ack
        await self.control.write(CONTROL_HEADER.pack(len(body), kind, sequence, ack) + body)

    async def hear(self, wanted: type[F]) -> F:
        """The next frame of this kind; pings are answered on the way, other frames dropped."""
        while True:
            length, kind, sequence, _ = CONTROL_HEADER.unpack(await self.control.read(24))
            body = await self.control.read(length)
            self._received = max(self._received, sequence)
            if kind == control.Message.kind:
                frame: Frame = control.Message(body)
            elif kind:
                frame = msgspec.msgpack.decode(body, type=_KINDS[kind])
            else:
                continue
            if isinstance(frame, Ping):
                await self.say(Pong(frame.token))
            if isinstance(frame, wanted):
                return frame

    async def open(
        self,
        nbytes: int = 64,
        *,
        manifest: bytes | None = None,
        meta: bytes = b"",
        chunk_bytes: int = 4096,
        transfer: int | None = None,
    ) -> int:
        """OPEN, of one U8 tensor of `nbytes` unless a manifest is given. The transfer's id."""
        if transfer is None:
            self.transfers = transfer = self.transfers + 1
        if manifest is None:
            spec = TensorSpec("t", "U8", (nbytes,), 0)
            manifest = manifests.encode(Manifest((spec,), nbytes))
        await self.say(Open(transfer, chunk_bytes, manifest, meta))
        return transfer

    async def ended(self) -> None:
        """Answer pings until the other end has hung up everywhere."""
        with contextlib.suppress(HungUp):
            await self.hear(_Never)
        for lane in self.lanes:
            await lane.ended()

    # Lanes

    async def chunk(
        self,
        transfer: int,
        payload: bytes,
        *,
        offset: int = 0,
        slot: int | None = None,
        length: int | None = None,
        check: int | None = None,
        lane: int = 0,
    ) -> None:
        """A chunk, into a slot that is free unless one is given."""
        if slot is None:
            while not self.free[lane]:
                await self.lane_frame(lane)
            slot = self.free[lane].pop()
        header = ChunkHeader(
            slot,
            len(payload) if length is None else length,
            transfer,
            offset,
            frames.xxh3(payload) if check is None else check,
        )
        await self.lanes[lane].write(frames.encode_chunk(header, self.count(lane)) + payload)

    async def credit(self, slots: int, *, lane: int = 0) -> None:
        await self.lanes[lane].write(frames.encode_credit(slots, self.count(lane)))

    def count(self, lane: int = 0) -> int:
        """The sequence number of the next frame on this lane."""
        self._lane_sent[lane] += 1
        return self._lane_sent[lane]

    async def lane_frame(self, lane: int = 0) -> tuple[ChunkHeader, bytes] | CreditHeader:
        """The next frame on the lane."""
        self._lane_received[lane] += 1
        header = frames.decode(
            await self.lanes[lane].read(frames.HEADER_BYTES), self._lane_received[lane]
        )
        if isinstance(header, CreditHeader):
            self.free[lane] += [i for i in range(256) if header.slots >> i & 1]
            return header
        assert isinstance(header, ChunkHeader)
        return header, await self.lanes[lane].read(header.length)

    def close(self) -> None:
        for wire in (self.control, *self.lanes):
            wire.close()


class _Never(Frame):
    """A frame that nobody sends."""

    kind = 0


@asynccontextmanager
async def connected(
    role: str, config: ChannelConfig = CONFIG, limits: Limits = LIMITS
) -> AsyncIterator[tuple[Channel, Foreign]]:
    """A channel, and the foreign peer at its other end. Nothing may be left of them."""
    async with nothing_left():
        async with _connected(role, config, limits) as ends_:
            yield ends_


@asynccontextmanager
async def _connected(
    role: str, config: ChannelConfig, limits: Limits
) -> AsyncIterator[tuple[Channel, Foreign]]:
    if role == "client":
        async with aiordma.listen(config=config) as listener:
            foreign = await enter(listener.address, limits, config.lanes)
            channel = await listener.accept()
    else:
        async with _serving(None) as (server, address):
            opening = asyncio.ensure_future(aiordma.connect(*address, config=config))
            foreign = await admit(server, limits)
            channel = await opening
    try:
        yield channel, foreign
    finally:
        foreign.close()
        await channel.aclose()


async def enter(address: tuple[str, int], limits: Limits = LIMITS, lanes: int = 1) -> Foreign:
    """Become a channel's client, by the book."""
    wire = await Wire.dial(address)
    await wire.greet(hello.CONTROL, Hello(limits, lanes, ("tcp",)))
    answer = await wire.hear()
    assert isinstance(answer, Answer)
    joined = [await Wire.dial(address) for _ in range(answer.lanes)]
    for i, lane in enumerate(joined):
        await lane.greet(hello.LANE, proof(answer, i))
        assert isinstance(await lane.hear(), LaneProof)
    return Foreign(wire, joined, answer.limits.slots)


def proof(answer: Answer, lane: int, side: str = "client") -> LaneProof:
    """The right proof for a lane."""
    return LaneProof(answer.session, lane, hello.lane_proof(answer.key, answer.session, lane, side))


async def admit(server: socket.socket, limits: Limits = LIMITS) -> Foreign:
    """Become a channel's server, by the book."""
    wire = await accept(server)
    greeting = await wire.hear()
    assert isinstance(greeting, Hello)
    answer = Answer(limits, greeting.lanes, "tcp", os.urandom(16), os.urandom(32))
    await wire.greet(hello.CONTROL, answer)
    lanes = []
    for i in range(answer.lanes):
        lanes.append(await accept(server))
        assert await lanes[i].hear() == proof(answer, i)
        await lanes[i].greet(hello.LANE, proof(answer, i, "server"))
    return Foreign(wire, lanes, greeting.limits.slots)


async def accept(server: socket.socket) -> Wire:
    """The next connection."""
    sock, _ = await asyncio.get_running_loop().sock_accept(server)
    return Wire(sock)


@asynccontextmanager
async def bare_server(
    script: Callable[[Wire], Awaitable[object]] | None = None,
) -> AsyncIterator[tuple[socket.socket, tuple[str, int]]]:
    """A listening socket. With a script, each connection runs it and is closed after it. Nothing may be left."""
    async with nothing_left():
        async with _serving(script) as serving:
            yield serving


@asynccontextmanager
async def _serving(
    script: Callable[[Wire], Awaitable[object]] | None,
) -> AsyncIterator[tuple[socket.socket, tuple[str, int]]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        accepting = asyncio.create_task(_run(server, script)) if script else None
        try:
            yield server, server.getsockname()
        finally:
            if accepting is not None:
                accepting.cancel()
                await asyncio.gather(accepting, return_exceptions=True)


async def _run(server: socket.socket, script: Callable[[Wire], Awaitable[object]]) -> None:
    async with asyncio.TaskGroup() as connections:
        while True:
            connections.create_task(_follow(script, await accept(server)))


async def _follow(script: Callable[[Wire], Awaitable[object]], wire: Wire) -> None:
    with contextlib.closing(wire), contextlib.suppress(HungUp):
        await script(wire)


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fails if its block leaves a task, a socket, a process, or a ring's memory behind, or if a callback raised."""
    used_bytes = BUDGET.used_bytes
    unhandled: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        async with leak_check():
            yield
    finally:
        loop.set_exception_handler(None)
    assert BUDGET.used_bytes == used_bytes, "slots left behind"
    assert not unhandled, unhandled
