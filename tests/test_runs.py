"""A run of rounds, seen from the server: who takes part, who is late, who dies and comes back, how it ends."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import aiordma
from fedllm import (
    EarlyStop,
    Federation,
    FedError,
    QuorumNotReached,
    RoundResult,
    RunConfig,
    RunFailed,
    ServerLost,
    SettingError,
    Status,
    WeightsError,
)
from fedllm.messages import FROM_SERVER, Join
from tests.federation import (
    DEADLINE_S,
    FINGERPRINT,
    QUICK,
    Log,
    joining,
    raw,
    running,
    take_part,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


async def test_a_run_of_rounds_ends_with_the_same_weights_everywhere():
    log = Log()
    async with running(log, rounds=3, min_silos=2, expect=3) as (address, run):
        silos = [take_part(address, name, adds) for name, adds in (("c", 3), ("a", 1), ("b", 2))]
        ended = await asyncio.gather(*silos)
        history = await run
    for name, array in weights_of(6).items():
        assert history.weights[name].dtype == array.dtype
        assert history.weights[name].tobytes() == array.tobytes()
        for silo, _ in ended:
            assert silo.final is not None
            assert silo.final[name].tobytes() == array.tobytes()
    assert [[report.accepted for report in reports] for _, reports in ended] == [[True] * 3] * 3
    assert [record.round for record in history.rounds] == [1, 2, 3]
    assert [result.round for result in log.rounds] == [1, 2, 3]
    assert list(history.rounds[0].outcomes) == ["a", "b", "c"]
    assert [record.metrics["loss"] for record in history.rounds] == [1, 1 / 2, 1 / 3]
    assert {silo.run for silo, _ in ended} == {ended[0][0].run}
    assert ended[0][0].total_rounds == 3


async def test_who_joins_during_a_round_takes_part_from_the_next():
    log, gate = Log(), asyncio.Event()
    async with running(log, rounds=2) as (address, run):
        first = asyncio.ensure_future(take_part(address, "a", 1, gate=gate))
        await log.has("a joined")
        second = asyncio.ensure_future(take_part(address, "b", 3))
        await log.has("b joined")
        gate.set()
        await asyncio.gather(first, second, run)
    assert [list(result.outcomes) for result in log.rounds] == [["a"], ["a", "b"]]
    assert log.rounds[-1].weights["w"][0, 0] == 1 + (1 + 3) / 2


async def test_who_was_late_is_left_out_until_it_has_caught_up():
    log, gate = Log(), asyncio.Event()

    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        if result.round == 2:
            gate.set()
            await log.has("slow caught up")

    options = {"rounds": 3, "expect": 2, "train_deadline_s": DEADLINE_S, "on_round": on_round}
    async with running(log, **options) as (address, run):
        slow = asyncio.ensure_future(take_part(address, "slow", 1, gate=gate))
        await asyncio.gather(slow, take_part(address, "quick", 1), run)
    committed, late = Status.COMMITTED, Status.LATE
    assert [{name: o.status for name, o in result.outcomes.items()} for result in log.rounds] == [
        {"quick": committed, "slow": late},
        {"quick": committed},
        {"quick": committed, "slow": committed},
    ]
    reason = "READY did not come within 0.3 s"
    assert [(report.accepted, report.reason) for report in slow.result()[1]] == [
        (False, reason),
        (True, ""),
    ]


async def test_who_is_late_at_the_end_hears_that_the_run_is_over():
    log, gate = Log(), asyncio.Event()
    async with running(log, expect=2, train_deadline_s=DEADLINE_S) as (address, run):
        slow = asyncio.ensure_future(take_part(address, "slow", 1, gate=gate))
        await asyncio.gather(take_part(address, "quick", 1), run)
        gate.set()
        silo, reports = await slow
    assert [report.accepted for report in reports] == [False]
    assert silo.final is None


async def test_an_end_waits_for_who_takes_nothing_no_longer_than_it_should(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fedllm.membership.FINAL_SILENCE_S", DEADLINE_S)
    log = Log()
    async with running(log) as (address, run), AsyncExitStack() as stack, asyncio.timeout(10):
        async with joining(address, "a") as silo:
            async for task in silo.rounds():
                no_room = replace(QUICK, messages=1)  # which its welcome takes
                deaf = await stack.enter_async_context(aiordma.connect(*address, config=no_room))
                await deaf.send(Join("deaf", FINGERPRINT))
                full = await stack.enter_async_context(await raw(address, "full"))
                await log.has("deaf joined")
                assert (await task.submit(task.weights, weight=1)).accepted
        await run
        assert (await full.recv(FROM_SERVER)).has_weights
    assert silo.final is not None
    assert "deaf gone without the final weights: it read nothing for 0.3 s" in log.lines
    assert "full gone without the final weights: it took nothing for 0.3 s" in log.lines


async def test_a_round_that_lost_a_silo_is_tried_again_when_it_is_back():
    log = Log()
    async with running(log, rounds=2, min_silos=2) as (address, run):
        other = asyncio.ensure_future(take_part(address, "b", 2))
        dying = await raw(address, "a")
        await dying.recv(FROM_SERVER)
        await dying.aclose()
        await log.has("a gone: ")
        back = await take_part(address, "a", 4)
        await run
        _, reports = await other
    assert [report.accepted for report in back[1]] == [True, True]
    assert [report.accepted for report in reports] == [False, True, True]
    assert "1 of 2 silos are left, and 2 are needed" in reports[0].reason
    assert [result.round for result in log.rounds] == [1, 2]
    assert log.rounds[-1].weights["w"][0, 0] == 6


async def test_a_silo_that_died_is_no_loss_while_there_is_a_quorum():
    log = Log()
    handlers: list[int] = []

    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        handlers.append(names.count("Server._handle"))

    async with running(log, rounds=2, expect=2, on_round=on_round) as (address, run):
        dying = await raw(address, "a")
        other = asyncio.ensure_future(take_part(address, "b", 2))
        await dying.recv(FROM_SERVER)
        await dying.aclose()
        await asyncio.gather(other, run)
    assert handlers[-1] == 1
    assert log.rounds[0].outcomes["a"].status is Status.FAILED
    assert list(log.rounds[1].outcomes) == ["b"]


async def test_a_run_whose_silos_stay_away_fails_and_says_so():
    log = Log()
    options = {"min_silos": 2, "absence_timeout_s": DEADLINE_S}
    async with running(log, **options) as (address, run):
        with pytest.raises(RunFailed, match=r"1 silos were there within 0.3 s, and 2 are needed"):
            await take_part(address, "a", 1)
        with pytest.raises(QuorumNotReached, match=r"1 silos were there within 0.3 s"):
            await run


async def test_a_round_whose_quorum_was_late_once_is_tried_again_when_it_has_caught_up():
    log, gate = Log(), asyncio.Event()

    async def let_go() -> None:
        await log.has("slow late in round 1: READY did not come within 0.3 s")
        gate.set()

    options = {"min_silos": 2, "train_deadline_s": DEADLINE_S}
    async with running(log, **options) as (address, run), asyncio.timeout(10):
        slow = take_part(address, "slow", 1, gate=gate)
        (_, reports), *_ = await asyncio.gather(slow, take_part(address, "b", 1), run, let_go())
    assert [report.accepted for report in reports] == [False, True]
    assert log.lines.count("slow caught up") == 1


async def test_a_run_whose_silos_are_late_twice_fails_and_says_so():
    log, tasks = Log(), list[int]()

    async def be_late(address: tuple[str, int]) -> None:
        async with joining(address, "slow") as silo:
            async for task in silo.rounds():
                tasks.append(task.round)
                await log.until(lambda log: sum("late" in x for x in log.lines) == len(tasks))

    async with running(log, train_deadline_s=DEADLINE_S) as (address, run), asyncio.timeout(10):
        slow = asyncio.ensure_future(be_late(address))
        with pytest.raises(QuorumNotReached, match="0 of 1 silos are left") as info:
            await run
        with pytest.raises(RunFailed, match="0 of 1 silos are left"):
            await slow
    assert info.value.outcomes["slow"].status is Status.LATE
    assert tasks == [1, 1]


async def test_settings_that_cannot_work_are_refused_at_once():
    wrong: tuple[dict[str, Any], ...] = (
        {"min_silos": 0},
        {"rounds": 0},
        {"rounds": True},
        {"min_silos": 3, "expect": 2},
        {"train_deadline_s": -1},
        {"upload_deadline_s": 0},
        {"fraction": 0},
        {"fraction": 1.5},
        {"evaluate_every": 0},
        {"seed": -1},
        {"farewell_s": 0},
        {"absence_timeout_s": float("inf")},
        {"join_timeout_s": 0},
    )
    for options in wrong:
        with pytest.raises(SettingError, match=next(reversed(options))):
            RunConfig(**{"min_silos": 1, "rounds": 1, **options})
    for stop in ({"patience": 0}, {"patience": 1, "min_change": -1.0}):
        with pytest.raises(SettingError, match=next(reversed(stop))):
            EarlyStop(metric="loss", **stop)
    settings = RunConfig(min_silos=1, rounds=1)
    with pytest.raises(WeightsError, match="'step'"):
        Federation({"step": np.zeros(1, np.int64)}, settings, fingerprint={})
    server = Federation(weights_of(0), settings, fingerprint={})
    with pytest.raises(FedError, match="start"):
        _ = server.address
    async with server:
        await server.start()
        assert server.silos == ()
        with pytest.raises(FedError, match="already"):
            await server.start()


async def test_what_a_callback_raises_ends_the_run():
    async def on_round(result: RoundResult) -> None:
        raise ZeroDivisionError

    async with running(Log(), on_round=on_round) as (address, run):
        with pytest.raises(ServerLost):
            await take_part(address, "a", 1)
        with pytest.raises(ZeroDivisionError):
            await run
