"""Sharded silos in runs: ranks join one by one and are members together, or not at all."""

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiordma
from fedllm import (
    Aligned,
    Backoff,
    Evaluation,
    FedAvg,
    JoinRefused,
    Policy,
    QuorumNotReached,
    Report,
    SettingError,
    Shard,
    Silo,
    Status,
    join,
)
from fedllm.messages import JOIN_ANSWER, Decline, Join, Welcome
from tests.federation import (
    DEADLINE_S,
    FINGERPRINT,
    QUICK,
    Log,
    joining,
    running,
    take_part,
    weights_of,
)
from tests.harness import cancel
from tests.playing import bits

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")

TWO = (Shard(0, 2, {"w": (0, 3), "b": None}), Shard(1, 2, {"w": (3, 5), "b": None}, frozenset("b")))
AT_ONCE = Backoff(first_s=1e-9, most_s=1e-9)


async def rank(
    address: tuple[str, int], shard: Shard, adds: float, *, name: str = "bank", **options: Any
) -> tuple[Silo, list[Report]]:
    """A rank whose training adds a number to what it holds."""
    reports = []

    async def judge(task: Any) -> tuple[float, dict[str, float]]:
        return 1, {"loss": float(task.weights["w"][0, 0]) + shard.rank}

    async with joining(address, name, shard=shard, **options) as silo:
        async for task in silo.rounds(judge):
            update = {
                n: (a.astype(np.float32) + adds).astype(a.dtype) for n, a in task.weights.items()
            }
            reports.append(await task.submit(update, weight=1, metrics={"loss": shard.rank}))
    return silo, reports


async def test_a_run_with_a_sharded_silo_ends_as_one_of_plain_ones():
    plain, log = Log(), Log()
    async with running(plain, rounds=2, min_silos=2, evaluate_every=1) as (address, run):
        await asyncio.gather(take_part(address, "shop", 1), take_part(address, "bank", 4), run)
    async with running(log, rounds=2, min_silos=2, evaluate_every=1) as (address, run):
        ranks = [asyncio.ensure_future(rank(address, shard, 4)) for shard in TWO]
        await take_part(address, "shop", 1)
        history = await run
        (zero, reports), (one, _) = await asyncio.gather(*ranks)
    assert bits(history.weights) == bits(plain.rounds[-1].weights) != bits(weights_of(0))
    assert [report.accepted for report in reports] == [True, True]
    assert log.lines.count("bank joined") == 1
    for silo, shard in ((zero, TWO[0]), (one, TWO[1])):
        assert silo.final is not None
        assert bits(silo.final) == bits(shard.part_of(history.weights))
    assert log.rounds[0].outcomes["bank"].metrics == {"loss": 0.0}


async def test_an_evaluation_asks_all_ranks_and_counts_the_first_ones_answer():
    seen: list[Evaluation] = []
    options: dict[str, Any] = {"evaluate_every": 1, "on_evaluation": seen.append}
    async with running(Log(), **options) as (address, run):
        await asyncio.gather(*(rank(address, shard, 4) for shard in TWO), run)
    (evaluation,) = seen
    assert evaluation.outcomes["bank"].status is Status.COMMITTED
    assert evaluation.metrics == {"loss": 4.0}


async def test_a_sharded_silo_that_keeps_its_number_of_examples_counts_like_all_others():
    log = Log()
    async with running(log, min_silos=2) as (address, run):
        ranks = [rank(address, shard, 4, policy=Policy(tells_weight=False)) for shard in TWO]
        async with joining(address, "shop") as shop:
            bank = asyncio.gather(*ranks)
            async for task in shop.rounds():
                assert (await task.submit(task.weights, weight=900)).accepted
        history = await run
        await bank
    assert bits(history.weights) == bits(weights_of(2))
    assert log.rounds[0].outcomes["bank"].weight is None


async def test_ranks_of_which_one_keeps_what_the_other_tells_are_no_silo():
    log = Log()
    async with running(log, min_silos=1) as (address, run):
        policies = (Policy(), Policy(tells_weight=False))
        ranks = [rank(address, s, 4, policy=p) for s, p in zip(TWO, policies, strict=True)]
        bank = asyncio.gather(*ranks, return_exceptions=True)
        with pytest.raises(QuorumNotReached, match=r"different weights, \[None, 1.0\]"):
            await run
        await bank


async def test_a_rank_that_dies_costs_its_silo_its_place_and_all_its_ranks_come_back():
    log = Log()
    async with running(log, rounds=2, min_silos=2) as (address, run):
        shop = asyncio.ensure_future(take_part(address, "shop", 1))
        # This one goes back by itself when it loses the server.
        survivor = asyncio.ensure_future(rank(address, TWO[0], 4, backoff=AT_ONCE))
        async with joining(address, "bank", shard=TWO[1]) as silo:
            async for task in silo.rounds():
                assert (await task.submit(task.weights, weight=1)).accepted
                break
        # It is gone, and comes back: as another process would, without its key.
        again = asyncio.ensure_future(rank(address, TWO[1], 4))
        history = await run
        (_, survived), (_, came_back) = await asyncio.gather(survivor, again)
        await shop
    assert len(history.rounds) == 2
    assert log.lines.count("bank joined") == 2
    assert survived[-1].accepted
    assert came_back[-1].accepted


