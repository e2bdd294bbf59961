"""What a channel's peer may get wrong, frame by frame: each row names the error, its cause and its remedy.

Each row runs with the foreign peer as client and as server. Afterwards no task, socket or slot is left, and the
peer was hung up on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import struct

import msgspec
import numpy as np
import pytest

from aiordma import (
    ChannelBroken,
    ChannelClosed,
    PeerTimeout,
    RemoteProtocolError,
)
from aiordma.wire import control
from aiordma.wire.control import Acked, Claim, Done, Message, MessageCredit, Open, OpenCredit
from aiordma.wire.frames import CreditHeader
from tests.foreign import (
    AGAIN,
    CONFIG,
    CONTROL_HEADER,
    REMEDY,
    ROLES,
    Foreign,
    connected,
    ends,
    fate,
    row,
)

pytestmark = pytest.mark.usefixtures("loop_kind")

FAST = dataclasses.replace(CONFIG, idle_timeout_s=0.08)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiordma.port._GRACE_S", 0.02)


# Control frames


async def cut_off(foreign: Foreign, data: bytes) -> None:
    await foreign.control.write(data)
    foreign.control.close()
    foreign.control = foreign.lanes[0]


async def four_opens_and_one(foreign: Foreign) -> None:
    for _ in range(5):
        await foreign.open()


async def opens_beyond_the_bytes(foreign: Foreign) -> None:
    for _ in range(3):
        await foreign.open(meta=msgspec.msgpack.encode(b"m" * 60_000))


async def messages_beyond_the_count(foreign: Foreign) -> None:
    for _ in range(5):
        await foreign.say(Message(b"\x01"))


async def messages_beyond_the_bytes(foreign: Foreign) -> None:
    for _ in range(2):
        await foreign.say(Message(b"\x01" * 10_000))


CONTROL_ROWS = [
    row(
        "cut off in a header",
        lambda f: cut_off(f, b"\x05\0\0\0\7"),
        "the peer ended the connection without a goodbye",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
    row(
        "cut off in a body",
        lambda f: cut_off(f, struct.pack("<IB3xQQ", 9, 7, 1, 0) + b"12345"),
        "the peer ended the connection without a goodbye",
        error=ChannelBroken,
        remedy=AGAIN,
    ),
    row(
        "oversized",
        lambda f: f.control.write(struct.pack("<IB3xQQ", 1 << 31, 7, 1, 0)),
        "a control frame of 2147483648 bytes, over the 131136 agreed on",
    ),
    row("unknown kind", lambda f: f.say_body(99, b"\x90"), "a control frame of unknown kind 99"),
    row(
        "a gap",
        lambda f: f.say(Claim(1), sequence=3),
        "control frame 1 was due, frame 3 came",
    ),
    row(
        "acknowledges what was never sent",
        lambda f: f.say(Claim(1), ack=7),
        "the peer acknowledges frame 7; 0 were sent",
    ),
    row(
        "a body that is no msgpack",
        lambda f: f.say_body(Open.kind, b"\xc1\xc1"),
        "a malformed control frame of kind 1",
    ),
    row(
        "a body that is no Unicode",
        lambda f: f.say_body(control.Bye.kind, b"\x91\xa2\xff\xff"),
        "a malformed control frame of kind 12",
    ),
    row(
        "a field of another type",
        lambda f: f.say_body(Claim.kind, msgspec.msgpack.encode(["one"])),
        "a malformed control frame of kind 2",
    ),
    row(
        "a field too many",
        lambda f: f.say_body(Claim.kind, msgspec.msgpack.encode([1, 2])),
        "a malformed control frame of kind 2",
    ),
    row(
        "a field that is too large a number",
        lambda f: f.say_body(Claim.kind, msgspec.msgpack.encode([1 << 63])),
        "a malformed control frame of kind 2",
    ),
    row(
        "a claim without a sequence number",
        lambda f: f.say(Claim(1), sequence=0),
        "a control frame of kind 2 with or without a sequence number",
    ),
    row(
        "a ping with a sequence number",
        lambda f: f.say(control.Ping(1), sequence=1),
        "a control frame of kind 10 with or without a sequence number",
    ),
    row("an OPEN out of turn", lambda f: f.open(transfer=2), "OPEN of transfer 1 was due, 2 came"),
    row("an OPEN beyond the window", four_opens_and_one, "OPEN number 5", "beyond the window of 4"),
    row("OPENs beyond the bytes", opens_beyond_the_bytes, "OPEN number 3", "(131072 bytes)"),
    row(
        "chunks of nothing",
        lambda f: f.open(chunk_bytes=0),
        "chunks of 0 bytes do not fit slots of 4096",
    ),
    row("chunks that split elements", lambda f: f.open(chunk_bytes=100), "chunks of 100 bytes"),
    row("chunks beyond the slot", lambda f: f.open(chunk_bytes=1 << 20), "chunks of 1048576 bytes"),
    row("messages beyond the count", messages_beyond_the_count, "message number 5", "window of 4"),
    row(
        "messages beyond the bytes", messages_beyond_the_bytes, "message number 2", "(16384 bytes)"
    ),
    row(
        "ACKED of what was never sent",
        lambda f: f.say(Acked(1)),
        "acknowledges transfer 1, which was never",
    ),
    row("ACKED of nonsense", lambda f: f.say(Acked((1 << 62) - 1)), "which was never opened"),
    row(
        "DONE of what was never sent",
        lambda f: f.say(Done(7)),
        "consumed transfer 7, which it never ack",
    ),
    row(
        "a claim beyond the window",
        lambda f: f.say(Claim(10**6)),
        "claims transfer 1000000; it allowed 8 so far",
    ),
    row(
        "a credit for messages beyond the window",
        lambda f: f.say(MessageCredit(1 << 40, 1 << 50)),
        "allows 1099511627776 messages",
    ),
    row(
        "a credit for OPENs beyond the window",
        lambda f: f.say(OpenCredit(9, 1 << 17)),
        "allows 9 OPENs",
    ),
    row(
        "a goodbye",
        lambda f: f.say(control.Bye("the cinema is on fire")),
        "the peer closed the channel: the cinema is on fire",
        error=ChannelClosed,
        remedy="",
    ),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("act", "error", "texts"), CONTROL_ROWS)
async def test_a_control_connection_that_went_wrong(act, error, texts, role):
    async with connected(role) as (channel, foreign):
        await act(foreign)
        await ends(channel, foreign, error, texts)


@pytest.mark.parametrize("role", ROLES)
async def test_who_breaks_the_protocol_hears_how(role):
    async with connected(role) as (_, foreign):
        await foreign.say_body(99, b"\x90")
        goodbye = await foreign.hear(control.Bye)
        assert goodbye.reason == "what came breaks the protocol: a control frame of unknown kind 99"
        assert goodbye.is_fault
        await foreign.ended()


# Time


@pytest.mark.parametrize("role", ROLES)
async def test_a_chunk_whose_transfer_is_never_opened(role):
    async with connected(role, FAST) as (channel, foreign):
        await foreign.chunk(1, bytes(64))
        answering = asyncio.create_task(foreign.ended())
        with pytest.raises(
            RemoteProtocolError, match=f"transfer 1, which was never opened.*{REMEDY}"
        ):
            await channel.recv()
        await answering


@pytest.mark.parametrize("role", ROLES)
async def test_a_peer_that_falls_silent_while_a_transfer_is_open(role):
    async with connected(role, FAST) as (channel, foreign):
        await foreign.open()
        with pytest.raises(
            PeerTimeout, match=r"the peer said nothing for .*or raise idle_timeout_s"
        ):
            await channel.recv_tensor()
        await ends(
            channel, foreign, PeerTimeout, ("while a transfer was open", "raise idle_timeout_s")
        )


# What the peer says of the transfers that we send it


async def acked_too_early(foreign: Foreign) -> None:
    await foreign.say(Acked(1))


async def done_without_acked(foreign: Foreign) -> None:
    await foreign.say(Done(1))


async def credits_twice(foreign: Foreign) -> None:
    await foreign.say(Claim(1))
    found = await foreign.lane_frame()
    assert not isinstance(found, CreditHeader)
    await foreign.credit(1 << found[0].slot)
    await foreign.credit(0b1111_1111)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("act", "error", "texts"),
    [
        row(
            "acknowledged half-way",
            acked_too_early,
            "acknowledges transfer 1 at 4096 of 100000 bytes",
        ),
        row(
            "done, not acknowledged",
            done_without_acked,
            "consumed transfer 1, which it never acknow",
        ),
        row("credited twice", credits_twice, "which it does not hold"),
    ],
)
async def test_a_receiver_that_went_wrong(act, error, texts, role):
    async with connected(role) as (channel, foreign):
        sending = asyncio.create_task(channel.send_tensor(np.zeros(100_000, np.uint8)))
        await foreign.hear(Open)
        await act(foreign)
        with pytest.raises(error, match=texts[0]):
            await sending
        await ends(channel, foreign, error, texts)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("what", ["pings", "OPENs"])
async def test_a_peer_that_sends_and_neither_reads_nor_acknowledges(what, role, monkeypatch):
    monkeypatch.setattr("aiordma.wire.session._SPARE_BACKLOG_BYTES", 0)
    async with connected(role) as (channel, foreign):
        ping = CONTROL_HEADER.pack(2, control.Ping.kind, 0, 0) + msgspec.msgpack.encode([1])
        failing = asyncio.create_task(fate(channel))
        while not failing.done():
            if what == "pings":
                await foreign.control.write(ping * 1000)
            else:
                await foreign.open(manifest=b"", meta=b"m")
            await asyncio.sleep(0)
        error = failing.result()
        assert type(error) is RemoteProtocolError
        assert "goes on sending, and reads or acknowledges nothing" in str(error)
        assert REMEDY in str(error)
        assert channel.stats().kept_frames < 10_000
        await foreign.ended()


async def test_the_refusals_of_a_channel_that_is_over_name_the_first_cause():
    async with connected("client") as (channel, foreign):
        await foreign.say_body(99, b"\x90")
        await foreign.say_body(98, b"\x90")
        await ends(channel, foreign, RemoteProtocolError, ("unknown kind 99",))
        assert channel.is_closed
        await foreign.ended()
