"""A round with a sharded silo: ranks with a channel each, which stand and fall together."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aiordma import Channel, ChannelError, Transfer
from fedllm import (
    Aligned,
    EvaluationTask,
    FedAvg,
    QuorumNotReached,
    Report,
    RoundTask,
    Shard,
    Shards,
    Silo,
    Status,
    run_evaluation,
    run_round,
)
from fedllm.messages import Begin, Commit
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


async def test_ranks_upload_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """The first one's upload has begun, and ends only when that of the second is through."""
    has_begun, is_through, receive = asyncio.Event(), asyncio.Event(), Transfer.into

    async def hold_back_the_first(transfer: Transfer, buffers: Update) -> None:
        is_first = len(buffers["wide"]) == 2001
        if is_first:
            has_begun.set()
            await is_through.wait()
        else:
            await has_begun.wait()
        await receive(transfer, buffers)
        is_through.set()

    monkeypatch.setattr(Transfer, "into", hold_back_the_first)
    async with members(TWO) as (ranks, (zero, one)):
        acts = [asyncio.ensure_future(rank(sends(B))) for rank in (zero, one)]
        async with asyncio.timeout(5):
            result = await run_round({"r": ranks}, ZERO, round=1, strategy=FedAvg(), min_silos=1)
        assert [report.accepted for report in await asyncio.gather(*acts)] == [True, True]
    assert bits(result.weights) == bits(B)


Act = Callable[[Behaviour], Awaitable[Any]]