async def test_a_rank_that_waits_and_leaves_is_forgotten():
    log = Log()
    async with running(log, min_silos=1) as (address, run):
        waiting = asyncio.ensure_future(rank(address, TWO[0], 4))
        await log.has("bank rank 0 of 2 is there")
        await cancel(waiting)
        await log.has("bank refused: ")
        # Alone it has not joined; with the other one it would not be one world.
        three = [
            Shard(n, 3, {"w": (n, n + 1 if n < 2 else 5), "b": None}, frozenset("b" if n else ""))
            for n in range(3)
        ]
        await asyncio.gather(*(rank(address, shard, 4) for shard in three), run)
    assert log.rounds[0].outcomes["bank"].status is Status.COMMITTED


async def test_a_rank_waits_for_the_others_as_long_as_it_takes():
    async with running(Log()) as (address, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                await rank(address, TWO[0], 4, timeout_s=DEADLINE_S / 3)


async def test_a_rank_hears_it_if_the_others_are_refused_and_there_is_a_limit():
    log, gate = Log(), asyncio.Event()
    async with running(log, absence_timeout_s=DEADLINE_S) as (address, run), asyncio.timeout(10):
        shop = asyncio.ensure_future(take_part(address, "shop", 1, gate=gate))
        await log.has("shop joined")  # the run goes on: it is not its end that ends the waiting
        waiting = asyncio.ensure_future(rank(address, TWO[0], 4))
        await log.has("bank rank 0 of 2 is there")
        with pytest.raises(JoinRefused, match="not the same weights"):
            await rank(address, TWO[1], 4, fingerprint={"weights": "another"})
        with pytest.raises(JoinRefused, match="other ranks of 'bank' did not come within") as info:
            await waiting
        assert not info.value.is_final
        gate.set()
        await asyncio.gather(shop, run)


async def test_a_rank_that_waits_and_comes_anew_takes_its_own_place():
    log = Log()
    join = Join("bank", FINGERPRINT, "key", TWO[0])
    async with running(log) as (address, _), AsyncExitStack() as stack:
        old, new = [
            await stack.enter_async_context(aiordma.connect(*address, config=QUICK)) for _ in "12"
        ]
        await old.send(join)
        await log.has("bank rank 0 of 2 is there")
        await new.send(join)
        with pytest.raises(aiordma.ChannelClosed):
            await old.recv()
        joining_ = asyncio.ensure_future(rank(address, TWO[1], 4))
        assert isinstance(await new.recv(JOIN_ANSWER), Welcome)
        await cancel(joining_)


async def test_a_rank_that_speaks_before_the_others_are_there_is_refused():
    async with running(Log()) as (address, _), aiordma.connect(*address, config=QUICK) as channel:
        await channel.send(Join("bank", FINGERPRINT, "key", TWO[0]))
        await channel.send(Decline(1, "too early"))
        answer = await channel.recv(JOIN_ANSWER)
        assert answer.reason.startswith("a rank that waits for the others said Decline(")
        assert not answer.is_final


async def test_a_rank_that_joins_anew_ends_what_is_left_of_its_silo():
    log = Log()
    async with running(log, min_silos=2) as (address, _), AsyncExitStack() as stack:
        zero, one, again = [
            await stack.enter_async_context(aiordma.connect(*address, config=QUICK)) for _ in "123"
        ]
        await zero.send(Join("bank", FINGERPRINT, "a", TWO[0]))
        await one.send(Join("bank", FINGERPRINT, "b", TWO[1]))
        for rank_ in (zero, one):
            assert isinstance(await rank_.recv(JOIN_ANSWER), Welcome)
        await again.send(Join("bank", FINGERPRINT, "a", TWO[0]))
        for rank_ in (zero, one):
            with pytest.raises(aiordma.ChannelClosed):
                await rank_.recv()
        await log.has("bank gone: ")


async def test_ranks_that_are_not_one_silos_are_refused():
    log = Log()
    async with running(log, min_silos=1) as (address, run):
        waiting = asyncio.ensure_future(rank(address, TWO[0], 4))
        await log.has("bank rank 0 of 2 is there")
        with pytest.raises(JoinRefused, match=r"rank 0 of 2 is not wanted: .* rank 0 of 2 waits"):
            await rank(address, TWO[0], 4)
        with pytest.raises(JoinRefused, match=r"rank 2 of 3 is not wanted: .* rank 0 of 2 waits"):
            await rank(address, Shard(2, 3, {}), 4)
        with pytest.raises(JoinRefused, match="not the same weights"):
            await rank(address, TWO[1], 4, fingerprint={"weights": "another"})
        await asyncio.gather(waiting, rank(address, TWO[1], 4), run)


async def test_a_name_is_a_silos_whether_it_is_sharded_or_not():
    log = Log()
    async with running(log, min_silos=2) as (address, run):
        ranks = [asyncio.ensure_future(rank(address, shard, 4)) for shard in TWO]
        await log.has("bank joined")
        for shard in (None, TWO[1]):
            with pytest.raises(JoinRefused, match="the name 'bank' is in use"):
                async with joining(address, "bank", shard=shard):
                    pass
        await asyncio.gather(*ranks, take_part(address, "shop", 1), run)


async def test_a_name_is_its_ranks_as_soon_as_one_of_them_waits():
    log = Log()
    async with running(log) as (address, run), asyncio.timeout(10):
        waiting = asyncio.ensure_future(rank(address, TWO[0], 4))
        await log.has("bank rank 0 of 2 is there")
        with pytest.raises(JoinRefused, match="'bank' is the name of ranks that wait") as info:
            await take_part(address, "bank", 1)
        assert not info.value.is_final
        await asyncio.gather(waiting, rank(address, TWO[1], 4), run)
    assert log.lines.count("bank joined") == 1


async def test_a_run_that_takes_whole_updates_refuses_a_sharded_silo_before_it_trains():
    log = Log()
    async with running(log, strategy=FedAvg(aggregate=Aligned)) as (address, run):
        with pytest.raises(JoinRefused, match="in parts, and this server takes whole ones") as info:
            await rank(address, TWO[0], 4)
        assert info.value.is_final
        await asyncio.gather(take_part(address, "shop", 1), run)
    assert list(log.rounds[0].outcomes) == ["shop"]


PARTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a gap": ([{"w": (0, 2), "b": None}, {"w": (3, 5)}], "no rank uploads rows 2 to 3 of 'w'"),
    "an end": ([{"w": (0, 2), "b": None}, {"w": (2, 4)}], "no rank uploads rows 4 to 5 of 'w'"),
    "twice": ([{"w": None, "b": None}, {"w": (3, 5)}], "more than one rank uploads rows 3 to 5"),
    "a tensor": ([{"w": (0, 2)}, {"w": (2, 5)}], "no rank uploads rows 0 to 2 of 'b'"),
    "beyond": ([{"w": (0, 6), "b": None}, {}], r"rows 0 to 6 of 'w', which has shape \(5, 3\)"),
    "backwards": ([{"w": (3, 2), "b": None}, {}], "rank 0 holds rows 3 to 2 of 'w'"),
    "unknown": ([{"w": None, "b": None}, {"x": None}], "rank 1 holds 'x', which is not among"),
}


