"""What may answer at a port and is no sound aiordma: the exact error, its cause and its remedy.

Afterwards no task, socket or slot is left.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import aiordma
from aiordma import (
    AiordmaError,
    ConnectError,
    ConnectTimeout,
    ForeignPeer,
    LaneRefused,
    RemoteProtocolError,
    VersionMismatch,
)
from aiordma.wire import hello
from aiordma.wire.hello import Answer, Body, Hello, LaneProof, Refusal
from tests.foreign import CONFIG, LIMITS, REMEDY, Wire, bare_server, proof

pytestmark = pytest.mark.usefixtures("loop_kind")

IMPATIENT = dataclasses.replace(CONFIG, connect_timeout_s=0.1)
GRANT = Answer(LIMITS, 1, "tcp", b"s" * 16, b"k" * 32)
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


# A hostile server against `connect`


def at_once(data: bytes) -> Script:
    """Speaks first, then waits."""

    async def script(wire: Wire) -> None:
        await wire.write(data)
        await wire.ended()

    return script


def answers(data: bytes) -> Script:
    """Hears the HELLO, answers with this, and hangs up."""

    async def script(wire: Wire) -> None:
        await wire.hear()
        await wire.write(data)

    return script


def lane_answers(data: bytes) -> Script:
    """A sound ANSWER; but the lane gets this."""

    async def script(wire: Wire) -> None:
        if isinstance(await wire.hear(), Hello):
            await wire.write(message(GRANT))
            await wire.ended()
        else:
            await wire.write(data)

    return script


async def hangs_up(wire: Wire) -> None:
    pass


async def resets(wire: Wire) -> None:
    wire.reset()


async def says_nothing(wire: Wire) -> None:
    await wire.ended()


def row(name: str, script: Script, error: type[AiordmaError], *texts: str) -> Any:
    return pytest.param(script, error, texts, id=name)


CANNOT_BE = "the peer offers limits that cannot be"
SERVERS = [
    row(
        "HTTP, which speaks first",
        at_once(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
        ForeignPeer,
        "something else than aiordma answers there (its first bytes: b'HTTP/1.1 400 Bad'): check host and port",
    ),
    row("one byte", at_once(b"5"), ForeignPeer, "first bytes: b'5'", "check host and port"),
    row("garbage", answers(b"\xa5" * 100), ForeignPeer, r"\xa5", "check host and port"),
    row("hangs up at once", hangs_up, ForeignPeer, "hung up without a word", "check host and port"),
    row("resets at once", resets, ForeignPeer, "hung up without a word", "check host and port"),
    row(
        "hangs up after HELLO",
        answers(b""),
        ForeignPeer,
        "hung up without a word",
        "check host and",
    ),
    row(
        "says nothing",
        says_nothing,
        ConnectTimeout,
        "within 0.1 s: the peer accepts connections but does not",
    ),
    row("half a preface", at_once(b"aiordmaC"), ConnectTimeout, "or the way there is blocked"),
    row(
        "hangs up in the preface",
        answers(b"aiordmaC"),
        ConnectError,
        "hung up during the handshake, 8 bytes into a message of 16: see its log",
    ),
    row(
        "hangs up in the body",
        answers(message(GRANT)[:20]),
        ConnectError,
        "hung up during the handshake, 4 bytes into a message of",
        "see its log, and connect again",
    ),
    row(
        "another version",
        answers(message(GRANT, version=2)),
        VersionMismatch,
        "the peer speaks wire version 2, this end 1: install the same aiordma on both",
    ),
    row(
        "a body of 4 GiB",
        answers(PREFACE.pack(b"aiordma", b"C", 1, 0, (1 << 32) - 1)),
        RemoteProtocolError,
        "with a body of 4294967295 bytes",
        REMEDY,
    ),
    row(
        "an unknown kind",
        answers(PREFACE.pack(b"aiordma", b"X", 1, 0, 0)),
        RemoteProtocolError,
        "a preface of unknown kind b'X'",
        REMEDY,
    ),
    row(
        "a malformed body",
        answers(PREFACE.pack(b"aiordma", b"C", 1, 0, 1) + b"\xc1"),
        RemoteProtocolError,
        "a malformed handshake",
        REMEDY,
    ),
    row(
        "a HELLO for an answer",
        answers(message(Hello(LIMITS, 1, ("tcp",)))),
        RemoteProtocolError,
        "the server answered HELLO with Hello",
        REMEDY,
    ),
    row(
        "no lanes",
        answers(granting(lanes=0)),
        RemoteProtocolError,
        "grants 0 lanes; 1 were",
        REMEDY,
    ),
    row(
        "a million lanes",
        answers(granting(lanes=10**6)),
        RemoteProtocolError,
        "grants 1000000 lanes; 1 were asked for",
        REMEDY,
    ),
    *(
        row(
            f"{name}={value}",
            answers(granting(limits=limited(**{name: value}))),
            RemoteProtocolError,
            CANNOT_BE,
            f"{name}={value}",
            REMEDY,
        )
        for name, value in (
            ("slots", 0),
            ("slots", -1),
            ("slots", 257),
            ("slot_bytes", 0),
            ("slot_bytes", 100),
            ("slot_bytes", 1 << 40),
            ("messages", 0),
            ("message_bytes", 0),
            ("message_bytes", 1 << 60),
            ("open_transfers", 0),
            ("open_transfers", 1 << 40),
            ("manifest_bytes", -1),
        )
    ),
    row(
        "refuses",
        answers(message(Refusal("the hall is full: come tomorrow"))),
        ConnectError,
        "the server refused the channel: the hall is full: come tomorrow",
    ),
    row(
        "refuses the lane",
        lane_answers(message(Refusal("too wide: use a smaller one"))),
        LaneRefused,
        "the server refused lane 0: too wide: use a smaller one",
    ),
    row(
        "proves the lane wrongly",
        lane_answers(message(LaneProof(GRANT.session, 0, bytes(32)), hello.LANE)),
        LaneRefused,
        "did not prove that lane 0 is its own",
        "connect again",
    ),
    row(
        "gives our own proof back",
        lane_answers(message(proof(GRANT, 0), hello.LANE)),
        LaneRefused,
        "did not prove that lane 0 is its own",
    ),
    row("hangs up on the lane", lane_answers(b""), ForeignPeer, "hung up without a word"),
    row("answers the lane with noise", lane_answers(b"\0" * 99), ForeignPeer, "something else"),
]


@pytest.mark.parametrize(("script", "error", "texts"), SERVERS)
async def test_a_server_that_is_not_sound(script, error, texts):
    async with bare_server(script) as (_, address):
        with pytest.raises(error) as caught:
            await aiordma.connect(
                *address, config=CONFIG, timeout_s=0.1 if error is ConnectTimeout else 5
            )
    assert type(caught.value) is error
    for text in texts:
        assert text in str(caught.value)
