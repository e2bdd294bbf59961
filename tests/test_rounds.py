"""One round over real channels: the cohort, what goes wrong with one silo, and that nobody else notices."""

import asyncio
import itertools
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import (
    FedAvg,
    FedError,
    QuorumNotReached,
    Ready,
    Report,
    RoundResult,
    SettingError,
    Silo,
    Staged,
    Status,
    Task,
    UpdateError,
    exchange,
    run_round,
)
from fedllm.messages import FROM_SERVER, Commit, Decline, Upload, Welcome

pytestmark = pytest.mark.usefixtures("no_leaks")

SMALL = ChannelConfig(slot_bytes=1 << 14, slots=4, close_timeout_s=1.0)
LARGE_ITEMS = 1 << 20
"""Far more than the slots of `SMALL` hold."""
DEADLINE_S = 0.3

Update = dict[str, np.ndarray[Any, Any]]
Behaviour = Callable[[Channel], Awaitable[Any]]


def update(value: float, items: int = 1000) -> Update:
    rng = np.random.default_rng(int(value * 8))
    wide = rng.standard_normal(items).astype(np.float32)
    return {"w": wide.reshape(-1, 4), "b": np.full(3, value, np.float16)}


WEIGHTS = update(0)


@asynccontextmanager
async def pairs(*names: str) -> AsyncIterator[tuple[dict[str, Channel], dict[str, Channel]]]:
    """A channel a name: the server's ends, and the silos'."""
    async with AsyncExitStack() as stack, aiordma.listen(config=SMALL) as listener:
        servers, silos = {}, {}
        for name in names:
            opening = aiordma.connect(*listener.address, config=SMALL)
            silos[name] = await stack.enter_async_context(opening)
            servers[name] = await stack.enter_async_context(await listener.accept())
        yield servers, silos


def silo_on(channel: Channel) -> Silo:
    return Silo(channel, "silo", Welcome("run", 1, 1))


def takes_part(
    sends: Update,
    *,
    weight: float = 1.0,
    turn: asyncio.Event | None = None,
    silo: Silo | None = None,
) -> Callable[[Channel], Awaitable[Report]]:
    """A silo that does what it should, in one round; its training ends when its turn comes."""

    async def behave(channel: Channel) -> Report:
        me = silo or silo_on(channel)
        try:
            async for task in me.rounds():
                assert task.weights["w"].dtype == np.float32
                if turn is not None:
                    await turn.wait()
                return await task.submit(sends, weight=weight, metrics={"loss": weight})
        finally:
            await me.aclose()
        raise AssertionError("the run was over before it began")

    return behave


