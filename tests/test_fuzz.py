"""Whatever bytes a peer puts on a live channel: it goes on, or fails as documented. Nothing hangs or is left.

The frames are numbered and checked rightly before they are bent, so that most of them get past the first look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies as st

from aiordma import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    ChannelError,
    Manifest,
    MessageError,
    RemoteProtocolError,
    TensorError,
    TensorSpec,
    Transfer,
    TransferError,
)
from aiordma.wire import control, frames
from aiordma.wire.control import Frame
from aiordma.wire.frames import ChunkHeader
from tests.foreign import CONTROL_HEADER, ROLES, Foreign, connected

ENDS = (ChannelBroken, ChannelClosed, RemoteProtocolError)
"""How a channel may end; `type(error)` is exactly one of these."""

Step = Callable[[Foreign], Awaitable[None]]


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiordma.port._GRACE_S", 0.001)
        yield


few = st.integers(1, 4)
ids = st.one_of(few, few, few, few, st.sampled_from([0, 9, 1 << 40, (1 << 62) - 1]))
bends = st.none() | st.none() | st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255))
specs = st.builds(
    TensorSpec,
    st.sampled_from(["a", "b", ""]),
    st.sampled_from(["U8", "F32", "BF16", "F8_E4M3", "nonsense"]),
    st.lists(st.integers(-1, 3000), max_size=2).map(tuple),
    st.sampled_from([0, 0, 0, 4, 64]),
)
sound = st.integers(0, 10_000).map(lambda n: Manifest((TensorSpec("t", "U8", (n,), 0),), n))
unsound = st.builds(Manifest, st.lists(specs, max_size=2).map(tuple), st.integers(-1, 10_000))
manifests = (sound | sound | unsound).map(msgspec.msgpack.encode) | st.binary(max_size=20)
reasons = st.sampled_from(["aborted", "refused", "timeout", "checksum", "manifest", "boredom"])
packed = st.sampled_from([1, "two", [3], {"four": 5}]).map(msgspec.msgpack.encode)
frames_sent: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        control.Open,
        st.just(0),
        st.sampled_from([4096, 4096, 64]),
        manifests,
        packed | st.binary(max_size=9),
    ),
    st.builds(control.Claim, ids),
    st.builds(control.Unclaim, ids),
    st.builds(control.Acked, ids),
    st.builds(control.Done, ids),
    st.builds(control.Abort, ids, st.booleans(), reasons, st.text(max_size=5)),
    st.builds(control.Message, packed | st.binary(max_size=9)),
    st.builds(control.MessageCredit, ids, ids),
    st.builds(control.OpenCredit, ids, ids),
    st.builds(control.Ping, ids),
    st.builds(control.Pong, ids),
)


def bent(data: bytes, bend: tuple[int, int] | None) -> bytes:
    """One byte changed."""
    if bend is None or not data:
        return data
    at, value = bend
    changed = bytearray(data)
    changed[at % len(data)] = value
    return bytes(changed)


def control_step(frame: Frame, bend: tuple[int, int] | None) -> Step:
    async def step(foreign: Foreign) -> None:
        sequence = 0
        if frame.sequenced:
            foreign.sent = sequence = foreign.sent + 1
        if isinstance(frame, control.Open):
            foreign.transfers += 1
            frame.transfer = foreign.transfers
        body = (
            frame.payload if isinstance(frame, control.Message) else msgspec.msgpack.encode(frame)
        )
        header = CONTROL_HEADER.pack(len(body), frame.kind, sequence, 0)
        await foreign.control.write(bent(header + body, bend))

    return step


def lane_step(header: ChunkHeader, bend: tuple[int, int] | None) -> Step:
    async def step(foreign: Foreign) -> None:
        # Mostly a transfer that is open, or is about to be, and a slot that is free.
        transfer = (
            max(1, foreign.transfers + 2 - header.transfer) if header.transfer in range(1, 5) else 0
        )
        payload = bytes(header.length % 10_000)
        check = None if header.check is None else frames.xxh3(payload) ^ header.check
        sent = header._replace(check=check, transfer=transfer or header.transfer)
        data = frames.encode_chunk(sent, foreign.count()) + payload
        await foreign.lanes[0].write(bent(data, bend))

    return step


def credit_step(slots: int) -> Step:
    return lambda foreign: foreign.credit(slots)


def raw_step(data: bytes, *, is_control: bool) -> Step:
    return lambda foreign: (foreign.control if is_control else foreign.lanes[0]).write(data)


async def sound_transfer(foreign: Foreign) -> None:
    """Up to two chunks, as they should come; a claim is not waited for."""
    if foreign.free[0]:
        transfer = await foreign.open(5000)
        await turn(foreign)
        for offset in range(0, min(2, len(foreign.free[0])) * 4096, 4096):
            await foreign.chunk(transfer, bytes(min(4096, 5000 - offset)), offset=offset)


async def turn(_: Foreign) -> None:
    """Let the channel act on what came so far."""
    for _turn in range(5):
        await asyncio.sleep(0)


headers = st.builds(
    ChunkHeader,
    slot=st.integers(0, 4),
    length=st.sampled_from([4096, 4096, 64, 0, 5000, 1808]),
    transfer=ids,
    offset=st.sampled_from([0, 0, 4096, 8192, 64, 1 << 63]),
    check=st.sampled_from([None, 0, 0, 1]),
)
control_steps = st.builds(control_step, frames_sent, bends)
lane_steps = st.one_of(
    st.builds(lane_step, headers, bends),
    st.builds(lane_step, headers, bends),
    st.sampled_from([0, 1, 1, 2, 3, 16]).map(credit_step),
)
raw_steps = st.builds(raw_step, st.binary(min_size=1, max_size=200), is_control=st.booleans())
steps = st.lists(
    st.one_of(control_steps, control_steps, lane_steps, st.sampled_from([turn, sound_transfer])),
    max_size=25,
)


async def receive(channel: Channel) -> None:
    while True:
        try:
            await channel.recv()
        except MessageError:
            continue


async def take(channel: Channel, *, by_chunks: bool) -> None:
    async with aclosing(channel.incoming()) as transfers:
        async for transfer in transfers:
            try:
                await (_by_chunks(transfer) if by_chunks else transfer.arrays())
            except TransferError:
                continue
            except TensorError:
                await transfer.refuse("no")


async def _by_chunks(transfer: Transfer) -> None:
    async with aclosing(transfer.chunks()) as chunks:
        async for chunk in chunks:
            with chunk:
                assert sum(view.nbytes for _, _, view in chunk.parts()) == chunk.nbytes


async def give(channel: Channel) -> None:
    while True:
        try:
            await channel.send_tensor(np.zeros(10_000, np.uint8), confirm=True)
        except TransferError:
            await asyncio.sleep(0)


async def survive(role: str, script: list[Step], *, by_chunks: bool) -> None:
    """Everybody who uses the channel meanwhile gets a documented error, soon after the peer is gone at the latest."""
    async with connected(role) as (channel, foreign):
        users: list[asyncio.Task[Any]] = [
            asyncio.create_task(user)
            for user in (receive(channel), take(channel, by_chunks=by_chunks), give(channel))
        ]
        for step in script:
            await step(foreign)
        foreign.close()
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*users, return_exceptions=True)
        assert outcomes[1] is None or type(outcomes[1]) in ENDS  # an orderly end ends incoming()
        assert {type(outcome) for outcome in (outcomes[0], outcomes[2])} <= set(ENDS)
        with pytest.raises(ChannelError):
            await channel.ping()


@pytest.mark.parametrize("role", ROLES)
@given(script=steps, by_chunks=st.booleans())
async def test_bent_frames(script, by_chunks, role):
    await survive(role, script, by_chunks=by_chunks)


@given(
    script=st.lists(st.one_of(control_steps, lane_steps, raw_steps), max_size=6),
    role=st.sampled_from(ROLES),
)
async def test_noise_between_the_frames(script, role):
    await survive(role, script, by_chunks=False)