@asynccontextmanager
async def members(
    shards: tuple[Shard, ...], *, deaf_to: type | None = None
) -> AsyncIterator[tuple[Shards, tuple[Act, Act]]]:
    """A silo of two ranks alone: the server's end, and what makes each rank behave somehow, the second perhaps deaf."""
    async with pairs("0", "1") as (servers, silos):
        deaf: Any = servers["1"] if deaf_to is None else Deaf(servers["1"], deaf_to)
        ranks = [
            Silo(silos[name], name, shard=shard) for name, shard in zip("01", shards, strict=True)
        ]
        zero, one = (
            lambda behave, silo=silo, shard=shard: behave(silo, silos[silo.name], shard)
            for silo, shard in zip(ranks, shards, strict=True)
        )
        try:
            yield on(servers["0"], deaf, shards=shards), (zero, one)
        finally:
            for silo in ranks:
                await silo.aclose()


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
    "NaN": (
        sends(B),
        sends(changed(wide=NAN)),
        Status.REFUSED,
        r"tensor 'wide' holds nan at \[4000, 2\]",
    ),
    "weights": (
        sends(B),
        sends(B, weight=2),
        Status.REFUSED,
        r"its ranks report different weights, \[1.0, 2.0\]",
    ),
    "weight": (sends(B, weight=0), sends(B, weight=0), Status.REFUSED, "weight 0.0 is not above"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_goes_wrong_with_a_rank_goes_wrong_with_its_silo_and_with_no_other(fault: str):
    *ranks, status, reason = FAULTS[fault]
    result, outcome, seen = await play(*ranks)
    assert bits(result.weights) == bits(A)
    assert outcome.status is status
    assert re.match(reason, outcome.reason)
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
    late = asyncio.Event()
    async with members(TWO) as (ranks, (zero, one)):
        acts = [asyncio.ensure_future(zero(sends(B)))]
        acts.append(asyncio.ensure_future(one(sends(B, turn=late))))
        options: dict[str, Any] = {"strategy": FedAvg(), "min_silos": 1}
        with pytest.raises(QuorumNotReached) as info:
            await run_round({"r": ranks}, ZERO, round=1, train_deadline_s=DEADLINE_S, **options)
        outcome = info.value.outcomes["r"]
        assert (outcome.status, outcome.is_busy) == (Status.LATE, True)
        assert (await acts[0]).reason == outcome.reason == "READY did not come within 0.3 s"
        assert ranks.owing == {1}
        late.set()
        await ranks.answered(outcome.unanswered or 0)
        assert (await acts[1]).reason == outcome.reason
        acts = [asyncio.ensure_future(rank(sends(B))) for rank in (zero, one)]
        result = await run_round({"r": ranks}, ZERO, round=1, **options)
        assert bits(result.weights) == bits(B)
        assert [(await act).accepted for act in acts] == [True, True]


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


SMALL = (
    Shard(0, 2, {"wide": None, "scale": None}),
    Shard(1, 2, {"head": None, "norm": None}),
)
"""What the second rank gets fits a slot: it is sent before the rank has asked for it."""


@pytest.mark.parametrize("shards", [TWO, SMALL], ids=["large", "small"])
async def test_no_rank_trains_before_all_have_their_weights(shards: tuple[Shard, ...]):
    async with members(shards) as (ranks, (zero, one)):
        act = asyncio.ensure_future(zero(sends(B)))
        options: dict[str, Any] = {"strategy": FedAvg(), "min_silos": 1}
        with pytest.raises(QuorumNotReached) as info:
            await run_round({"r": ranks}, ZERO, round=1, train_deadline_s=DEADLINE_S, **options)
        # The rank that had its weights answers without training, and waits for the next round.
        other = asyncio.ensure_future(one(sends(B)))
        await ranks.answered(info.value.outcomes["r"].unanswered or 0)
        assert not act.done()
        result = await run_round({"r": ranks}, ZERO, round=1, **options)
        assert bits(result.weights) == bits(B)
        assert (await act).accepted
        assert (await other).accepted


async def judge(task: EvaluationTask) -> tuple[float, dict[str, float]]:
    return len(task.weights), {"loss": 2.0}


def judges(silo: Silo, channel: Channel, shard: Shard) -> Awaitable[RoundTask]:
    return anext(silo.rounds(judge))


async def test_an_evaluation_that_is_given_up_leaves_no_rank_waiting_for_another():
    async with members(TWO) as (ranks, (zero, one)):
        act = asyncio.ensure_future(zero(judges))
        evaluation = await run_evaluation({"r": ranks}, ZERO, round=1, deadline_s=DEADLINE_S)
        outcome = evaluation.outcomes["r"]
        assert (outcome.status, outcome.is_busy) == (Status.LATE, True)
        assert ranks.owing == {0, 1}
        other = asyncio.ensure_future(one(judges))
        await ranks.answered(outcome.unanswered or 0)
        evaluation = await run_evaluation({"r": ranks}, ZERO, round=1)
        outcome = evaluation.outcomes["r"]
        # Four tensors here and three there.
        assert (outcome.status, outcome.is_busy) == (Status.REFUSED, False)
        assert "its ranks report different weights, [3.0, 4.0]" in outcome.reason
        await cancel(act)
        await cancel(other)


class Deaf:
    """A channel whose peer has no room for messages of one kind."""

    def __init__(self, channel: Channel, to: type) -> None:
        self._channel = channel
        self._to = to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    async def send(self, obj: object) -> None:
        await (asyncio.Event().wait() if isinstance(obj, self._to) else self._channel.send(obj))


@pytest.mark.parametrize("patience_s", [DEADLINE_S / 3, 60], ids=["unheard", "given up"])
async def test_ranks_of_which_only_some_were_told_to_begin_are_a_silo_no_more(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
):
    async with members(TWO, deaf_to=Begin) as (ranks, (zero, one)):
        acts = [asyncio.ensure_future(rank(sends(B))) for rank in (zero, one)]
        monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", patience_s)
        options: dict[str, Any] = {"strategy": FedAvg(), "min_silos": 1}
        with pytest.raises(QuorumNotReached):
            await run_round({"r": ranks}, ZERO, round=1, train_deadline_s=DEADLINE_S, **options)
        assert ranks.is_closed
        for act in acts:
            await cancel(act)


async def test_ranks_of_which_only_some_heard_of_the_commit_are_a_silo_no_more(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fedllm.participation.NOTICE_TIMEOUT_S", DEADLINE_S)
    async with members(TWO, deaf_to=Commit) as (ranks, (zero, one)):
        acts = [asyncio.ensure_future(rank(sends(B))) for rank in (zero, one)]
        result = await run_round({"r": ranks}, ZERO, round=1, strategy=FedAvg(), min_silos=1)
        assert bits(result.weights) == bits(B)
        outcome = result.outcomes["r"]
        assert outcome.status is Status.COMMITTED
        assert outcome.reason.startswith("rank 1: sending the commit: ")
        assert ranks.is_closed
        assert (await acts[0]).accepted
        await cancel(acts[1])


async def test_each_rank_hears_of_the_end_once():
    async def listens(silo: Silo, channel: Channel, shard: Shard) -> Report:
        task = await anext(silo.rounds())
        report = await task.submit(shard.part_of(B), weight=1 + shard.rank)
        more = asyncio.ensure_future(channel.recv())
        await channel.ping()
        assert not more.done()
        await cancel(more)
        return report

    _, _, seen = await play(listens, listens)
    assert [report.accepted for report in seen] == [False, False]
