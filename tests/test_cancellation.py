"""Whatever is cancelled, and whenever: the memory is the caller's again, and the channel is as good as before.

hypothesis chooses the lane, the loop, the sizes and the turn of the loop at which the axe falls.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from aiordma import Busy, Channel, ChannelConfig, Transfer, TransferAborted
from tests.conftest import no_verbs
from tests.foreign import nothing_left
from tests.harness import (
    CANARY,
    LANE_PARAMS,
    cancel,
    channel_pair,
    noise,
    round_trips,
    run,
    turns,
    until,
    usable,
)


@dataclass(frozen=True)
class Case:
    """Where and with what a property is tried."""

    loop_kind: str
    lanes: int
    checksum: bool
    confirm: bool
    is_registered: bool
    slot_bytes: int
    slots_64th: int

    @property
    def nbytes(self) -> int:
        """Of a transfer."""
        return min(self.slot_bytes * self.slots_64th // 64, 4 << 20)

    def memory(self, channel: Channel, array: np.ndarray) -> np.ndarray:
        """The array, which a device may read and write where it lies, if that is the case."""
        if self.is_registered and array.nbytes:
            channel.register(array)
        return array

    def run(self, kind: str, scene: Callable[[Case, Channel, Channel], Awaitable[None]]) -> None:
        run(self._run(kind, scene), self.loop_kind)

    async def _run(
        self, kind: str, scene: Callable[[Case, Channel, Channel], Awaitable[None]]
    ) -> None:
        config = ChannelConfig(
            slot_bytes=self.slot_bytes,
            slots=4,
            lanes=self.lanes,
            checksum=self.checksum,
            messages=4,
            open_transfers=4,
        )
        async with nothing_left(), channel_pair(kind, config) as (near, far):
            await scene(self, near, far)
            await usable(near, far)


cases = st.builds(
    Case,
    loop_kind=st.sampled_from(["asyncio", "uvloop"]),
    lanes=st.integers(1, 3),
    checksum=st.booleans(),
    confirm=st.booleans(),
    is_registered=st.booleans(),
    slot_bytes=st.sampled_from([4096, 256 << 10]),  # the large ones come in several pieces over TCP
    slots_64th=st.one_of(st.integers(0, 3 * 64), st.integers(3 * 64, 60 * 64)),
)
EXAMPLES = 60 if no_verbs() else 15
"""A device takes its time."""
on_every_lane = pytest.mark.parametrize("kind", LANE_PARAMS)
points = st.one_of(st.integers(0, 12), st.integers(0, 120))
"""After how many turns of the loop."""


# Sending


CONSUMERS = ["recv_tensor", "into", "arrays", "chunks", "nobody"]


async def consume(channel: Channel, how: str, truth: np.ndarray) -> None:
    """Receive the transfer; whatever is received must be what was there when it was sent."""
    if how == "nobody":
        return
    if how in ("recv_tensor", "into"):
        into = np.zeros_like(truth) if how == "into" else None
        assert np.array_equal(await channel.recv_tensor(into=into), truth)
        return
    async with aclosing(channel.incoming()) as transfers:
        transfer = await anext(transfers)
        if how == "arrays":
            assert np.array_equal((await transfer.arrays())["tensor"], truth)
            return
        async with aclosing(transfer.chunks()) as chunks:
            async for chunk in chunks:
                with chunk:
                    for _, first, view in chunk.parts():
                        assert np.array_equal(view, truth[first : first + view.size])
                await asyncio.sleep(0)


@on_every_lane
@given(cases, st.sampled_from(CONSUMERS), points, points)
@settings(max_examples=EXAMPLES)
def test_a_send(kind: str, case: Case, how: str, head_start: int, point: int) -> None:
    async def scene(case: Case, near: Channel, far: Channel) -> None:
        truth = noise(case.nbytes)
        memory = case.memory(near, truth.copy())

        async def send() -> None:
            try:
                await near.send_tensor(memory, confirm=case.confirm)
            finally:
                memory[:] = ~truth  # whoever reads it from now on sees what was never sent

        consuming = asyncio.create_task(consume(far, how, truth))
        await turns(head_start)
        sending = asyncio.create_task(send())
        await turns(point)
        await cancel(sending)
        assert near.stats().open_sends == 0
        await round_trips(near, far)
        if sending.cancelled() and not consuming.done():
            await cancel(consuming)  # its transfer was never opened
        outcome = (await asyncio.gather(consuming, return_exceptions=True))[0]
        if not sending.cancelled():
            assert outcome is None
        elif outcome is not None:
            assert isinstance(outcome, TransferAborted | asyncio.CancelledError), outcome
        if how == "nobody" and not sending.cancelled():
            await (
                far.recv_tensor()
            )  # acknowledged, and waits in its slot; its memory was overwritten since

    case.run(kind, scene)


# Receiving


async def receive(channel: Channel, how: str, into: np.ndarray, taken: list[Transfer]) -> None:
    """Receive the next transfer into this memory, or wherever; `taken` is what came out of incoming()."""
    match how:
        case "recv_tensor into":
            await channel.recv_tensor(into=into)
        case "recv_tensors into":
            await channel.recv_tensors(into={"tensor": into})
        case "recv_tensors":
            await channel.recv_tensors()
        case _:
            async with aclosing(channel.incoming()) as transfers:
                transfer = await anext(transfers)
                taken.append(transfer)
                await (
                    transfer.into({"tensor": into})
                    if how == "into"
                    else consume_chunks(transfer, into)
                )


async def receive_again(channel: Channel, taken: list[Transfer]) -> np.ndarray:
    """The transfer whose receiver was cancelled, unless it was aborted, else the next."""
    for transfer in taken:
        with contextlib.suppress(TransferAborted):
            arrays: dict[str, np.ndarray] = await transfer.arrays()
            return arrays["tensor"]
    array: np.ndarray = await channel.recv_tensor()
    return array


async def consume_chunks(transfer: Transfer, into: np.ndarray) -> None:
    async with aclosing(transfer.chunks()) as chunks:
        async for chunk in chunks:
            with chunk:
                for _, first, view in chunk.parts():
                    into[first : first + view.size] = view
                await asyncio.sleep(0)


RECEIVERS = ["recv_tensor into", "recv_tensors into", "recv_tensors", "into", "chunks"]


@on_every_lane
@given(cases, st.sampled_from(RECEIVERS), points, points)
@settings(max_examples=EXAMPLES)
def test_a_receive(kind: str, case: Case, how: str, head_start: int, point: int) -> None:
    async def scene(case: Case, near: Channel, far: Channel) -> None:
        truth = noise(case.nbytes)
        memory = case.memory(far, np.full_like(truth, CANARY))
        was_moved = False

        taken: list[Transfer] = []

        async def call() -> None:
            nonlocal was_moved
            try:
                await receive(far, how, memory, taken)
            except asyncio.CancelledError:
                memory[:] = CANARY  # the caller's again: nobody else may write to it from now on
                was_moved = near.stats().sent_chunks > 0
                raise

        first = asyncio.create_task(call())
        await turns(head_start % 5)
        sending = asyncio.create_task(near.send_tensor(truth, confirm=case.confirm))
        await turns(point)
        await cancel(first)
        is_taken = not first.cancelled()
        if is_taken:
            first.result()
            assert how == "recv_tensors" or np.array_equal(memory, truth)
        # Chunks may be consumed to the last when the axe falls on what comes after.
        is_taken |= any(t.reception.is_over and t.reception._error is None for t in taken)
        second = asyncio.create_task(receive_again(far, [] if is_taken else taken))
        await asyncio.wait([sending])
        await round_trips(near, far)
        if sending.exception() is not None:
            assert isinstance(sending.exception(), TransferAborted)
            assert not is_taken
            assert was_moved or how == "chunks", (
                "cancelled before the first chunk came, and yet lost"
            )
        elif case.confirm or not was_moved:
            assert second.done() != is_taken, "either of the two has it, not both"
        if second.done():
            assert np.array_equal(second.result(), truth)
        else:
            await near.send_tensor(truth[:100], confirm=True)
            assert np.array_equal(await second, truth[:100])
        if first.cancelled():
            assert (memory == CANARY).all(), "written after the call returned"

    case.run(kind, scene)


@on_every_lane
@given(cases, st.lists(points, min_size=1, max_size=6), st.integers(0, 6))
@settings(max_examples=EXAMPLES)
def test_many_receives_of_many_transfers(
    kind: str, case: Case, axes: list[int], spared: int
) -> None:
    """Those that were not cancelled get what was not aborted, in the order of the calls."""

    async def scene(case: Case, near: Channel, far: Channel) -> None:
        count = len(axes) + spared
        takers = [asyncio.create_task(far.recv_tensors()) for _ in range(count)]
        senders = [
            asyncio.create_task(near.send_tensor(noise(case.nbytes, i), meta=i, confirm=True))
            for i in range(count)
        ]
        for n, axe in enumerate(axes):
            await turns(axe % 30)
            await cancel(takers[n * 7 % count])
        await until(lambda: all(task.done() for task in takers))
        got = [task.result() for task in takers if not task.cancelled()]
        rest = asyncio.create_task(drain(far, got))
        outcomes = await asyncio.gather(*senders, return_exceptions=True)
        await cancel(rest)
        assert sorted(int(str(r.meta)) for r in got) == [
            i for i, outcome in enumerate(outcomes) if outcome is None
        ]
        for received in got:
            seed = int(str(received.meta))
            assert np.array_equal(received.arrays["tensor"], noise(case.nbytes, seed))
        assert {type(outcome) for outcome in outcomes} <= {type(None), TransferAborted}

    case.run(kind, scene)


async def drain(channel: Channel, into: list[Any]) -> None:
    while True:
        into.append(await channel.recv_tensors())


@on_every_lane
@given(cases, st.lists(st.tuples(st.booleans(), points, st.booleans()), max_size=60))
@settings(max_examples=EXAMPLES)
def test_messages(kind: str, case: Case, calls: list[tuple[bool, int, bool]]) -> None:
    async def scene(case: Case, near: Channel, far: Channel) -> None:
        senders: list[asyncio.Task[None]] = []
        takers: list[asyncio.Task[int]] = []
        for is_send, axe, is_cancelled in calls:
            tasks: list[Any] = senders if is_send else takers
            call = near.send(len(senders)) if is_send else far.recv()
            tasks.append(asyncio.create_task(call))
            if is_cancelled:
                await turns(axe % 4)
                tasks[axe % len(tasks)].cancel()
        await round_trips(near, far)
        for task in (*senders, *takers):
            await cancel(task)
        taken = [task.result() for task in takers if not task.cancelled()]
        taken += [await far.recv() for _ in range(far.stats().unread_messages)]
        sent = [i for i, task in enumerate(senders) if not task.cancelled()]
        assert sorted(taken) == sent, "lost, doubled, or sent though it was cancelled"

    case.run(kind, scene)


CALLS = ["send", "recv", "send_tensor", "recv_tensor", "ping", "incoming"]


@on_every_lane
@given(
    cases,
    st.lists(st.tuples(st.sampled_from(CALLS), st.booleans(), points, points), max_size=25),
)
@settings(max_examples=EXAMPLES)
def test_anything(kind: str, case: Case, plan: list[tuple[str, bool, int, int]]) -> None:
    """A crowd of calls at both ends, each cancelled at some time."""

    async def scene(case: Case, near: Channel, far: Channel) -> None:
        sent = {near: 0, far: 0}

        async def call(what: str, channel: Channel, other: Channel) -> None:
            match what:
                case "send":
                    await channel.send("x" * 1000)
                case "recv":
                    assert await channel.recv() == "x" * 1000
                case "ping":
                    await channel.ping()
                case "send_tensor":
                    sent[channel] += 1
                    seed = sent[channel]
                    await channel.send_tensor(noise(case.nbytes, seed), meta=seed)
                case "recv_tensor":
                    arrays, meta = await channel.recv_tensors()
                    assert np.array_equal(arrays["tensor"], noise(case.nbytes, int(str(meta))))
                case "incoming":
                    async with aclosing(channel.incoming()) as transfers:
                        transfer = await anext(transfers)
                        got = np.zeros(case.nbytes, np.uint8)
                        await consume_chunks(transfer, got)
                        assert np.array_equal(got, noise(case.nbytes, int(str(transfer.meta))))

        async def cut(task: asyncio.Task[None], axe: int) -> None:
            await turns(axe)
            await cancel(task)
            if not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), TransferAborted | Busy)

        async with asyncio.TaskGroup() as cutting:
            for what, is_near, pause, axe in plan:
                ends = (near, far) if is_near else (far, near)
                task = asyncio.create_task(call(what, *ends))
                cutting.create_task(cut(task, axe))
                await turns(pause % 5)
        await round_trips(near, far)
        for channel in (near, far):
            for _ in range(channel.stats().unread_messages):
                await channel.recv()
            left = asyncio.create_task(drain(channel, []))
            await round_trips(near, far)
            await cancel(left)

    case.run(kind, scene)
