"""What a lane's peer may get wrong, frame by frame: each row names the error, its cause and its remedy.

Each row runs with the foreign peer as client and as server. Afterwards no task, socket or slot is left, and the
peer was hung up on.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiordma import ChannelBroken, RemoteProtocolError
from aiordma.wire import frames
from aiordma.wire.control import Claim, Message
from aiordma.wire.frames import ChunkHeader
from tests.foreign import AGAIN, REMEDY, ROLES, Foreign, connected, ends, row

pytestmark = pytest.mark.usefixtures("loop_kind")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiordma.port._GRACE_S", 0.02)


def chunk_frame(sequence: int = 1, **changed: Any) -> bytes:
    header = ChunkHeader(slot=0, length=64, transfer=1, offset=0, check=None)._replace(**changed)
    return frames.encode_chunk(header, sequence)


def resealed(data: bytes, at: int, value: int) -> bytes:
    """The frame with one byte changed, and a header check that is right again."""
    body = bytearray(data[:56])
    body[at] = value
    return bytes(body) + struct.pack("<Q", frames.xxh3(bytes(body)))


def raw(data: bytes) -> Callable[[Foreign], Awaitable[None]]:
    return lambda foreign: foreign.lanes[0].write(data)


async def cut_off_in(foreign: Foreign, nbytes: int) -> None:
    await foreign.open()
    await foreign.lanes[0].write((chunk_frame() + bytes(64))[:nbytes])
    foreign.lanes[0].close()
    foreign.lanes.clear()


async def reset_in_a_chunk(foreign: Foreign) -> None:
    await foreign.open()
    await foreign.lanes[0].write(chunk_frame() + bytes(9))
    foreign.lanes[0].reset()
    foreign.lanes.clear()


async def frame_twice(foreign: Foreign) -> None:
    await foreign.open(8192)
    await foreign.lanes[0].write((chunk_frame(length=4096) + bytes(4096)) * 2)


async def slot_twice(foreign: Foreign) -> None:
    await foreign.chunk(await foreign.open(8192), bytes(4096), slot=0)
    await foreign.chunk(await foreign.open(8192), bytes(4096), slot=0)


async def second_early(foreign: Foreign) -> None:
    await foreign.chunk(1, bytes(64), offset=0)
    await foreign.chunk(1, bytes(64), offset=64)


LANE_ROWS = [
    row(
        "a bad header check",
        raw(chunk_frame()[:56] + bytes(8)),
        "lane frame 1 is damaged (61696f7201000000...): its header check fails",
    ),
    row("a wrong magic", raw(resealed(chunk_frame(), 0, ord("A"))), "lane frame 1 is damaged (41"),
    row("noise", raw(b"\xa5" * 64), "lane frame 1 is damaged"),
    row("an unknown kind", raw(resealed(chunk_frame(), 4, 9)), "lane frame 1 is of kind 9"),
    row("a gap", raw(chunk_frame(2)), "lane frame 1 was due, frame 2 came"),
    row("a frame twice", frame_twice, "lane frame 2 was due, frame 1 came"),
    row("no payload", raw(chunk_frame(length=0)), "a chunk of 0 bytes came for a slot of 4096"),
    row(
        "beyond the slot", raw(chunk_frame(length=4160)), "a chunk of 4160 bytes came for a slot of"
    ),
    row("4 GiB", raw(chunk_frame(length=(1 << 32) - 1)), "a chunk of 4294967295 bytes came"),
    row("a slot beyond the ring", raw(chunk_frame(slot=4)), "slot 4, which was not granted"),
    row("a slot far beyond it", raw(chunk_frame(slot=65535)), "slot 65535, which was not granted"),
    row("a slot that is full", slot_twice, "slot 0, which was not granted"),
    row("transfer 0", raw(chunk_frame(transfer=0)), "a chunk of transfer 0: ids begin with 1"),
    row(
        "beyond the OPEN window",
        raw(chunk_frame(transfer=5)),
        "a chunk of transfer 5, beyond the 4 that may be open",
    ),
    row(
        "a second early chunk",
        second_early,
        "a second chunk of transfer 1, which is neither open nor",
    ),
    row(
        "a credit that is not held",
        lambda f: f.credit(1),
        "gives back slot 0, which it does not hold",
    ),
    row("a credit beyond the ring", lambda f: f.credit(1 << 255), "gives back slot 255"),
    row(
        "cut off in a header",
        lambda f: cut_off_in(f, 10),
        "lane 0 (tcp) is lost: the peer ended the connection 10 bytes into a header",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
    row(
        "cut off in a chunk",
        lambda f: cut_off_in(f, 74),
        "lane 0 (tcp) is lost: the peer ended the connection 10 bytes into a chunk of 64",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
    row(
        "reset in a chunk",
        reset_in_a_chunk,
        "lane 0 (tcp) is lost: ",
        "Connection reset by peer",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
    row(
        "ended between two frames",
        lambda f: cut_off_in(f, 0),
        "lane 0 (tcp) is lost: it ended",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("act", "error", "texts"), LANE_ROWS)
async def test_a_lane_that_went_wrong(act, error, texts, role):
    async with connected(role) as (channel, foreign):
        await act(foreign)
        await ends(channel, foreign, error, texts)


MISFITS = [
    pytest.param([(64, 4096)], "has no chunk of 4096 bytes at 64", id="between two borders"),
    pytest.param([(12288, 4096)], "has no chunk of 4096 bytes at 12288", id="beyond the end"),
    pytest.param([(1 << 63, 4096)], "at 9223372036854775808", id="far beyond the end"),
    pytest.param([(8192, 4096)], "has no chunk of 4096 bytes at 8192", id="too long at the end"),
    pytest.param([(0, 64)], "has no chunk of 64 bytes at 0", id="too short"),
    pytest.param([(0, 4096), (0, 4096)], "the chunk at 0 came twice", id="twice"),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("chunks", "text"), MISFITS)
async def test_a_chunk_that_its_transfer_does_not_have(chunks, text, role):
    async with connected(role) as (channel, foreign):
        receiving = asyncio.create_task(channel.recv_tensors())
        transfer = await foreign.open(10_000)
        await foreign.hear(Claim)
        for offset, nbytes in chunks:
            await foreign.chunk(transfer, bytes(nbytes), offset=offset)
        with pytest.raises(RemoteProtocolError, match=f"transfer 1.*{text}.*{REMEDY}"):
            await receiving
        await ends(channel, foreign, RemoteProtocolError, (text,))


@pytest.mark.parametrize("role", ROLES)
async def test_a_second_chunk_that_nobody_claimed(role):
    async with connected(role) as (channel, foreign):
        transfer = await foreign.open(8192)
        await foreign.say(Message(b"\x01"))
        await channel.recv()  # so the OPEN came before the chunks
        await foreign.chunk(transfer, bytes(4096), offset=0)
        await foreign.chunk(transfer, bytes(4096), offset=4096)
        text = "a second chunk of transfer 1, which is not claimed"
        await ends(channel, foreign, RemoteProtocolError, (text, REMEDY))
