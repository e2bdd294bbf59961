"""Which silos a round asks, which are out of it, when silos judge, and when a run ends early."""

import asyncio
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedllm import (
    EarlyStop,
    Evaluation,
    EvaluationTask,
    QuorumNotReached,
    RunFailed,
    SettingError,
    Status,
    run_evaluation,
)
from fedllm.membership import choose
from fedllm.messages import FROM_SERVER, Commit, Decline, Ready, Task
from fedllm.rounds import mean_metrics
from tests.federation import DEADLINE_S, Log, joining, raw, running, take_part, weights_of
from tests.playing import be_asked, pairs

pytestmark = pytest.mark.usefixtures("no_leaks")

NAMES = [f"silo-{n}" for n in range(30)]


def chosen(names: list[str] = NAMES, **options: Any) -> list[str]:
    return choose(names, **{"round": 1, "seed": 0, "fraction": 0.1, "at_least": 1, **options})


def test_the_choice_is_a_function_of_seed_round_and_names():
    assert chosen() == chosen(NAMES[::-1]) == sorted(chosen())
    assert len(chosen()) == 3
    assert len(chosen(at_least=5)) == 5
    assert len(chosen(fraction=0.11)) == 4
    assert chosen(fraction=1.0) == sorted(NAMES)
    assert len({tuple(chosen(round=n)) for n in range(20)}) > 15
    assert len({tuple(chosen(seed=n)) for n in range(20)}) > 15
    counts = Counter(name for n in range(1000) for name in chosen(round=n))
    assert all(60 < counts[name] < 140 for name in NAMES)  # 100 each, on the whole
    gone = chosen()[0]
    left = chosen([name for name in NAMES if name != gone], at_least=3)
    assert set(chosen()) - {gone} < set(left)


@pytest.mark.usefixtures("loop_kind")
async def test_a_round_asks_a_fraction_of_the_silos():
    log = Log()
    options = {"rounds": 4, "expect": 4, "fraction": 0.5, "seed": 3}
    async with running(log, **options) as (address, run), asyncio.timeout(10):
        await asyncio.gather(*(take_part(address, name, 1) for name in "abcd"), run)
    expected = [choose("abcd", round=n, seed=3, fraction=0.5, at_least=1) for n in range(1, 5)]
    assert [list(result.outcomes) for result in log.rounds] == expected
    assert len(set(map(tuple, expected))) > 1


# Who is out


async def spoil(address: tuple[str, int], name: str, asked: list[int], times: float) -> None:
    """A silo whose update is NaN so often."""
    async with joining(address, name) as silo:
        async for task in silo.rounds():
            asked.append(task.round)
            spoiled = {n: a + a.dtype.type(math.nan) for n, a in task.weights.items()}
            update = spoiled if len(asked) <= times else task.weights
            await task.submit(update, weight=1)


@pytest.mark.usefixtures("loop_kind")
async def test_who_spoils_a_quorum_gets_one_more_chance():
    log, asked = Log(), list[int]()
    async with running(log, rounds=2, min_silos=2) as (address, run), asyncio.timeout(10):
        await asyncio.gather(take_part(address, "a", 1), spoil(address, "bad", asked, 1), run)
    assert asked == [1, 1, 2]
    assert [list(result.outcomes) for result in log.rounds] == [["a", "bad"]] * 2


@pytest.mark.usefixtures("loop_kind")
async def test_who_spoils_it_twice_is_out_for_the_round_and_not_for_the_next():
    """Of three, two are needed: "lazy" declines twice, so that it is "bad" that decides; then both are out."""
    log, asked, declined = Log(), list[int](), list[int]()

    async def decline_twice(address: tuple[str, int]) -> None:
        async with joining(address, "lazy") as silo:
            async for task in silo.rounds():
                declined.append(task.round)
                if len(declined) > 2:
                    await task.submit(task.weights, weight=1)

    async def come_late(address: tuple[str, int]) -> None:
        while len(declined) < 2:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        await take_part(address, "c", 1)

    async with running(log, rounds=2, min_silos=2, expect=3) as (address, run):
        async with asyncio.timeout(10):
            with pytest.raises(RunFailed) as told:
                await asyncio.gather(
                    take_part(address, "a", 1),
                    spoil(address, "bad", asked, math.inf),
                    decline_twice(address),
                )
            with pytest.raises(QuorumNotReached, match="1 of 3 silos are left, and 2 are needed"):
                await run
    assert "bad" not in told.value.reason
    assert asked == declined == [1, 1]
    # As long as there is a quorum without them, the round goes on.
    asked.clear()
    declined.clear()
    async with running(log, rounds=2, min_silos=2, expect=4) as (address, run):
        async with asyncio.timeout(10):
            await asyncio.gather(
                take_part(address, "a", 1),
                take_part(address, "b", 1),
                spoil(address, "bad", asked, math.inf),
                decline_twice(address),
                run,
            )
    statuses = [{n: o.status for n, o in result.outcomes.items()} for result in log.rounds]
    good, bad = Status.COMMITTED, Status.REFUSED
    assert statuses == [
        {"a": good, "b": good, "bad": bad, "lazy": bad},
        {"a": good, "b": good, "bad": bad, "lazy": bad},
    ]


