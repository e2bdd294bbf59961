"""A round with a sharded silo: ranks with a channel each, which stand and fall together."""

import asyncio
import math
import re
from typing import Any

import pytest

from aiordma import Channel, ChannelError
from fedllm import (
    Aligned,
    FedAvg,
    QuorumNotReached,
    Report,
    Shard,
    Silo,
    Status,
    run_round,
)
from tests.harness import cancel
from tests.playing import DEADLINE_S, bits, pairs
from tests.ranks import TWO, ZERO, A, B, Behaviour, Update, mean_of_plain, on, play, sends

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


async def test_a_round_with_a_sharded_silo_is_bit_for_bit_that_of_plain_ones():
    result, outcome, seen = await play(sends(B, weight=3.0), sends(B, weight=3.0))
    assert bits(result.weights) == await mean_of_plain(("plain", 1.0, A), ("ranks", 3.0, B))
    replicas = B["norm"].nbytes + B["scale"].nbytes
    size = sum(array.nbytes for array in B.values())
    assert (outcome.status, outcome.reason, outcome.error) == (Status.COMMITTED, "", None)
    assert (outcome.weight, outcome.metrics, outcome.is_busy) == (3.0, {"loss": 1.0}, False)
    assert (outcome.bytes, outcome.sent_bytes) == (size, size + replicas)
    parts = [sum(array.nbytes for array in shard.part_of(B).values()) for shard in TWO]
    assert [report.accepted for report in seen] == [True, True]
    assert [report.bytes for report in seen] == [parts[0], parts[1] - replicas]


def changed(**changes: Any) -> Update:
    return {**B, **changes}


async def dies(silo: Silo, channel: Channel, shard: Shard) -> None:
    async for _ in silo.rounds():
        await silo.aclose()
        await channel.aclose()
        return


async def dies_in_the_upload(silo: Silo, channel: Channel, shard: Shard) -> None:
    async for task in silo.rounds():
        submitting = asyncio.ensure_future(task.submit(shard.part_of(B), weight=1))
        before = channel.stats().sent_bytes
        while channel.stats().sent_bytes == before:  # noqa: ASYNC110 - turns of the loop, no time
            await asyncio.sleep(0)
        await cancel(submitting)
        await silo.aclose()
        await channel.aclose()
        return


async def declines(silo: Silo, channel: Channel, shard: Shard) -> None:
    async for task in silo.rounds():
        await task.decline("out of memory")
        return


async def lacks_a_tensor(silo: Silo, channel: Channel, shard: Shard) -> Report:
    async for task in silo.rounds():
        return await task.submit({"norm": B["norm"], "scale": B["scale"]}, weight=1)
    raise AssertionError


NAN = B["wide"].copy()
NAN[4000, 2] = math.nan

