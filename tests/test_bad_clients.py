"""What may come to a port that is no sound aiordma: what it is told, cause and remedy.

Afterwards no task, socket or slot is left, and a good peer still gets its channel.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aiordma
from aiordma import (
    ChannelConfig,
    Listener,
)
from aiordma.wire import hello
from aiordma.wire.control import Message
from aiordma.wire.hello import Answer, Body, Hello, LaneProof, Refusal
from tests.conftest import sockets
from tests.foreign import CONFIG, LIMITS, REMEDY, Foreign, HungUp, Wire, enter, nothing_left, proof
from tests.harness import until

pytestmark = pytest.mark.usefixtures("loop_kind")

IMPATIENT = dataclasses.replace(CONFIG, connect_timeout_s=0.1)
GRANT = Answer(LIMITS, 1, "tcp", b"s" * 16, b"k" * 32)
CANNOT_BE = "the peer offers limits that cannot be"
PREFACE = struct.Struct("<7scHHI")

Script = Callable[[Wire], Awaitable[object]]


def message(body: Body, kind: bytes = hello.CONTROL, *, version: int = hello.WIRE_VERSION) -> bytes:
    """A handshake message, perhaps of another wire version."""
    data = bytearray(hello.encode(kind, body))
    data[8:10] = version.to_bytes(2, "little")
    return bytes(data)


def limited(**changed: int) -> hello.Limits:
    return hello.Limits(**{f: getattr(LIMITS, f) for f in LIMITS.__struct_fields__} | changed)


def granting(**changed: Any) -> bytes:
    return message(Answer(**{f: getattr(GRANT, f) for f in GRANT.__struct_fields__} | changed))


# A hostile client against `listen`


@asynccontextmanager
async def listening(config: ChannelConfig = CONFIG) -> AsyncIterator[Listener]:
    """A listener, of which nothing may be left."""
    async with nothing_left():
        async with aiordma.listen(config=config) as listener:
            yield listener


async def refused(wire: Wire) -> str:
    """The reason that the listener gives before it hangs up."""
    body = await wire.hear()
    assert isinstance(body, Refusal)
    assert await wire.ended() == b""
    return body.reason


async def a_good_one(listener: Listener) -> None:
    """A channel that works."""
    async with aiordma.connect(*listener.address, config=CONFIG) as channel:
        async with await listener.accept() as other:
            await channel.send("good")
            assert await other.recv() == "good"


def greeting(**changed: Any) -> bytes:
    return message(Hello(limited(**changed), 1, ("tcp",)))


CLIENTS = [
    pytest.param(
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", ("something else than aiordma",), id="HTTP"
    ),
    pytest.param(b"\x16\x03\x01\x02\x00\x01", ("something else than aiordma",), id="TLS"),
    pytest.param(
        message(Hello(LIMITS, 1, ("tcp",)), version=2),
        ("the peer speaks wire version 2, this end 1: install the same aiordma on both",),
        id="another version",
    ),
    pytest.param(
        PREFACE.pack(b"aiordma", b"C", 1, 0, 16385), ("a body of 16385 bytes", REMEDY), id="large"
    ),
    pytest.param(PREFACE.pack(b"aiordma", b"X", 1, 0, 0), ("unknown kind b'X'", REMEDY), id="kind"),
    pytest.param(
        PREFACE.pack(b"aiordma", b"C", 1, 0, 4) + b"\x91\xa2no",
        ("a malformed handshake", REMEDY),
        id="malformed",
    ),
    pytest.param(message(GRANT), ("a connection that begins with Answer", REMEDY), id="ANSWER"),
    pytest.param(
        message(Hello(LIMITS, 1, ("tcp",)), hello.LANE),
        ("begins with Hello", REMEDY),
        id="HELLO on a lane",
    ),
    pytest.param(
        message(Hello(LIMITS, 0, ("tcp",))), ("wants 0 lanes of ('tcp',)", REMEDY), id="no lanes"
    ),
    pytest.param(
        message(Hello(LIMITS, 10**6, ("tcp",))), ("wants 1000000 lanes", REMEDY), id="many lanes"
    ),
    pytest.param(
        message(Hello(LIMITS, 1, ("avian",))), ("lanes of ('avian',)", REMEDY), id="other lanes"
    ),
    pytest.param(greeting(slots=0), (CANNOT_BE, "slots=0", REMEDY), id="no slots"),
    pytest.param(
        greeting(slot_bytes=0), (CANNOT_BE, "slot_bytes=0", REMEDY), id="slots of nothing"
    ),
    pytest.param(
        greeting(slot_bytes=1 << 40), (CANNOT_BE, "slot_bytes=109951", REMEDY), id="huge slots"
    ),
    pytest.param(
        greeting(messages=1 << 62), (CANNOT_BE, "messages=4611686", REMEDY), id="endless messages"
    ),
    pytest.param(
        message(LaneProof(bytes(16), 0, bytes(32)), hello.LANE),
        (
            "no session waits for this lane: its token was used up, came too late, or was never given",
            "again",
        ),
        id="a lane of no session",
    ),
    pytest.param(
        PREFACE.pack(b"aiordma", b"L", 1, 0, 11) + b"\x94\xa4lane\xc4\x00\xff\xc4\x00",
        ("a malformed handshake", REMEDY),
        id="lane -1",
    ),
]


@pytest.mark.parametrize(("data", "texts"), CLIENTS)
async def test_a_client_that_is_not_sound_is_told_so(data, texts):
    async with listening() as listener:
        wire = await Wire.dial(listener.address)
        await wire.write(data)
        wire.sock.shutdown(socket.SHUT_WR)
        reason = await refused(wire)
        wire.close()
        for text in texts:
            assert text in reason
        await a_good_one(listener)


async def test_a_peer_of_another_version_can_tell_from_the_refusal():
    async with listening() as listener:
        wire = await Wire.dial(listener.address)
        # More than was asked for, and unread when the refusal comes: it must not be lost by a reset.
        await wire.write(message(Hello(LIMITS, 1, ("tcp",)), version=2) + bytes(100_000))
        preface = await wire.read(hello.PREFACE_BYTES)
        *start, _, length = PREFACE.unpack(preface)
        assert start == [b"aiordma", b"C", hello.WIRE_VERSION]
        assert b"wire version 2" in await wire.read(length)
        wire.sock.shutdown(socket.SHUT_WR)
        assert await asyncio.get_running_loop().sock_recv(wire.sock, 1) == b"", "not reset"
        wire.close()


# Lane tokens


async def offered(listener: Listener, lanes: int) -> tuple[Wire, Answer]:
    """A session that waits for its lanes."""
    wire = await Wire.dial(listener.address)
    await wire.greet(hello.CONTROL, Hello(LIMITS, lanes, ("tcp",)))
    answer = await wire.hear()
    assert isinstance(answer, Answer)
    assert answer.lanes == lanes
    return wire, answer


async def lane_with(listener: Listener, shown: LaneProof) -> tuple[Wire, Body]:
    wire = await Wire.dial(listener.address)
    await wire.greet(hello.LANE, shown)
    return wire, await wire.hear()


async def test_lane_tokens_that_are_wrong_or_used_twice_do_not_harm_the_channel():
    two = dataclasses.replace(CONFIG, lanes=2)
    async with listening(two) as listener:
        control, answer = await offered(listener, 2)
        first, body = await lane_with(listener, proof(answer, 0))
        assert body == proof(answer, 0, "server")
        wires = [control, first]
        for shown, text in (
            (proof(answer, 0), "the proof for lane 0 was used before"),
            (proof(answer, 2), "or there is no such lane: connect again"),
            (
                LaneProof(answer.session, 1, proof(answer, 0).proof),
                "the proof for lane 1 is wrong: connect",
            ),
            (proof(answer, 1, "server"), "the proof for lane 1 is wrong"),
            (LaneProof(answer.session, 1, b""), "the proof for lane 1 is wrong"),
            (
                LaneProof(answer.session[:-1], 1, proof(answer, 1).proof),
                "no session waits for this lane",
            ),
        ):
            wire, body = await lane_with(listener, shown)
            assert isinstance(body, Refusal)
            assert text in body.reason
            wires.append(wire)
        second, body = await lane_with(listener, proof(answer, 1))
        assert body == proof(answer, 1, "server")
        async with await listener.accept() as channel:
            wire, body = await lane_with(listener, proof(answer, 1))
            assert isinstance(body, Refusal)
            assert "its token was used up" in body.reason
            wires += [second, wire]
            assert len(channel.lanes) == 2
            sending = asyncio.create_task(channel.send(1))
            assert await control.read(1)
            await sending
            for wire in wires:
                wire.close()


async def test_a_session_whose_lanes_never_come_is_given_up():
    async with listening(IMPATIENT) as listener:
        control, answer = await offered(listener, 1)
        assert aiordma.ring.BUDGET.used_bytes >= CONFIG.slots * CONFIG.slot_bytes
        with pytest.raises(HungUp):
            await control.read(1)
        wire, body = await lane_with(listener, proof(answer, 0))
        assert isinstance(body, Refusal)
        assert "came too late" in body.reason
        wire.close()
        control.close()
        await a_good_one(listener)


@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_session_whose_client_hangs_up_before_its_lanes_came_is_given_up_at_once(is_reset):
    async with listening(dataclasses.replace(CONFIG, connect_timeout_s=60)) as listener:
        used_bytes = aiordma.ring.BUDGET.used_bytes
        control, _ = await offered(listener, 1)
        assert aiordma.ring.BUDGET.used_bytes > used_bytes
        control.reset() if is_reset else control.close()
        await until(lambda: aiordma.ring.BUDGET.used_bytes == used_bytes)
        await a_good_one(listener)


async def test_what_a_client_says_before_the_last_lane_is_looked_at_is_kept():
    async with listening() as listener:
        control, answer = await offered(listener, 1)
        await Foreign(control, [], CONFIG.slots).say(Message(b"\x07"))
        lane, _ = await lane_with(listener, proof(answer, 0))
        async with await listener.accept() as channel:
            assert await channel.recv() == 7
            control.close()
            lane.close()


# Silence and crowds


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"aiordmaC", id="half a preface"),
        pytest.param(message(Hello(LIMITS, 1, ("tcp",)))[:-1], id="a byte too few"),
    ],
)
async def test_a_client_that_falls_silent_is_dropped(data):
    async with listening(IMPATIENT) as listener:
        wire = await Wire.dial(listener.address)
        await wire.write(data)
        assert await wire.ended() == b""
        wire.close()
        await a_good_one(listener)


async def test_clients_that_hang_up_in_the_handshake_leave_nothing():
    async with listening() as listener:
        for nbytes in (0, 1, 8, 20):
            wire = await Wire.dial(listener.address)
            await wire.write(message(Hello(LIMITS, 1, ("tcp",)))[:nbytes])
            wire.close()
            wire = await Wire.dial(listener.address)
            await wire.write(message(Hello(LIMITS, 1, ("tcp",)))[:nbytes])
            wire.reset()
        await a_good_one(listener)


async def test_a_crowd_of_silent_clients_does_not_stop_a_good_one():
    before = len(sockets())
    async with listening() as listener:
        crowd = [await Wire.dial(listener.address) for _ in range(300)]
        await a_good_one(listener)
        assert len(sockets()) - before - len(crowd) <= 256 + 1, "too many are held"
        assert await crowd[0].ended() == b"", "the oldest had to go"
        foreign = await enter(listener.address)
        async with await listener.accept():
            foreign.close()
        for wire in crowd:
            wire.close()