@pytest.mark.usefixtures("loop_kind")
async def test_who_spoils_it_twice_is_not_asked_when_the_others_are_back():
    """Of three, two are needed. "b" declines, then dies, then does what it should: three tries."""
    log, asked = Log(), list[int]()

    async def come_in_the_end(address: tuple[str, int]) -> None:
        channel = await raw(address, "b")
        task: Task = await channel.recv(FROM_SERVER)
        await channel.recv_tensors()
        await channel.send(Decline(task.ticket, "not now"))
        assert isinstance(await channel.recv(FROM_SERVER), Commit)
        await be_asked(channel)
        await refused.wait()
        await channel.aclose()
        await log.has("b gone")
        await take_part(address, "b", 1)

    async def spoil_it(address: tuple[str, int]) -> None:
        async with joining(address, "bad") as silo:
            async for task in silo.rounds():
                asked.append(task.round)
                spoiled = {n: a + a.dtype.type(math.nan) for n, a in task.weights.items()}
                await task.submit(spoiled, weight=1)
                if len(asked) == 2:
                    refused.set()

    refused = asyncio.Event()
    async with running(log, rounds=2, min_silos=2, expect=3) as (address, run):
        async with asyncio.timeout(10):
            parts = take_part(address, "a", 1), spoil_it(address), come_in_the_end(address)
            await asyncio.gather(*parts, run)
    assert asked == [1, 1, 2]
    assert [list(result.outcomes) for result in log.rounds] == [["a", "b"], ["a", "b", "bad"]]


# Evaluations


async def judge(task: EvaluationTask) -> tuple[float, dict[str, float]]:
    value = float(task.weights["w"][0, 0])
    return 1 + value, {"loss": value, "round": task.round}


@pytest.mark.usefixtures("loop_kind")
async def test_silos_judge_the_weights_and_send_no_more_than_metrics():
    log, judged = Log(), list[Evaluation]()

    async def on_evaluation(evaluation: Evaluation) -> None:
        judged.append(evaluation)

    async def work(address: tuple[str, int], name: str) -> None:
        async with joining(address, name) as silo:
            async for task in silo.rounds(judge):
                await task.submit(
                    {n: a + a.dtype.type(1) for n, a in task.weights.items()}, weight=1
                )

    options = {"rounds": 4, "expect": 3, "evaluate_every": 2, "on_evaluation": on_evaluation}
    async with running(log, **options) as (address, run), asyncio.timeout(10):
        await asyncio.gather(
            *(work(address, name) for name in "ab"), take_part(address, "mute", 1), run
        )
    assert [evaluation.round for evaluation in judged] == [2, 4]
    assert [evaluation.metrics for evaluation in judged] == [
        {"loss": 2.0, "round": 2.0},
        {"loss": 4.0, "round": 4.0},
    ]
    outcomes = judged[0].outcomes
    assert outcomes["a"].status is outcomes["b"].status is Status.COMMITTED
    assert (outcomes["a"].weight, outcomes["a"].bytes) == (3.0, 0)
    assert outcomes["mute"].status is Status.REFUSED
    assert outcomes["mute"].reason.endswith("the silo declined: this silo does not evaluate")
    assert [len(result.outcomes) for result in log.rounds] == [3] * 4


@pytest.mark.usefixtures("loop_kind")
async def test_who_judges_too_late_catches_up_and_is_missed_by_nobody():
    log, judged, gate = Log(), list[Evaluation](), asyncio.Event()

    async def slow(task: EvaluationTask) -> tuple[float, dict[str, float]]:
        await gate.wait()
        return 1, {"loss": 0}

    async def on_evaluation(evaluation: Evaluation) -> None:
        judged.append(evaluation)
        gate.set()
        await log.has("slow caught up")

    async def work(address: tuple[str, int]) -> None:
        async with joining(address, "slow") as silo:
            async for task in silo.rounds(slow):
                await task.submit(task.weights, weight=1)

    options = {"rounds": 2, "expect": 2, "evaluate_every": 1, "on_evaluation": on_evaluation}
    async with running(log, **options, train_deadline_s=DEADLINE_S) as (address, run):
        async with asyncio.timeout(10):
            quick = asyncio.ensure_future(take_part(address, "quick", 1))
            working = asyncio.ensure_future(work(address))
            await log.until(lambda log: judged)
            assert judged[0].outcomes["slow"].status is Status.LATE
            assert judged[0].metrics == {}
            await asyncio.gather(quick, working, run)
    assert log.rounds[1].outcomes["slow"].status is Status.COMMITTED
    assert judged[1].metrics == {"loss": 0}


