"""Peers that lie about memory windows."""

from __future__ import annotations

import socket

import pytest

from aiordma import Channel
from aiordma.errors import RemoteProtocolError
from aiordma.lanes.outbox import WINDOWS, Kind
from aiordma.ring import WINDOW_CELLS
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader, WindowHeader
from tests.fake_device import queue_pair
from tests.harness import channel_pair, turns, until

pytestmark = pytest.mark.usefixtures("loop_kind")

SLOT = 4096


def say(channel: Channel, kind: Kind, index: int, header: bytes = b"") -> None:
    """A frame comes to this end."""
    device = queue_pair(channel)
    if header:
        device._memory[0].memory[index * 64 : index * 64 + 64] = header
    device.receives -= 1
    device.add(0, imm_data=socket.htonl(kind << 16 | index))


@pytest.mark.parametrize(
    ("kind", "index", "header", "text"),
    [
        (Kind.STOPPED, 3, b"", "window 3, which it was not told to"),
        (Kind.STOP, WINDOWS, b"", "unknown immediate"),
        (
            Kind.WINDOW,
            WINDOW_CELLS + 1,
            frames.encode_window(WindowHeader(0, 1, 1, 0, SLOT, 4096), 1),
            "window 0 was announced in cell 513",
        ),
        (
            Kind.CHUNK,
            0,
            frames.encode_chunk(ChunkHeader(0, SLOT, 1, 0, None, is_in_place=True), 1),
            "came through a window that was not open",
        ),
    ],
    ids=["stopped", "stop", "window", "chunk"],
)
async def test_what_no_peer_says(kind: Kind, index: int, header: bytes, text: str) -> None:
    async with channel_pair("rdma") as (_, far):
        await turns(3)
        say(far, kind, index, header)
        await until(lambda: far.is_closed)
        assert type(far._link.error) is RemoteProtocolError
        assert text in str(far._link.error)


@pytest.mark.parametrize(
    "header",
    [
        frames.encode_window(WindowHeader(0, 1, 1, 0, SLOT, 4096), 1),
        frames.encode_chunk(ChunkHeader(0, SLOT, 1, 0, None, is_in_place=True), 1),
    ],
    ids=["window", "chunk"],
)
async def test_a_tcp_lane_has_no_windows(header: bytes) -> None:
    async with channel_pair("tcp") as (near, far):
        (port,) = near._link.ports
        port.lane._sock.send(header)  # type: ignore[attr-defined]
        await until(lambda: far.is_closed)
        assert type(far._link.error) is RemoteProtocolError
        assert "memory windows" in str(far._link.error)