FAULTS: dict[str, tuple[Behaviour, Behaviour, Status, str]] = {
    "rank 1 dies": (sends(B), dies, Status.FAILED, "rank 1: waiting for READY: "),
    "rank 0 dies": (dies, sends(B), Status.FAILED, "rank 0: waiting for READY: "),
    "upload": (sends(B), dies_in_the_upload, Status.FAILED, "rank 1: receiving the update: "),
    "declines": (sends(B), declines, Status.REFUSED, "rank 1: .* declined: out of memory"),
    "shape": (sends(B), lacks_a_tensor, Status.REFUSED, r"rank 1: .* lacks \['wide'\]"),
    "NaN": (sends(B), sends(changed(wide=NAN)), Status.REFUSED, r"'wide' holds nan at \[4000, 2\]"),
    "weights": (sends(B), sends(B, weight=2), Status.REFUSED, r"different weights, \[1.0, 2.0\]"),
    "weight": (sends(B, weight=0), sends(B, weight=0), Status.REFUSED, "weight 0.0 is not above"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_goes_wrong_with_a_rank_goes_wrong_with_its_silo_and_with_no_other(fault: str):
    *ranks, status, reason = FAULTS[fault]
    result, outcome, seen = await play(*ranks)
    assert bits(result.weights) == bits(A)
    assert outcome.status is status
    assert re.search(reason, outcome.reason)
    assert isinstance(outcome.error, ChannelError) is (status is Status.FAILED)
    told = [one for one in seen if isinstance(one, Report)]
    assert told
    for report in told:
        assert not report.accepted
        assert report.reason in outcome.reason


async def test_shards_need_an_aggregation_that_takes_parts():
    result, outcome, seen = await play(sends(B), sends(B), strategy=FedAvg(aggregate=Aligned))
    assert bits(result.weights) == bits(A)
    assert outcome.status is Status.REFUSED
    assert "AlignedContribution takes whole ones: use Staged aggregation" in outcome.reason
    assert not any(report.accepted for report in seen)


async def test_a_rank_that_is_late_makes_its_silo_late_until_it_has_answered():
    late, early = asyncio.Event(), asyncio.Event()
    async with pairs("0", "1", "plain") as (servers, silos):
        ranks = on(servers["0"], servers["1"])
        members = [
            Silo(silos[name], name, shard=shard) for name, shard in zip("01", TWO, strict=True)
        ]
        early.set()
        acts = [
            asyncio.ensure_future(sends(B, turn=turn)(silo, silos[silo.name], shard))
            for silo, shard, turn in zip(members, TWO, (early, late), strict=True)
        ]
        options: dict[str, Any] = {"strategy": FedAvg(), "min_silos": 1}
        with pytest.raises(QuorumNotReached) as info:
            await run_round({"r": ranks}, ZERO, round=1, train_deadline_s=DEADLINE_S, **options)
        outcome = info.value.outcomes["r"]
        assert (outcome.status, outcome.is_busy) == (Status.LATE, True)
        assert (await acts[0]).reason == outcome.reason == "READY did not come within 0.3 s"
        catching_up = asyncio.ensure_future(ranks.answered(outcome.unanswered))
        await servers["1"].ping()
        assert not catching_up.done()
        late.set()
        await catching_up
        assert (await acts[1]).reason == outcome.reason
        acts = [
            asyncio.ensure_future(sends(B)(silo, silos[silo.name], shard))
            for silo, shard in zip(members, TWO, strict=True)
        ]
        result = await run_round({"r": ranks}, ZERO, round=1, **options)
        assert bits(result.weights) == bits(B)
        for act, silo in zip(acts, members, strict=True):
            assert (await act).accepted
            await silo.aclose()


async def test_who_waits_for_a_late_rank_hears_that_another_one_dies():
    async with pairs("0", "1") as (servers, silos):
        ranks = on(servers["0"], servers["1"])
        ranks.owing = {0}
        waiting = asyncio.ensure_future(ranks.answered(1))
        await servers["1"].ping()
        await silos["1"].aclose()
        with pytest.raises(ChannelError):
            await waiting
        assert ranks.is_closed


async def test_no_rank_trains_before_all_have_their_weights():
    async with pairs("0", "1") as (servers, silos):
        ranks = on(servers["0"], servers["1"])
        members = [
            Silo(silos[name], name, shard=shard) for name, shard in zip("01", TWO, strict=True)
        ]
        acts = [
            asyncio.ensure_future(sends(B)(silo, silos[silo.name], shard))
            for silo, shard in zip(members, TWO, strict=True)
        ]
        await cancel(acts[1])
        options: dict[str, Any] = {"strategy": FedAvg(), "min_silos": 1}
        with pytest.raises(QuorumNotReached) as info:
            await run_round({"r": ranks}, ZERO, round=1, train_deadline_s=DEADLINE_S, **options)
        assert not acts[0].done()
        # The rank that had its weights has answered without training, and waits for the next round.
        acts[1] = asyncio.ensure_future(sends(B)(members[1], silos["1"], TWO[1]))
        await ranks.answered(info.value.outcomes["r"].unanswered)
        assert not acts[0].done()
        result = await run_round({"r": ranks}, ZERO, round=1, **options)
        assert bits(result.weights) == bits(B)
        for act, silo in zip(acts, members, strict=True):
            assert (await act).accepted
            await silo.aclose()
