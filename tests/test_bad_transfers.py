"""What costs a peer one transfer, or nothing at all, and leaves the channel usable.

Each row runs with the foreign peer as client and as server. Afterwards a transfer and a message go each way, every
slot is back where it belongs, and nothing was allocated for what was only claimed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import tracemalloc
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
import pytest

from aiordma import (
    Channel,
    ChecksumError,
    Manifest,
    RemoteProtocolError,
    TensorSpec,
    TransferAborted,
    TransferRefused,
    TransferTimeout,
)
from aiordma.ring import SlotState
from aiordma.wire import control
from aiordma.wire.control import Abort, Acked, Claim, Done, Message, Open, Unclaim
from aiordma.wire.frames import CreditHeader
from tests.foreign import CONFIG, ROLES, Foreign, connected

pytestmark = pytest.mark.usefixtures("loop_kind")

FAST = dataclasses.replace(CONFIG, idle_timeout_s=0.08)
NONSENSE = (0, 1, 7, 1 << 40, (1 << 62) - 1)


async def still_works(channel: Channel, foreign: Foreign) -> None:
    """A transfer and a message each way, and every slot is back."""
    receiving = asyncio.create_task(channel.recv_tensors())
    transfer = await foreign.open(5000)
    while (await foreign.hear(Claim)).transfer != transfer:
        pass
    for offset, nbytes in ((0, 4096), (4096, 904)):
        await foreign.chunk(transfer, b"x" * nbytes, offset=offset)
    assert (await receiving).arrays["t"].tobytes() == b"x" * 5000
    while (await foreign.hear(Done)).transfer != transfer:
        pass

    sending = asyncio.create_task(channel.send_tensor(np.full(50, 7, np.uint8), confirm=True))
    opened = await foreign.hear(Open)
    await foreign.say(Claim(opened.transfer))
    while isinstance(frame := await foreign.lane_frame(), CreditHeader):
        pass
    header, payload = frame
    assert payload == b"\x07" * 50
    await foreign.credit(1 << header.slot)
    await foreign.say(Acked(opened.transfer))
    await foreign.say(Done(opened.transfer))
    await sending

    await foreign.say(Message(b"\x2a"))
    assert await channel.recv() == 42
    await channel.send("yes")
    assert (await foreign.hear(Message)).payload == b"\xa3yes"
    while len(foreign.free[0]) < CONFIG.slots:
        await foreign.lane_frame()
    while channel.stats().in_flight_chunks:
        await round_trip(channel, foreign)
    (port,) = channel._link.ports
    assert port.ring.count(SlotState.POSTED) == port.ring.slots == CONFIG.slots
    stats = channel.stats()
    assert (stats.open_receives, stats.open_sends) == (0, 0)


# Manifests that are refused

U8 = TensorSpec("t", "U8", (64,), 0)


def listed(*specs: TensorSpec, total_bytes: int = 64) -> bytes:
    return msgspec.msgpack.encode(Manifest(specs, total_bytes))


def spec(**changed: Any) -> TensorSpec:
    return msgspec.structs.replace(U8, **changed)


MANIFESTS = [
    pytest.param(
        listed(U8, spec(name="u", offset=63), total_bytes=127),
        "'t' and 'u' overlap at byte 63",
        id="overlap",
    ),
    pytest.param(
        listed(spec(offset=64)), r"takes bytes \[64, 128\), beyond the manifest's 64", id="beyond"
    ),
    pytest.param(
        listed(spec(offset=-64)), r"takes bytes \[-64, 0\), beyond", id="before the beginning"
    ),
    pytest.param(
        listed(spec(offset=(1 << 63) - 1)), "beyond the manifest's 64", id="overflowing offset"
    ),
    pytest.param(listed(spec(shape=(1 << 62, 4))), "overflows 63 bits", id="overflowing shape"),
    pytest.param(
        listed(spec(shape=(0, 1 << 62, 4))), "overflows 63 bits", id="overflow behind a 0"
    ),
    pytest.param(listed(spec(shape=(-64,))), "a negative dimension", id="negative"),
    pytest.param(listed(spec(shape=(1,) * 65)), "length <= 64", id="65 dimensions"),
    pytest.param(listed(spec(offset=32)), "beyond the manifest's 64", id="overflowing end"),
    pytest.param(
        listed(spec(shape=(32,))), r"a hole: no tensor covers bytes \[32, 64\)", id="hole"
    ),
    pytest.param(
        listed(spec(dtype="F32", shape=(16,), offset=1)), "is misaligned", id="misaligned"
    ),
    pytest.param(listed(spec(dtype="F4")), "unknown dtype 'F4': send its bytes as U8", id="dtype"),
    pytest.param(listed(U8, U8), "'t' appears twice: names must differ", id="a name twice"),
    pytest.param(listed(spec(name="")), "an empty name: give it one", id="no name"),
    pytest.param(listed(spec(name="n" * 1025)), "has 1025 bytes.*: shorten it", id="long name"),
    pytest.param(
        b"\x92\xdd\x3b\x9a\xca\x00" + b"\x94\xa1t\xa2U8\x91\x01\x00" * 9,
        "1000000000 tensors, more than the limit of 100.*raise the receiver's",
        id="a billion tensors",
    ),
    pytest.param(
        b"\xdc\x00\x02\xdd\x3b\x9a\xca\x00" + b"\x94\xa1t\xa2U8\x91\x01\x00" * 9,
        "the manifest is malformed|1000000000 tensors",
        id="a billion tensors, in a larger header",
    ),
    pytest.param(
        b"\x92\x91\x94\xa1t\xa2U8\xdd\x3b\x9a\xca\x00\x00",
        "is malformed",
        id="a billion dimensions",
    ),
    pytest.param(
        listed(*(spec(name=f"t{i}", offset=64 * i) for i in range(101)), total_bytes=6464),
        "101 tensors, more than the limit of 100",
        id="a tensor too many",
    ),
    pytest.param(
        listed(spec(shape=((1 << 20) + 1,)), total_bytes=(1 << 20) + 1),
        "1048577 bytes are more than the limit of 1048576: send several transfers",
        id="too large",
    ),
    pytest.param(
        listed(U8, total_bytes=1 << 62), "more than the limit of 1048576", id="far too large"
    ),
    pytest.param(b"", "is malformed", id="nothing"),
    pytest.param(b"\xc1", "is malformed", id="no msgpack"),
    pytest.param(b"\x92\x91\x94\xa1\xff\xa2U8\x91\x01\x00\x01", "is malformed", id="no Unicode"),
    pytest.param(b"\x91" * 100_000, "is malformed", id="deeper than the stack"),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("manifest", "text"), MANIFESTS)
async def test_a_manifest_that_is_refused(manifest, text, role):
    async with connected(role) as (channel, foreign):
        await is_refused(foreign, text, manifest=manifest)
        await still_works(channel, foreign)


async def is_refused(
    foreign: Foreign, text: str, *, manifest: bytes | None = None, meta: bytes = b""
):
    """An OPEN is answered by an ABORT with this reason, and little is allocated meanwhile."""
    tracemalloc.start()
    try:
        transfer = await foreign.open(manifest=manifest, meta=meta)
        abort = await foreign.hear(Abort)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (abort.transfer, abort.by_sender, abort.cause) == (transfer, False, "manifest")
    assert re.search(text, abort.reason)
    assert len(abort.reason) <= 1000
    # Both ends are in this process; asyncio's buffer for one recv alone has 256 KiB.
    assert peak_bytes < 6 * len(manifest or b"") + 6 * len(meta) + (1 << 19)


@pytest.mark.parametrize("role", ROLES)
async def test_a_name_of_10_mb(role):
    manifest = listed(spec(name="n" * 10_000_000))
    roomy = dataclasses.replace(CONFIG, manifest_bytes=1 << 25)
    async with connected(role, roomy) as (channel, foreign):
        await is_refused(
            foreign,
            "'nnn.*' has 10000000 bytes, more than the limit of 1024: shorten it",
            manifest=manifest,
        )
        await still_works(channel, foreign)
    async with connected(role) as (channel, foreign):
        writing = asyncio.create_task(foreign.open(manifest=manifest))
        with pytest.raises(
            RemoteProtocolError, match=r"a control frame of 100000\d\d bytes, over the 131136"
        ):
            await channel.recv()
        await writing


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("meta", "text"),
    [
        pytest.param(
            b"\xc5\xff\xff" + bytes(65535), "meta of 65538 bytes.*send it as a tensor", id="large"
        ),
        pytest.param(b"\xc1", "`meta` is malformed", id="no msgpack"),
        pytest.param(b"\xa1\xff", "`meta` is malformed", id="no Unicode"),
        pytest.param(b"\x91" * 60_000, "`meta` is malformed", id="deeper than the stack"),
        pytest.param(b"\xdd\x7f\xff\xff\xff", "`meta` is malformed", id="a billion items"),
        pytest.param(b"\x81\x80\x01", "`meta` is malformed", id="a map as a key"),
    ],
)
async def test_meta_that_is_refused(meta, text, role):
    async with connected(role) as (channel, foreign):
        await is_refused(foreign, text, meta=meta)
        await still_works(channel, foreign)


# Chunks


@pytest.mark.parametrize("role", ROLES)
async def test_a_damaged_payload_costs_its_transfer(role):
    async with connected(role) as (channel, foreign):
        receiving = asyncio.create_task(channel.recv_tensors())
        transfer = await foreign.open(8192)
        await foreign.hear(Claim)
        await foreign.chunk(transfer, bytes(4096), offset=0)
        await foreign.chunk(transfer, bytes(4096), offset=4096, check=1)
        with pytest.raises(
            ChecksumError, match="transfer 1: the chunk at byte 4096 is damaged; send it again"
        ):
            await receiving
        abort = await foreign.hear(Abort)
        assert (abort.transfer, abort.cause) == (transfer, "checksum")
        await still_works(channel, foreign)


@pytest.mark.parametrize("role", ROLES)
async def test_a_chunk_of_a_transfer_that_is_over_is_discarded(role):
    async with connected(role) as (channel, foreign):
        refused = await foreign.open(8192)
        async with aclosing(channel.incoming()) as transfers:
            await (await anext(transfers)).refuse("no")
        assert (await foreign.hear(Abort)).reason == "no"
        await foreign.chunk(refused, bytes(4096), offset=0)
        await still_works(channel, foreign)
        finished = foreign.transfers
        await foreign.chunk(finished, bytes(904), offset=4096)
        unsound = await foreign.open(manifest=b"")
        await foreign.hear(Abort)
        await foreign.chunk(unsound, bytes(64))
        await still_works(channel, foreign)
        assert channel.stats().discarded_chunks == 3


@pytest.mark.parametrize("role", ROLES)
async def test_an_early_chunk_of_a_transfer_that_is_refused_is_discarded(role):
    async with connected(role) as (channel, foreign):
        await foreign.chunk(1, bytes(64))
        while not channel.stats().received_chunks:
            await round_trip(channel, foreign)
        await is_refused(foreign, "is malformed", manifest=b"")
        await still_works(channel, foreign)
        assert channel.stats().discarded_chunks == 1


async def round_trip(channel: Channel, foreign: Foreign) -> None:
    pinging = asyncio.create_task(channel.ping())
    await foreign.hear(control.Ping)
    await pinging


# Control frames


@pytest.mark.parametrize("role", ROLES)
async def test_a_frame_that_comes_twice_is_dropped(role):
    async with connected(role) as (channel, foreign):
        for _ in range(3):
            await foreign.say(Message(b"\x01"), sequence=1)
        foreign.sent = 1
        await foreign.say(Message(b"\x02"))
        assert [await channel.recv(), await channel.recv()] == [1, 2]
        await still_works(channel, foreign)


@pytest.mark.parametrize("role", ROLES)
async def test_words_on_transfers_that_are_over_or_never_were_are_ignored(role):
    async with connected(role) as (channel, foreign):
        await still_works(channel, foreign)  # so that 1 is over, both ways
        await foreign.say(Acked(1))
        await foreign.say(Done(1))
        for transfer in NONSENSE:
            await foreign.say(Unclaim(transfer))
            await foreign.say(Abort(transfer, True, "aborted", ""))
            await foreign.say(Abort(transfer, False, "no such cause", ""))
        await foreign.say(Claim(0))
        await foreign.say(Claim(1))
        await foreign.say(control.Pong(1 << 61))
        await still_works(channel, foreign)


ABORTS = [
    pytest.param(
        "refused", TransferRefused, "the peer refused the transfer: because", id="refused"
    ),
    pytest.param(
        "manifest", TransferRefused, "the peer refused the transfer: because", id="manifest"
    ),
    pytest.param(
        "checksum", ChecksumError, "the peer received damaged bytes: because", id="checksum"
    ),
    pytest.param("timeout", TransferTimeout, "the peer gave up waiting: because", id="timeout"),
    pytest.param(
        "aborted", TransferAborted, "the peer aborted the transfer: because", id="aborted"
    ),
    pytest.param(
        "boredom", TransferAborted, "the peer aborted the transfer: because", id="unknown"
    ),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("cause", "error", "text"), ABORTS)
async def test_a_transfer_that_the_peer_gives_up(cause, error, text, role):
    async with connected(role) as (channel, foreign):
        sending = asyncio.create_task(channel.send_tensor(np.zeros(100_000, np.uint8)))
        transfer = (await foreign.hear(Open)).transfer
        await foreign.say(Claim(transfer))
        await foreign.say(Abort(transfer, False, cause, "because"))
        with pytest.raises(error, match=text) as caught:
            await sending
        assert type(caught.value) is error

        receiving = asyncio.create_task(channel.recv_tensors())
        await foreign.hear(Claim)  # somebody waits
        transfer = await foreign.open(100_000)
        await foreign.chunk(transfer, bytes(4096))
        await foreign.say(Abort(transfer, True, cause, "because"))
        with pytest.raises(error, match=text):
            await receiving
        await give_back_all(channel, foreign)
        await still_works(channel, foreign)


@pytest.mark.parametrize("role", ROLES)
async def test_a_transfer_that_stands_still(role):
    async with connected(role, FAST) as (channel, foreign):
        receiving = asyncio.create_task(channel.recv_tensors())
        transfer = await foreign.open(8192)
        await foreign.chunk(transfer, bytes(4096))
        abort = await foreign.hear(Abort)
        assert (abort.transfer, abort.cause) == (transfer, "timeout")
        with pytest.raises(
            TransferTimeout, match=r"transfer 1 made no progress for 0.08 s: no chunk came"
        ):
            await receiving

        sending = asyncio.create_task(channel.send_tensor(np.zeros(100_000, np.uint8)))
        opened = await foreign.hear(Open)
        await foreign.say(Claim(opened.transfer))
        abort = await foreign.hear(Abort)
        assert (abort.transfer, abort.by_sender, abort.cause) == (opened.transfer, True, "timeout")
        with pytest.raises(TransferTimeout, match=r"takes no chunks.*raise idle_timeout_s"):
            await sending
        await give_back_all(channel, foreign)
        await still_works(channel, foreign)


async def give_back_all(channel: Channel, foreign: Foreign) -> None:
    """Read every chunk that the channel has under way, and credit it."""
    for _ in range(channel.stats().in_flight_chunks):
        while isinstance(frame := await foreign.lane_frame(), CreditHeader):
            pass
        await foreign.credit(1 << frame[0].slot)
