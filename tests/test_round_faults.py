"""What goes wrong with one silo in a round is its outcome, and nobody else notices."""

import asyncio
import math
import re
from contextlib import aclosing, suppress
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import aiordma
from aiordma import Channel, prepare
from fedllm import Aligned, QuorumNotReached, Ready, Staged, Status, Task, UpdateError
from fedllm.messages import FROM_SERVER, Commit, Decline, Upload
from tests.playing import (
    DEADLINE_S,
    INF,
    LARGE,
    NAN,
    SMALL,
    TWO,
    A,
    B,
    Behaviour,
    C,
    Update,
    be_asked,
    begin_upload,
    bits,
    break_every_upload_off,
    changed,
    die_before_ready,
    mean_of,
    pairs,
    play,
    say_ready,
    take_task,
    takes_part,
)

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


@pytest.fixture(autouse=True, params=[Staged, Aligned])
def aggregate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, either way."""
    monkeypatch.setattr("tests.playing.AGGREGATE", request.param)


BAD: dict[str, tuple[Update, float, str]] = {
    "a name more": (changed(x=np.ones(1)), 1, r"has \['x'\] besides"),
    "a name less": ({"w": C["w"]}, 1, r"lacks \['b'\]"),
    "another shape": (changed(b=np.ones(4, np.float16)), 1, r"'b' has shape \(4,\), not \(3,\)"),
    "another dtype": (changed(b=np.ones(3, np.float32)), 1, "'b' is F32, not F16"),
    "an integer dtype": (changed(b=np.ones(3, np.int16)), 1, "'b' is I16, not F16"),
    "NaN": (changed(w=NAN), 1, r"'w' holds nan at \[3, 1\]"),
    "Inf": (changed(b=INF), 1, r"'b' holds -inf at \[2\]"),
    "weight 0": (C, 0, "weight 0.0 is not above 0"),
    "a negative weight": (C, -1, "weight -1.0 is not above 0"),
    "a huge weight": (C, 1e30, r"weight 1e\+30 is not above 0"),
    "weight NaN": (C, math.nan, "weight nan is not above 0"),
}


@pytest.mark.parametrize(("sends", "weight", "says"), BAD.values(), ids=BAD)
async def test_a_bad_update_is_refused_and_leaves_no_trace(sends: Update, weight: float, says: str):
    good = {"a": takes_part(A), "b": takes_part(B, weight=2.0)}
    async with pairs("a", "b", "c") as ends:
        result, seen = await play({**good, "c": takes_part(sends, weight=weight)}, ends=ends)
        assert bits(result.weights) == TWO
        outcome = result.outcomes["c"]
        assert outcome.status is Status.REFUSED
        assert isinstance(outcome.error, UpdateError)
        assert re.search(says, outcome.reason)
        assert outcome.error.__traceback__ is None  # its frames would hold the whole update
        assert str(outcome.error) in outcome.reason
        assert (seen["c"].accepted, seen["c"].reason) == (False, str(outcome.error))
        again, _ = await play({**good, "c": takes_part(C)}, ends=ends, round=2)
    assert again.outcomes["c"].status is Status.COMMITTED


async def die_at_ready(channel: Channel) -> None:
    await say_ready(channel)
    await channel.aclose()


async def die_before_upload(channel: Channel) -> None:
    await be_asked(channel)
    await channel.aclose()


async def die_while_uploading(channel: Channel) -> None:
    sending = await begin_upload(channel, *await be_asked(channel))
    await channel.aclose()
    with pytest.raises(aiordma.ChannelClosed):
        await sending


async def decline(channel: Channel) -> Commit:
    task = await take_task(channel)
    await channel.send(Decline(task.ticket, "its own gate said no"))
    return await channel.recv(FROM_SERVER)


async def talk_nonsense(channel: Channel) -> Commit:
    await take_task(channel)
    await channel.send({"type": "Gibberish"})
    return await channel.recv(FROM_SERVER)


async def send_a_huge_meta(channel: Channel) -> None:
    """Past the checks of our own end, which would send no such thing."""
    task, attempt = await be_asked(channel)
    meta = {**task.meta(attempt), "more": bytes(10 << 20)}
    huge = replace(prepare(B), meta_bytes=msgspec.msgpack.encode(meta))
    sent = channel._link.send(huge)
    with pytest.raises(aiordma.ChannelError):  # it says why, if that comes through
        await sent.acknowledged


FAULTS: dict[str, tuple[Behaviour, Status, str]] = {
    "dies before READY": (die_before_ready, Status.FAILED, "waiting for READY: .*closed"),
    "dies before its upload": (die_before_upload, Status.FAILED, "receiving the update: .*closed"),
    "declines": (decline, Status.REFUSED, "declined: its own gate said no"),
    "talks nonsense": (
        talk_nonsense,
        Status.FAILED,
        "waiting for READY: the message is not .*'Gibberish'",
    ),
    "a meta of 10 MB": (
        send_a_huge_meta,
        Status.FAILED,
        "a control frame of 10485... bytes, over the 8388672",
    ),
    "aborts each upload": (break_every_upload_off, Status.FAILED, "receiving the update: .*cancel"),
}


@pytest.mark.parametrize(("fault", "status", "says"), FAULTS.values(), ids=FAULTS)
async def test_one_silos_fault_is_its_outcome_alone(fault: Behaviour, status: Status, says: str):
    good = {"a": takes_part(A), "b": takes_part(B, weight=2.0)}
    result, seen = await play({**good, "c": fault}, min_silos=2)
    assert bits(result.weights) == TWO
    assert result.outcomes["c"].status is status
    assert re.search(says, result.outcomes["c"].reason)
    assert seen["a"].accepted
    assert seen["b"].accepted
    if seen["c"] is not None:
        assert seen["c"] == Commit(seen["c"].ticket, False, str(result.outcomes["c"].error))


async def test_a_silo_that_refuses_the_weights_has_failed():
    async def refuse(channel: Channel) -> Commit:
        await channel.recv(FROM_SERVER)
        async with aclosing(channel.incoming()) as transfers:
            await (await anext(transfers)).refuse("no room")
        return await channel.recv(FROM_SERVER)

    result, seen = await play({"a": takes_part(LARGE), "c": refuse}, weights=LARGE)
    outcome = result.outcomes["c"]
    assert (outcome.status, outcome.is_busy) == (Status.FAILED, True)
    assert isinstance(outcome.error, aiordma.TransferRefused)
    assert outcome.reason.startswith("sending the weights: the peer refused the transfer: no room")
    assert seen["c"].reason == str(outcome.error)


@pytest.mark.parametrize("reads", [True, False])
async def test_a_silo_that_never_takes_the_weights_has_failed(
    reads: bool, monkeypatch: pytest.MonkeyPatch
):
    """And is as good as any other once it has answered."""
    monkeypatch.setattr("fedllm.participation.TAKING_TIMEOUT_S", DEADLINE_S)
    monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", DEADLINE_S)

    async def take_nothing(channel: Channel) -> None:
        if reads:
            task: Task = await channel.recv(FROM_SERVER)
            assert not (await channel.recv(FROM_SERVER)).accepted
            await channel.send(Decline(task.ticket, "too late"))

    async with pairs("a", "c") as ends:
        if not reads:
            for _ in range(SMALL.messages):
                await ends[0]["c"].send("unheard")
        result, _ = await play(
            {"a": takes_part(LARGE), "c": take_nothing}, ends=ends, weights=LARGE
        )
        assert bits(result.weights) == bits(LARGE)
        outcome = result.outcomes["c"]
        assert (outcome.status, outcome.is_busy) == (Status.FAILED, reads)
        assert outcome.reason.startswith("sending the weights: it ")
        if reads:
            again, _ = await play({"c": takes_part(LARGE)}, ends=ends, weights=LARGE, round=2)
            assert again.outcomes["c"].status is Status.COMMITTED


@pytest.mark.parametrize("dies", [die_at_ready, die_while_uploading])
async def test_who_dies_while_the_others_wait_is_left_out(dies: Behaviour):
    ones = {name: np.ones_like(array) for name, array in LARGE.items()}
    gone = asyncio.Event()

    async def die(channel: Channel) -> None:
        await dies(channel)
        gone.set()

    waits = gone if dies is die_at_ready else None
    result, _ = await play({"a": takes_part(ones, turn=waits), "c": die}, weights=LARGE)
    assert result.outcomes["c"].status is Status.FAILED
    assert isinstance(result.outcomes["c"].error, aiordma.ChannelError)
    assert bits(result.weights) == bits(ones)


@pytest.mark.parametrize("aggregate", [Staged], indirect=True)  # aligned, all uploads end together
async def test_who_dies_after_its_upload_counts():
    async def die(channel: Channel) -> None:
        task, attempt = await be_asked(channel)
        await channel.send_tensors(B, meta=task.meta(attempt), confirm=True)
        await channel.aclose()
        done.set()

    async def upload_when_it_is_dead(channel: Channel) -> None:
        task, attempt = await be_asked(channel)
        await done.wait()
        await channel.send_tensors(A, meta=task.meta(attempt))
        await channel.recv()

    done = asyncio.Event()
    result, _ = await play({"a": upload_when_it_is_dead, "b": die})
    assert bits(result.weights) == mean_of(("a", 1.0, A), ("b", 1.0, B))
    outcome = result.outcomes["b"]
    assert outcome.status is Status.COMMITTED
    assert isinstance(outcome.error, aiordma.ChannelError)
    assert outcome.reason.startswith("sending the commit: ")


async def test_an_upload_that_was_broken_off_is_asked_for_again():
    async def stumble(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        sending = await begin_upload(channel, task, attempt)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        assert await channel.recv(FROM_SERVER) == Upload(task.ticket, 2)
        await channel.send_tensors(LARGE, meta=task.meta(2))
        return await channel.recv(FROM_SERVER)

    result, seen = await play({"c": stumble}, weights=LARGE)
    assert seen["c"].accepted
    assert bits(result.weights) == bits(LARGE)


async def test_an_update_that_comes_twice_is_refused_and_counts_once():
    async def repeat(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        sending = asyncio.ensure_future(channel.send_tensors(B, meta=task.meta(attempt)))
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(aiordma.TransferRefused, match="an update is sent once"):
                await channel.send_tensors(C, meta=task.meta(attempt))
        repeated.set()
        await sending
        return await channel.recv(FROM_SERVER)

    async def upload_then(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        await repeated.wait()
        await channel.send_tensors(A, meta=task.meta(attempt))
        return await channel.recv(FROM_SERVER)

    repeated = asyncio.Event()
    result, seen = await play({"a": upload_then, "c": repeat})
    assert bits(result.weights) == mean_of(("a", 1.0, A), ("c", 1.0, B))
    assert seen["c"].accepted
    assert result.outcomes["c"].reason.startswith("turned away 2 upload(s)")
    assert result.outcomes["a"].reason == ""


@pytest.mark.parametrize("aggregate", [Staged], indirect=True)  # aligned, all uploads end together
async def test_an_update_that_is_taken_or_past_is_refused_while_the_others_go_on():
    async def repeat(channel: Channel) -> Commit:
        task, attempt = await be_asked(channel)
        await channel.send_tensors(B, meta=task.meta(attempt), confirm=True)
        with pytest.raises(aiordma.TransferRefused, match="an update is sent once"):
            await channel.send_tensors(C, meta=task.meta(attempt))
        go_on.set()
        commit: Commit = await channel.recv(FROM_SERVER)
        past = task.meta(attempt)
        task = await say_ready(channel)
        with pytest.raises(aiordma.TransferRefused, match="it is for another round"):
            await channel.send_tensors(C, meta=past)
        refused.set()
        assert commit.accepted
        return commit

    async def upload_then(channel: Channel) -> None:
        task, attempt = await be_asked(channel)
        await go_on.wait()
        await channel.send_tensors(A, meta=task.meta(attempt))
        assert (await channel.recv(FROM_SERVER)).accepted

    async def decline_then(channel: Channel) -> Commit:
        await refused.wait()
        return await decline(channel)

    go_on, refused = asyncio.Event(), asyncio.Event()
    async with pairs("a", "c") as ends:
        act = asyncio.ensure_future(repeat(ends[1]["c"]))
        await play({"a": upload_then, "c": lambda _: go_on.wait()}, ends=ends)
        behaviours: dict[str, Behaviour] = {"a": decline_then, "c": lambda _: act}
        with pytest.raises(QuorumNotReached, match="turned away 1 upload") as info:
            await play(behaviours, ends=ends, round=2, min_silos=2)
    assert info.value.outcomes["c"].status is Status.ABANDONED


async def test_updates_of_other_tickets_are_refused_and_never_taken():
    async def confuse(channel: Channel) -> Commit:
        task = await take_task(channel)
        await channel.send(Ready(task.ticket + 1, 9.0, None, {}))
        await channel.send(Decline(task.ticket - 1, "another one"))
        await channel.send(Ready(task.ticket, 1.0, None, {}))
        await channel.recv(FROM_SERVER)
        wrong: tuple[object, ...] = ({**task.meta(1), "ticket": 5}, task.meta(2), {}, None, "text")
        for meta in wrong:
            with pytest.raises(aiordma.TransferRefused, match="another round, or another attempt"):
                await channel.send_tensors(LARGE, meta=meta)
        await channel.send_tensors(B, meta=task.meta(1))
        return await channel.recv(FROM_SERVER)

    result, seen = await play({"c": confuse})
    assert seen["c"].accepted
    assert bits(result.weights) == bits(B)
