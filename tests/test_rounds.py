"""One round over real channels: the mean, the cohort, the quorum, and who is late."""

import asyncio
import itertools
import re
from functools import partial
from typing import Any

import numpy as np
import pytest

from aiordma import Channel
from fedllm import Aligned, QuorumNotReached, Report, SettingError, Staged, Status, run_round
from fedllm.messages import FROM_SERVER, Commit
from tests.playing import (
    DEADLINE_S,
    LARGE,
    NAN,
    SMALL,
    TWO,
    WEIGHTS,
    A,
    B,
    Behaviour,
    C,
    be_asked,
    begin_upload,
    bits,
    changed,
    die_before_ready,
    mean_of,
    of_the_round,
    pairs,
    play,
    say_ready,
    silo_on,
    strategy,
    take_task,
    takes_part,
)

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


@pytest.fixture(autouse=True, params=[Staged, Aligned])
def aggregate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, either way."""
    monkeypatch.setattr("tests.playing.AGGREGATE", request.param)


async def test_a_round_is_the_weighted_mean_and_all_are_told():
    before = bits(WEIGHTS)
    result, seen = await play(
        {"a": takes_part(A), "b": takes_part(B, weight=2.0)}, round=7, min_silos=2
    )
    assert bits(result.weights) == TWO
    assert bits(WEIGHTS) == before
    assert result.round == 7
    assert result.metrics == {"loss": pytest.approx((1 + 2 * 2) / 3)}
    size = sum(array.nbytes for array in A.values())
    for name, weight in (("a", 1.0), ("b", 2.0)):
        outcome = result.outcomes[name]
        assert (outcome.status, outcome.reason, outcome.error) == (Status.COMMITTED, "", None)
        assert (outcome.bytes, outcome.sent_bytes, outcome.weight) == (size, size, weight)
        assert 0 < outcome.seconds < result.seconds
        assert seen[name].accepted
        assert seen[name].bytes == size


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
async def test_any_order_of_arrival_gives_the_same_bits(order: tuple[str, ...]):
    turns = {name: asyncio.Event() for name in order}
    parts = {"a": (1.0, A), "b": (2.0, B), "c": (5.0, C)}
    behaviours: dict[str, Behaviour] = {}
    for name, following in zip(order, [*order[1:], None], strict=True):
        weight, arrays = parts[name]

        async def act(channel: Channel, n=name, f=following, w=weight, u=arrays) -> Report:
            reporting = asyncio.ensure_future(takes_part(u, weight=w, turn=turns[n])(channel))
            await turns[n].wait()
            if f is not None:
                turns[f].set()
            return await reporting

        behaviours[name] = act
    turns[order[0]].set()
    result, _ = await play(behaviours)
    assert bits(result.weights) == mean_of(*((n, *parts[n]) for n in "abc"))


async def test_who_is_late_is_told_and_takes_part_in_the_next_round():
    late = asyncio.Event()
    async with pairs("a", "b") as ends:
        silo = silo_on(ends[1]["b"])
        slow = asyncio.ensure_future(takes_part(C, turn=late, silo=silo)(ends[1]["b"]))
        servers = ends[0]
        act = asyncio.ensure_future(takes_part(A)(ends[1]["a"]))
        result = await run_round(
            servers,
            WEIGHTS,
            round=1,
            strategy=strategy(),
            min_silos=1,
            train_deadline_s=DEADLINE_S,
        )
        assert (await act).accepted
        assert bits(result.weights) == bits(A)
        outcome = result.outcomes["b"]
        assert (outcome.status, outcome.is_busy) == (Status.LATE, True)
        assert outcome.reason == "READY did not come within 0.3 s"
        # The next round begins before the silo is done with this one: its READY for it is stale by then.
        behaviours = {
            "a": takes_part(A),
            "b": _late_then(slow, late, takes_part(B, weight=2.0, silo=silo)),
        }
        result, seen = await play(behaviours, ends=ends, round=2)
        assert bits(result.weights) == TWO
        assert seen["b"][0] == Report(accepted=False, reason=outcome.reason, bytes=0, seconds=0.0)
        assert seen["b"][1].accepted


def _late_then(slow: "asyncio.Future[Report]", late: asyncio.Event, after: Behaviour) -> Behaviour:
    async def behave(channel: Channel) -> tuple[Report, Report]:
        late.set()
        return await slow, await after(channel)

    return behave


async def test_who_does_not_upload_in_time_is_late():
    async def stall(channel: Channel) -> Commit:
        await be_asked(channel)
        return await channel.recv(FROM_SERVER)

    result, seen = await play({"a": takes_part(A), "c": stall}, upload_deadline_s=DEADLINE_S)
    assert bits(result.weights) == bits(A)
    outcome = result.outcomes["c"]
    assert (outcome.status, outcome.is_busy) == (Status.LATE, False)
    assert outcome.reason == seen["c"].reason == "its update did not come within 0.3 s"


async def test_too_few_silos_end_the_round_at_once_and_all_are_told():
    async def train_for_ever(channel: Channel) -> Commit:
        task = await take_task(channel)
        commit: Commit = await channel.recv(FROM_SERVER)
        assert commit.ticket == task.ticket
        return commit

    told: dict[str, Any] = {}

    async def note(name: str, behaviour: Behaviour, channel: Channel) -> None:
        told[name] = await behaviour(channel)

    behaviours = {"a": takes_part(A), "b": die_before_ready, "c": train_for_ever}
    with pytest.raises(
        QuorumNotReached, match=r"round 1: 2 of 3 silos are left, and 3 are"
    ) as info:
        await play({n: partial(note, n, b) for n, b in behaviours.items()}, min_silos=3)
    statuses = {name: outcome.status for name, outcome in info.value.outcomes.items()}
    assert statuses == {"a": Status.ABANDONED, "b": Status.FAILED, "c": Status.ABANDONED}
    assert info.value.outcomes["c"].is_busy
    assert not info.value.outcomes["b"].is_busy
    assert told["a"].reason == told["c"].reason == info.value.reason
    assert "are needed; b is failed: waiting for READY: the peer closed" in str(info.value)
    assert not told["a"].accepted
    assert not told["c"].accepted


async def test_a_quorum_that_breaks_during_the_upload_changes_nothing():
    with pytest.raises(QuorumNotReached, match="1 of 2 silos are left") as info:
        await play({"a": takes_part(A), "c": takes_part(changed(w=NAN))}, min_silos=2)
    statuses = {name: outcome.status for name, outcome in info.value.outcomes.items()}
    assert statuses == {"a": Status.ABANDONED, "c": Status.REFUSED}
    assert re.search(r"; c is refused: .* holds nan at \[.*\]$", str(info.value))


async def test_a_round_without_silos_has_no_quorum():
    with pytest.raises(QuorumNotReached, match="0 of 0 silos"):
        await run_round({}, WEIGHTS, round=1, strategy=strategy(), min_silos=1)
    wrong: tuple[dict[str, Any], ...] = ({"min_silos": 0}, {"min_silos": 1, "upload_deadline_s": 0})
    for options in wrong:
        with pytest.raises(SettingError):
            await run_round({}, WEIGHTS, round=1, strategy=strategy(), **options)


@pytest.mark.parametrize("fails", [False, True])
async def test_nobody_hears_of_a_round_before_it_is_saved(fails: bool):
    told: list[Report] = []

    async def note(behaviour: Behaviour, channel: Channel) -> None:
        told.append(await behaviour(channel))

    async def save(weights: Any, reports: Any) -> None:
        assert bits(weights) == TWO
        assert {name: one.weight for name, one in reports.items()} == {"a": 1.0, "b": 2.0}
        for silo in ends[1].values():
            await silo.ping()  # what was said before is there
        assert told == []
        if fails:
            raise OSError("no space left")

    behaviours: dict[str, Behaviour] = {
        "a": partial(note, takes_part(A)),
        "b": partial(note, takes_part(B, weight=2.0)),
        "c": takes_part(changed(w=NAN)),
    }
    async with pairs(*behaviours) as ends:
        if fails:
            with pytest.raises(OSError, match="no space left"):
                await play(behaviours, ends=ends, before_commit=save)
            assert {one.reason for one in told} == {"round 1: the server could not finish it"}
        else:
            await play(behaviours, ends=ends, before_commit=save)
    assert [one.accepted for one in told] == [not fails] * 2


async def reach_nothing(channel: Channel) -> None:
    pass


async def reach_the_weights(channel: Channel) -> None:
    await channel.recv(FROM_SERVER)


async def reach_the_upload(channel: Channel) -> Any:
    return await begin_upload(channel, *await be_asked(channel))


@pytest.mark.parametrize(
    "reach", [reach_nothing, reach_the_weights, take_task, say_ready, be_asked, reach_the_upload]
)
async def test_a_cancelled_round_leaves_usable_channels(reach: Behaviour):
    async with pairs("a", "c") as ends:
        servers, silos = ends
        ones = {name: np.ones_like(array) for name, array in LARGE.items()}

        async def go_on_until_accepted(channel: Channel) -> list[Report]:
            reports: list[Report] = []
            silo = silo_on(channel)
            async for task in silo.rounds():
                reports.append(await task.submit(ones, weight=1))
                if reports[-1].accepted:
                    break
            await silo.aclose()
            return reports

        going_on = asyncio.ensure_future(go_on_until_accepted(silos["a"]))
        running = asyncio.ensure_future(
            run_round(servers, LARGE, round=1, strategy=strategy(), min_silos=2)
        )
        reached = await reach(silos["c"])
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert of_the_round() == []
        if isinstance(reached, asyncio.Future):
            reached.cancel()
            await asyncio.gather(reached, return_exceptions=True)
        behaviours: dict[str, Behaviour] = {"a": lambda _: going_on, "c": takes_part(ones)}
        result, seen = await play(behaviours, ends=ends, weights=LARGE, round=2, min_silos=2)
    assert bits(result.weights) == bits(ones)
    assert seen["c"].accepted
    *unanswered, last = seen["a"]
    assert last.accepted
    assert {report.reason for report in unanswered} <= {"the server went on without this update"}
    if reach is be_asked:
        assert unanswered


async def read_nothing(channel: Channel) -> None:
    pass


async def fill_the_ears_of(channel: Channel) -> None:
    """There is room for a task, and for nothing that comes after."""
    for _ in range(SMALL.messages - 1):
        await channel.send("unheard")


async def test_nobody_waits_for_who_cannot_be_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", 3600.0)
    ones = {name: np.ones_like(array) for name, array in LARGE.items()}
    async with (
        pairs("a", "deaf") as ends,
        asyncio.timeout(5),
    ):  # half of what it has to hear a commit
        await fill_the_ears_of(ends[0]["deaf"])
        result, seen = await play(
            {"a": takes_part(ones), "deaf": read_nothing},
            ends=ends,
            weights=LARGE,
            train_deadline_s=1.0,
        )
    assert seen["a"].accepted
    outcome = result.outcomes["deaf"]
    assert (outcome.status, outcome.is_busy) == (Status.LATE, True)
    assert isinstance(outcome.error, TimeoutError)


async def test_who_cannot_be_told_counts_for_no_quorum(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", DEADLINE_S)

    async with pairs("a", "b", "deaf") as ends:
        await fill_the_ears_of(ends[0]["deaf"])
        good, bad = takes_part(A), takes_part(changed(w=NAN))
        with pytest.raises(QuorumNotReached, match="1 of 3 silos are left") as info:
            await play(
                {"a": good, "b": bad, "deaf": read_nothing},
                ends=ends,
                min_silos=2,
                train_deadline_s=DEADLINE_S,
            )
    assert info.value.outcomes["deaf"].status is Status.LATE
    assert isinstance(info.value.outcomes["deaf"].error, TimeoutError)