async def test_an_evaluation_takes_what_comes_and_fails_for_nobody():
    weights = weights_of(1)

    async def act(channel: Any, answer: Any) -> None:
        task = await channel.recv(FROM_SERVER)
        assert task.evaluates
        await channel.recv_tensors()
        await channel.send(answer(task.ticket))

    async def die(channel: Any) -> None:
        await channel.recv(FROM_SERVER)
        await channel.aclose()

    async with pairs("dies", "good", "heavy", "no") as (servers, silos), asyncio.timeout(10):
        acts = [
            die(silos["dies"]),
            act(silos["good"], lambda ticket: Ready(ticket, 2.0, None, {"loss": 1.5})),
            act(silos["heavy"], lambda ticket: Ready(ticket, 1e30, None, {"loss": 9.0})),
            act(silos["no"], lambda ticket: Decline(ticket, "not today")),
        ]
        acting = asyncio.gather(*acts)
        evaluation = await run_evaluation(servers, weights, round=7)
        await acting
        with pytest.raises(SettingError, match="deadline_s"):
            await run_evaluation(servers, weights, round=7, deadline_s=0)
        assert (await run_evaluation({}, weights, round=7)).metrics == {}
    statuses = {name: outcome.status for name, outcome in evaluation.outcomes.items()}
    assert statuses == {
        "dies": Status.FAILED,
        "good": Status.COMMITTED,
        "heavy": Status.REFUSED,
        "no": Status.REFUSED,
    }
    assert (evaluation.round, evaluation.metrics) == (7, {"loss": 1.5})


# The end before its time


def test_patience_counts_figures_that_are_no_better():
    stop = EarlyStop(metric="loss", patience=2)
    assert not stop.is_due([])
    assert not stop.is_due([3, 2, 1, 1])
    assert stop.is_due([3, 2, 1, 1, 1])
    assert stop.is_due([3, math.nan, math.nan])
    assert not stop.is_due([3, 4, 2, 4])
    assert EarlyStop(metric="loss", patience=2, min_change=0.5).is_due([3, 2.9, 2.8])
    accuracy = EarlyStop(metric="accuracy", patience=1, is_higher_better=True)
    assert not accuracy.is_due([0.1, 0.2])
    assert accuracy.is_due([0.2, 0.1])


def test_a_silo_whose_figure_is_not_finite_is_left_out_of_its_mean():
    def report(weight: float | None, **metrics: float) -> Ready:
        return Ready(1, weight, None, metrics)

    one, two = report(1, loss=1, best=2), report(3, loss=5, best=4)
    assert mean_metrics([one, two]) == {"loss": 4, "best": 3.5}
    for odd in (math.nan, math.inf, -math.inf):
        diverged = report(6, loss=odd, best=8)
        assert mean_metrics([one, two, diverged]) == pytest.approx({"loss": 4, "best": 6.2})
        assert mean_metrics([report(1, loss=odd)]) == {}
    assert mean_metrics([one, report(None, loss=3, best=math.nan)]) == {"loss": 2, "best": 2}
    assert mean_metrics([]) == {}


@pytest.mark.usefixtures("loop_kind")
async def test_one_silos_nan_does_not_end_the_run_of_all():
    log = Log()

    async def work(address: tuple[str, int], name: str, loss: float) -> None:
        async with joining(address, name) as silo:
            async for task in silo.rounds():
                await task.submit(task.weights, weight=1, metrics={"loss": loss / task.round})

    stop = EarlyStop(metric="loss", patience=1)
    async with running(log, rounds=4, min_silos=2, stop=stop) as (address, run):
        async with asyncio.timeout(10):
            await asyncio.gather(work(address, "a", 1.0), work(address, "b", math.nan), run)
    assert [result.metrics["loss"] for result in log.rounds] == [1, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.usefixtures("loop_kind")
@pytest.mark.parametrize("evaluates", [False, True])
async def test_a_run_ends_when_its_metric_is_no_better(evaluates: bool):
    log = Log()
    losses = [3.0, 2.0, 2.5, 2.0, 1.0]

    async def judge_again(task: EvaluationTask) -> tuple[float, dict[str, float]]:
        return 1, {"loss": losses[task.round - 1]}

    async def work(address: tuple[str, int]) -> Any:
        async with joining(address, "a") as silo:
            async for task in silo.rounds(judge_again):
                loss = 0.0 if evaluates else losses[task.round - 1]
                await task.submit(task.weights, weight=1, metrics={"loss": loss})
        return silo.final

    stop = EarlyStop(metric="loss", patience=2)
    options = {"rounds": 5, "stop": stop, "evaluate_every": 1 if evaluates else None}
    async with running(log, **options) as (address, run), asyncio.timeout(10):
        final, history = await asyncio.gather(work(address), run)
    assert [record.round for record in history.rounds] == [1, 2, 3, 4]
    assert final is not None
    assert np.array_equal(final["w"], history.weights["w"])