@pytest.mark.parametrize("case", PARTS)
async def test_ranks_that_do_not_hold_the_weights_between_them_are_refused_all(case: str):
    parts, reason = PARTS[case]
    async with running(Log()) as (address, _):
        refused = await asyncio.gather(
            *(rank(address, Shard(n, 2, rows), 4) for n, rows in enumerate(parts)),
            return_exceptions=True,
        )
    for one in refused:
        assert isinstance(one, JoinRefused)
        assert re.search(reason, one.reason)
        # What lacks a rank's rows, another one may have; what a rank holds that there is not, it holds for ever.
        assert one.is_final == (case in ("beyond", "backwards", "unknown"))


async def test_a_late_rank_keeps_its_silo_out_until_it_has_caught_up():
    log, gate = Log(), asyncio.Event()
    options = {"rounds": 2, "min_silos": 1, "expect": 2, "train_deadline_s": DEADLINE_S}
    reports: list[Report] = []

    async def slow(address: tuple[str, int]) -> None:
        async with joining(address, "bank", shard=TWO[1]) as silo:
            async for task in silo.rounds():
                await gate.wait()
                reports.append(await task.submit(task.weights, weight=1))

    async def shop(address: tuple[str, int]) -> None:
        async with joining(address, "shop") as silo:
            async for task in silo.rounds():
                if task.round == 2:
                    gate.set()
                    await log.has("bank caught up")
                await task.submit(task.weights, weight=1)

    async with running(log, **options) as (address, run):
        (_, others), *_ = await asyncio.gather(
            rank(address, TWO[0], 4), slow(address), shop(address), run
        )
    assert log.rounds[0].outcomes["bank"].status is Status.LATE
    assert "bank" not in log.rounds[1].outcomes
    assert [one.reason for one in reports] == [one.reason for one in others]
    assert reports[0].reason == "READY did not come within 0.3 s"


async def test_what_makes_no_sense_of_a_rank_is_the_silos_own_error(tmp_path: Path):
    wrongs: tuple[tuple[Any, ...], ...] = (
        (2, 2, {}),
        (-1, 2, {}),
        (0, 0, {}),
        (0, 1, {}, frozenset("w")),
    )
    for wrong in wrongs:
        with pytest.raises(SettingError):
            Shard(*wrong)
    options: dict[str, Any] = {"name": "bank", "fingerprint": FINGERPRINT, "config": QUICK}
    with pytest.raises(SettingError, match="the ranks of a sharded silo keep no updates"):
        async with join("127.0.0.1", 1, shard=TWO[0], keep=tmp_path, **options):
            pass
