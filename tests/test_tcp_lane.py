"""What only a lane over a stream of bytes can meet: damage, gaps, half frames, dribbles."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from aiordma.errors import ChannelBroken, RemoteProtocolError
from aiordma.lanes.tcp import TcpLane
from aiordma.wire import frames
from aiordma.wire.frames import ChunkHeader
from tests.foreign import nothing_left
from tests.harness import LARGE, LaneUser, chunk, socket_pair, turns, until

pytestmark = pytest.mark.usefixtures("loop_kind")


@pytest.fixture
async def raw() -> AsyncIterator[tuple[LaneUser, socket.socket]]:
    """A TCP lane's user, and a bare socket at the other end."""
    async with nothing_left():
        near, far = socket_pair()
        user = LaneUser(TcpLane(near, asyncio.get_running_loop())).start()
        yield user, far
        far.close()
        await user.lane.aclose()
        await user.lane.aclose()
        assert len(user.told("lost")) <= 1


def frame(payload: bytes, sequence: int, offset: int = 0) -> bytes:
    header, _ = chunk(payload, offset=offset)
    return frames.encode_chunk(header, sequence) + payload


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


WRONG = {
    **{f"bit {bit}": (flipped(frame(b"x", 1), bit), "is damaged") for bit in range(0, 512, 37)},
    "a frame is missing": (frame(b"x", 2), "frame 1 was due, frame 2 came"),
    "a frame comes twice": (frame(b"x", 1) * 2, "frame 2 was due, frame 1 came"),
    "another protocol": (b"GET / HTTP/1.1\r\n" * 4, "is damaged"),
    "out of step": (frame(b"xx", 1)[:-1] + frame(b"x", 2), "is damaged"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_damage_is_detected(raw, name):
    user, far = raw
    data, text = WRONG[name]
    far.send(data)
    await until(lambda: user.told("lost"))
    (error,) = user.told("lost")
    assert isinstance(error, RemoteProtocolError)
    assert text in str(error)
    assert user.lane.room == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", None),
        (frame(b"whole", 1), None),
        (frame(b"whole", 1)[:-2], "3 bytes into a chunk of 5"),
        (frame(b"whole", 1)[:40], "40 bytes into a header"),
    ],
)
async def test_a_stream_that_ends(raw, data, text):
    user, far = raw
    far.send(data)
    far.close()
    await until(lambda: user.told("lost"))
    (error,) = user.told("lost")
    if text is None:
        assert error is None
    else:
        assert type(error) is ChannelBroken
        assert text in str(error)


async def test_a_connection_that_is_reset(raw):
    user, far = raw
    user.send(chunk(bytes(LARGE)))
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    await until(lambda: user.told("lost"))
    (error,) = user.told("lost")
    assert type(error) is ChannelBroken
    assert isinstance(error.__cause__, OSError)
    assert not user.told("sent")


async def test_bytes_that_dribble_in(raw):
    user, far = raw
    stream = b"".join(frame(b"abc", i + 1, offset=i) for i in range(4))
    stream = stream[:67] + frames.encode_credit(6, 2) + frame(b"abcdefg", 3, offset=1)
    for byte in stream:
        far.send(bytes([byte]))
        await turns(2)
    await until(lambda: len(user.payloads) == 2)
    assert user.payloads == {(1, 0): b"abc", (1, 1): b"abcdefg"}
    assert user.told("credited") == [6]


async def test_a_chunk_in_many_pieces_through_a_tiny_buffer():
    async with nothing_left():
        near, far = socket_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        loop = asyncio.get_running_loop()
        left, right = (LaneUser(TcpLane(sock, loop)).start() for sock in (near, far))
        rng = random.Random(5)
        parts = [memoryview(rng.randbytes(rng.randint(1, 9000))) for _ in range(100)]
        whole = b"".join(parts)
        left.send((ChunkHeader(0, len(whole), 1, 0, None), parts), chunk(b"next", offset=1))
        for i in range(20):
            left.lane.credit(1 << i)
            await turns(1)
        await until(lambda: len(right.payloads) == 2)
        assert right.payloads == {(1, 0): whole, (1, 1): b"next"}
        assert sum(right.told("credited")) == (1 << 20) - 1
        await left.lane.aclose()
        await right.lane.aclose()


async def test_a_chunk_that_is_recalled_before_its_first_byte_went_out(raw):
    user, far = raw
    count = 0
    while not user.lane._writer.views:  # until not even a credit goes out any more
        user.lane.credit(1)
        count += 1
    payload = bytearray(b"as it was")
    user.send(chunk(payload))
    user.lane.recall(1, is_sending=True)
    payload[:] = b"different"
    stream = bytearray()

    def is_read() -> bool:
        with contextlib.suppress(BlockingIOError):
            stream.extend(far.recv(1 << 20))
        return len(stream) == (count + 1) * frames.HEADER_BYTES + len(payload)

    await until(is_read)
    assert user.told("sent") == [chunk(payload)[0]]
    assert stream[count * frames.HEADER_BYTES :] == frame(b"as it was", count + 1)


async def test_the_peer_notices_the_end_though_another_process_holds_the_socket(raw):
    user, far = raw
    with user.lane._sock.dup():  # as a forked one does
        await user.lane.aclose()
        assert far.recv(1) == b""
