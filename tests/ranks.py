"""Sharded silos for tests: what two ranks hold of some weights, and rounds of ranks that behave as a test wants."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import ml_dtypes
import numpy as np

from aiordma import Channel
from fedllm import FedAvg, Outcome, Report, RoundResult, Shard, Shards, Silo, run_round
from tests.harness import cancel
from tests.playing import bits, pairs

Update = dict[str, np.ndarray[Any, Any]]


def weights_of(value: float) -> Update:
    """Rows that two ranks share unevenly, rows of one rank alone, and what both ranks hold whole."""
    rng = np.random.default_rng(int(value * 8))
    return {
        "wide": rng.standard_normal((4001, 5)).astype(np.float32),
        "head": np.full((1, 3), value, np.float64),
        "norm": np.full(3, value, ml_dtypes.bfloat16),
        "scale": np.array(value, np.float16),
    }


TWO = (
    Shard(0, 2, {"wide": (0, 2001), "head": None, "norm": None, "scale": None}),
    Shard(1, 2, {"wide": (2001, 4001), "norm": None, "scale": None}, frozenset({"norm", "scale"})),
)
ZERO, A, B = weights_of(0), weights_of(1), weights_of(2)
WHOLE = Shard(0, 1, dict.fromkeys(ZERO))

Behaviour = Callable[[Silo, Channel, Shard], Awaitable[Any]]


def sends(whole: Update, *, weight: float = 1.0, turn: asyncio.Event | None = None) -> Behaviour:
    """A rank that does what it should in one round; its training ends when its turn comes."""

    async def behave(silo: Silo, channel: Channel, shard: Shard) -> Report:
        async for task in silo.rounds():
            assert bits(task.weights) == bits(shard.part_of(ZERO))
            if turn is not None:
                await turn.wait()
            loss = float(10 * shard.rank + 1)
            return await task.submit(shard.part_of(whole), weight=weight, metrics={"loss": loss})
        raise AssertionError("the run was over before it began")

    return behave


def on(*ranks: Channel, shards: tuple[Shard, ...] = TWO) -> Shards:
    """The server's ends of the ranks' channels, as one silo."""
    return Shards(list(zip(ranks, shards, strict=True)))


async def play(*ranks: Behaviour, **options: Any) -> tuple[RoundResult, Outcome, list[Any]]:
    """A round of two ranks that behave so, one silo, and of a plain silo that sends `A`: its result, the sharded
    silo's outcome, and what the ranks saw."""
    options = {"round": 1, "strategy": FedAvg(), "min_silos": 1, **options}
    async with pairs("plain", "0", "1") as (servers, silos):
        members = [
            Silo(silos[name], name, shard=shard) for name, shard in zip("01", TWO, strict=True)
        ]
        acts = [
            asyncio.ensure_future(behave(silo, silos[silo.name], shard))
            for behave, silo, shard in zip(ranks, members, TWO, strict=True)
        ]
        plain = Silo(silos["plain"], "plain")
        other = asyncio.ensure_future(sends(A)(plain, silos["plain"], WHOLE))
        ranks_ = on(servers["0"], servers["1"])
        try:
            asked: dict[str, Channel | Shards] = {"plain": servers["plain"], "ranks": ranks_}
            result = await run_round(asked, ZERO, **options)
            async with asyncio.timeout(5):
                assert (await other).accepted
                seen = await asyncio.gather(*acts, return_exceptions=True)
        finally:
            for act in (*acts, other):
                await cancel(act)
            for silo in (*members, plain):
                await silo.aclose()
    return result, result.outcomes["ranks"], seen


async def mean_of_plain(*updates: tuple[str, float, Update]) -> dict[str, bytes]:
    """What a round of plain silos makes of these updates."""
    async with pairs(*(name for name, _, _ in updates)) as (servers, silos):
        acts = [
            asyncio.ensure_future(
                sends(update, weight=weight)(Silo(silos[name], name), silos[name], WHOLE)
            )
            for name, weight, update in updates
        ]
        result = await run_round(servers, ZERO, round=1, strategy=FedAvg(), min_silos=len(acts))
        await asyncio.gather(*acts)
    return bits(result.weights)
