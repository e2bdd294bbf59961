"""Rounds whose uploads pass by side by side: who falls out amid its own, and what the others pay."""

import asyncio
from functools import partial
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import Channel
from fedllm import Aligned, FedAvg, Outcome, RoundResult, Status, run_round
from fedllm.messages import FROM_SERVER, Commit, Upload
from tests.playing import (
    DEADLINE_S,
    LARGE,
    TWO,
    WEIGHTS,
    A,
    B,
    C,
    be_asked,
    bits,
    changed,
    pairs,
    play,
    takes_part,
)

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")

ALIGNED = FedAvg(aggregate=Aligned)
CHUNKS = 3
"""That get through before a silo stalls; all of an update are six."""


def stall_after(chunks: int, channel: Channel) -> None:
    """The silo's lanes take so many chunks more, and then none."""
    sender = channel._link.session.sender
    send = sender.next

    def next_or_nothing(lane: int) -> Any:
        nonlocal chunks
        plan = send(lane) if chunks else None
        chunks -= plan is not None
        return plan

    sender.next = next_or_nothing  # type: ignore[method-assign]


async def stall_amid(channel: Channel) -> Commit:
    task, attempt = await be_asked(channel)
    stall_after(CHUNKS, channel)
    with pytest.raises(aiordma.TransferAborted):
        await channel.send_tensors(C, meta=task.meta(attempt))
    commit: Commit = await channel.recv(FROM_SERVER)
    return commit


async def die_amid(channel: Channel) -> None:
    task, attempt = await be_asked(channel)
    stall_after(CHUNKS, channel)
    sending = asyncio.ensure_future(channel.send_tensors(C, meta=task.meta(attempt)))
    while channel.stats().sent_chunks < CHUNKS:  # noqa: ASYNC110 - turns of the loop, no time
        await asyncio.sleep(0)
    await channel.ping()
    await channel.aclose()
    with pytest.raises(aiordma.ChannelClosed):
        await sending


def only_a_and_b(result: RoundResult, seen: dict[str, Any]) -> Outcome:
    assert bits(result.weights) == TWO
    assert {seen[name].accepted for name in "ab"} == {True}
    return result.outcomes["c"]


GOOD = {"a": takes_part(A), "b": takes_part(B, weight=2.0)}


async def test_who_stalls_amid_its_upload_is_dropped_and_the_others_begin_anew():
    strategy = FedAvg(aggregate=partial(Aligned, idle_timeout_s=DEADLINE_S))
    outcome = only_a_and_b(*await play({**GOOD, "c": stall_amid}, strategy=strategy))
    assert outcome.status is Status.FAILED
    assert isinstance(outcome.error, aiordma.TransferTimeout)
    assert "sent nothing for 0.3 s, and all others waited for it" in outcome.reason


async def test_the_deadline_takes_only_who_is_waited_for():
    outcome = only_a_and_b(
        *await play({**GOOD, "c": stall_amid}, strategy=ALIGNED, upload_deadline_s=DEADLINE_S)
    )
    assert outcome.status is Status.LATE
    assert outcome.reason == "its update did not come within 0.3 s"


async def test_who_dies_amid_its_upload_is_left_out():
    outcome = only_a_and_b(*await play({**GOOD, "c": die_amid}, strategy=ALIGNED))
    assert outcome.status is Status.FAILED
    assert isinstance(outcome.error, aiordma.ChannelError)


async def test_with_a_restart_the_deadline_begins_anew(monkeypatch: pytest.MonkeyPatch):
    given: list[float | None] = []
    timeout = asyncio.timeout

    def note(delay: float | None) -> asyncio.Timeout:
        given.append(delay)
        return timeout(delay)

    monkeypatch.setattr(asyncio, "timeout", note)
    bad = C["w"].copy()
    bad[-1, -1] = np.nan
    sends = {**GOOD, "c": takes_part(changed(w=bad))}
    outcome = only_a_and_b(*await play(sends, strategy=ALIGNED, upload_deadline_s=7.25))
    assert outcome.status is Status.REFUSED
    assert "'w' holds nan at [4999, 3]" in outcome.reason
    assert given.count(7.25) == 2


async def test_a_broken_upload_goes_on_where_folding_was():
    """Only its own silo sends again."""
    asked: list[int] = []

    async def stumble(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        sent = channel.stats().sent_chunks
        sending = asyncio.ensure_future(channel.send_tensors(LARGE, meta=task.meta(attempt)))
        while channel.stats().sent_chunks < sent + 20:  # noqa: ASYNC110
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert await channel.recv(FROM_SERVER) == Upload(task.ticket, 2)
        await channel.send_tensors(LARGE, meta=task.meta(2))
        commit: Commit = await channel.recv(FROM_SERVER)
        return commit

    async def steady(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        asked.append(attempt)
        await channel.send_tensors(LARGE, meta=task.meta(attempt))
        commit: Commit = await channel.recv(FROM_SERVER)
        return commit

    result, seen = await play(
        {"a": steady, "c": stumble}, weights=LARGE, strategy=ALIGNED, min_silos=2
    )
    assert seen["a"].accepted
    assert seen["c"].accepted
    assert asked == [1]
    assert bits(result.weights) == bits(LARGE)


async def test_a_bug_of_the_reduction_is_no_silos_failure():
    def broken(rows: object, shares: object, out: object) -> None:
        raise ZeroDivisionError

    async with pairs("a", "b") as (servers, silos):
        acts = [asyncio.ensure_future(GOOD[name](silos[name])) for name in silos]
        strategy = FedAvg(aggregate=partial(Aligned, reduce=broken))
        with pytest.raises(ZeroDivisionError):
            await run_round(servers, WEIGHTS, round=1, strategy=strategy, min_silos=2)
        for act in acts:
            act.cancel()
        await asyncio.gather(*acts, return_exceptions=True)


async def test_silos_may_keep_their_tensors_in_any_order():
    weights = {name: np.full(30_000, i, np.float32) for i, name in enumerate("xyz")}
    turned = dict(reversed(weights.items()))
    sends = {"a": takes_part(weights), "b": takes_part(turned, weight=2.0)}
    like = {"w": np.zeros(1, np.float32), **weights}  # `takes_part` looks at it
    for update in (weights, turned):
        update["w"] = np.ones(1, np.float32)
    result, _ = await play(sends, weights=like, strategy=ALIGNED, min_silos=2)
    assert bits(result.weights) == {name: weights[name].tobytes() for name in like}