def of_the_round() -> list[str]:
    """The tasks that run_round made and that live."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name in ("exchange", "_Round._dismiss")]


async def play(
    behaviours: Mapping[str, Behaviour],
    *,
    ends: tuple[dict[str, Channel], dict[str, Channel]] | None = None,
    **options: Any,
) -> tuple[RoundResult, dict[str, Any]]:
    """One round with silos that behave so; what the round came to, and what each silo saw."""
    async with AsyncExitStack() as stack:
        if ends is None:
            ends = await stack.enter_async_context(pairs(*behaviours))
        servers, silos = ends
        acts = {
            name: asyncio.ensure_future(behaviour(silos[name]))
            for name, behaviour in behaviours.items()
        }
        options = {"round": 1, "strategy": FedAvg(), "min_silos": 1, **options}
        try:
            result = await run_round({n: servers[n] for n in behaviours}, WEIGHTS, **options)
        finally:
            assert of_the_round() == []
            async with asyncio.timeout(5):
                seen = await asyncio.gather(*acts.values(), return_exceptions=True)
    for one in seen:
        if isinstance(one, Exception) and not isinstance(one, aiordma.AiordmaError | FedError):
            raise one
    return result, dict(zip(acts, seen, strict=True))


def mean_of(*parts: tuple[str, float, Update]) -> dict[str, bytes]:
    staged = Staged(WEIGHTS)
    for name, weight, arrays in parts:
        contribution = staged.begin(name, weight)
        for key, buffer in contribution.buffers.items():
            buffer[...] = arrays[key]
        contribution.add()
    staged.commit()
    return bits(staged.result())


def bits(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


A, B, C = update(1), update(2), update(3)
TWO = mean_of(("a", 1.0, A), ("b", 2.0, B))


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


def changed(**changes: Any) -> Update:
    return {**C, **changes}


NAN, INF = C["w"].copy(), C["b"].copy()
NAN[3, 1], INF[2] = math.nan, -math.inf
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


# What one silo may do instead of what it should: raw channels.


async def take_task(channel: Channel) -> Task:
    task: Task = await channel.recv(FROM_SERVER)
    received = await channel.recv_tensors()
    assert received.meta == task.meta(0)
    return task


async def say_ready(channel: Channel) -> Task:
    task = await take_task(channel)
    await channel.send(Ready(task.ticket, 1.0, None, {}))
    return task


async def be_asked(channel: Channel) -> tuple[Task, int]:
    task = await say_ready(channel)
    upload: Upload = await channel.recv(FROM_SERVER)
    assert (upload.ticket, upload.attempt) == (task.ticket, 1)
    return task, upload.attempt


async def begin_upload(channel: Channel, task: Task, attempt: int) -> asyncio.Task[None]:
    """The update is on its way, and not there."""
    sent = channel.stats().sent_bytes
    sending = asyncio.ensure_future(channel.send_tensors(LARGE, meta=task.meta(attempt)))
    while channel.stats().sent_bytes == sent:  # noqa: ASYNC110 - turns of the loop, no time
        await asyncio.sleep(0)
    assert not sending.done()
    return sending


LARGE: Update = {"w": np.zeros((LARGE_ITEMS // 4, 4), np.float32), "b": np.zeros(3, np.float16)}


async def die_before_ready(channel: Channel) -> None:
    await take_task(channel)
    await channel.aclose()


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


async def break_every_upload_off(channel: Channel) -> Commit:
    task, attempt = await be_asked(channel)
    while True:
        sending = asyncio.ensure_future(channel.send_tensors(B, meta=task.meta(attempt)))
        await asyncio.sleep(0)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        message = await channel.recv(FROM_SERVER)
        if isinstance(message, Commit):
            return message
        attempt = message.attempt


FAULTS: dict[str, tuple[Behaviour, Status, str]] = {
    "dies before READY": (die_before_ready, Status.FAILED, "waiting for READY: .*closed"),
    "dies before its upload": (die_before_upload, Status.FAILED, "receiving the update: .*closed"),
    "declines": (decline, Status.REFUSED, "declined: its own gate said no"),
    "talks nonsense": (
        talk_nonsense,
        Status.FAILED,
        "waiting for READY: the message is not .*'Gibberish'",
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.WEIGHTS", LARGE)
        result, seen = await play({"a": takes_part(LARGE), "c": refuse})
    outcome = result.outcomes["c"]
    assert (outcome.status, outcome.is_busy) == (Status.FAILED, True)
    assert isinstance(outcome.error, aiordma.TransferRefused)
    assert outcome.reason.startswith("sending the weights: the peer refused the transfer: no room")
    assert seen["c"].reason == str(outcome.error)


@pytest.mark.parametrize("dies", [die_at_ready, die_while_uploading])
async def test_who_dies_while_the_others_wait_is_left_out(
    dies: Behaviour, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{__name__}.WEIGHTS", LARGE)
    ones = {name: np.ones_like(array) for name, array in LARGE.items()}
    gone = asyncio.Event()

    async def die(channel: Channel) -> None:
        await dies(channel)
        gone.set()

    waits = gone if dies is die_at_ready else None
    result, _ = await play({"a": takes_part(ones, turn=waits), "c": die})
    assert result.outcomes["c"].status is Status.FAILED
    assert isinstance(result.outcomes["c"].error, aiordma.ChannelError)
    assert bits(result.weights) == bits(ones)


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.WEIGHTS", LARGE)
        result, seen = await play({"c": stumble})
    assert seen["c"].accepted
    assert bits(result.weights) == bits(LARGE)


async def test_a_silo_uploads_again_when_it_is_asked_to():
    async with pairs("a") as (servers, silos):
        server = servers["a"]
        act = asyncio.ensure_future(takes_part(B, weight=3.0)(silos["a"]))
        task = Task(1, 77, {})
        await server.send(task)
        await server.send_tensors(WEIGHTS, meta=task.meta(0))
        assert await server.recv(Ready) == Ready(77, 3.0, None, {"loss": 3.0})
        for attempt in (1, 2, 3):
            await server.send(Upload(77, attempt))
            async with aclosing(server.incoming()) as transfers:
                transfer = await anext(transfers)
            assert transfer.meta == task.meta(attempt)
            if attempt == 1:
                await transfer.refuse("broken off")
            elif attempt == 3:
                assert bits(await transfer.arrays()) == bits(B)
            # The second one is left lying: the next request ends it.
        await server.send(Commit(77, True, ""))
        report = await act
    assert report.accepted
    assert report.bytes == sum(array.nbytes for array in B.values())


async def test_who_is_late_is_told_and_takes_part_in_the_next_round():
    late = asyncio.Event()
    async with pairs("a", "b") as ends:
        silo = silo_on(ends[1]["b"])
        slow = asyncio.ensure_future(takes_part(C, turn=late, silo=silo)(ends[1]["b"]))
        servers = ends[0]
        act = asyncio.ensure_future(takes_part(A)(ends[1]["a"]))
        result = await run_round(
            servers, WEIGHTS, round=1, strategy=FedAvg(), min_silos=1, deadline_s=DEADLINE_S
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

    result, seen = await play({"a": takes_part(A), "c": stall}, deadline_s=DEADLINE_S)
    assert bits(result.weights) == bits(A)
    outcome = result.outcomes["c"]
    assert (outcome.status, outcome.is_busy) == (Status.LATE, False)
    assert outcome.reason == seen["c"].reason == "its update did not come within 0.3 s"


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
        await run_round({}, WEIGHTS, round=1, strategy=FedAvg(), min_silos=1)
    wrong: tuple[dict[str, Any], ...] = ({"min_silos": 0}, {"min_silos": 1, "deadline_s": 0})
    for options in wrong:
        with pytest.raises(SettingError):
            await run_round({}, WEIGHTS, round=1, strategy=FedAvg(), **options)


async def reach_nothing(channel: Channel) -> None:
    pass


async def reach_the_weights(channel: Channel) -> None:
    await channel.recv(FROM_SERVER)


async def reach_the_upload(channel: Channel) -> Any:
    return await begin_upload(channel, *await be_asked(channel))


@pytest.mark.parametrize(
    "reach", [reach_nothing, reach_the_weights, take_task, say_ready, be_asked, reach_the_upload]
)
async def test_a_cancelled_round_leaves_usable_channels(
    reach: Behaviour, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{__name__}.WEIGHTS", LARGE)
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
            run_round(servers, LARGE, round=1, strategy=FedAvg(), min_silos=2)
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
        result, seen = await play(behaviours, ends=ends, round=2, min_silos=2)
    assert bits(result.weights) == bits(ones)
    assert seen["c"].accepted
    *unanswered, last = seen["a"]
    assert last.accepted
    assert {report.reason for report in unanswered} <= {"the server went on without this update"}
    if reach is be_asked:
        assert unanswered


@dataclass
class AtOnce:
    """A participation for who owns the loop: whoever is ready may upload."""

    task: Task
    staged: Staged

    async def ready(self, report: Ready) -> Any:
        return self.staged.begin("only", report.weight)

    async def decided(self) -> None:
        self.staged.commit()


async def test_exchange_alone_serves_who_owns_the_loop():
    async with pairs("a") as (servers, silos):
        act = asyncio.ensure_future(takes_part(B)(silos["a"]))
        staged = Staged(WEIGHTS)
        outgoing = aiordma.prepare(WEIGHTS)
        outcome = await exchange(servers["a"], outgoing, AtOnce(Task(3, 1, {"lr": 0.1}), staged))
        assert outcome.status is Status.COMMITTED
        assert (await act).accepted
        assert bits(staged.result()) == bits(B)


async def test_exchange_aborts_the_contribution_of_an_upload_that_failed():
    async with pairs("a") as (servers, silos):
        act = asyncio.ensure_future(break_every_upload_off(silos["a"]))
        staged = Staged(WEIGHTS)
        task = Task(3, 1, {})
        outcome = await exchange(servers["a"], aiordma.prepare(WEIGHTS), AtOnce(task, staged))
        assert outcome.status is Status.FAILED
        assert not (await act).accepted
        staged.begin("only", 1.0)  # would be taken


async def test_who_cannot_be_told_counts_for_no_quorum(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", DEADLINE_S)

    async def read_nothing(channel: Channel) -> None:
        pass

    async with pairs("a", "b", "deaf") as ends:
        for _ in range(SMALL.messages - 1):
            await ends[0]["deaf"].send("unheard")
        good, bad = takes_part(A), takes_part(changed(w=NAN))
        with pytest.raises(QuorumNotReached, match="1 of 3 silos are left") as info:
            await play(
                {"a": good, "b": bad, "deaf": read_nothing},
                ends=ends,
                min_silos=2,
                deadline_s=DEADLINE_S,
            )
    assert info.value.outcomes["deaf"].status is Status.LATE
    assert isinstance(info.value.outcomes["deaf"].error, TimeoutError)


async def test_what_is_no_silos_failure_is_raised():
    class Broken(FedAvg):
        def step(self, weights, combined):
            raise ZeroDivisionError("a bug of the strategy's")

    async with pairs("a") as (servers, silos):
        act = asyncio.ensure_future(takes_part(A)(silos["a"]))
        with pytest.raises(ZeroDivisionError):
            await run_round(servers, WEIGHTS, round=1, strategy=Broken(), min_silos=1)
        act.cancel()
        await asyncio.gather(act, return_exceptions=True)
