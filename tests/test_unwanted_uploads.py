"""Updates that nobody wants any more: given up by their silo, of the wrong layout, or too late."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig, Transfer
from fedllm import (
    FedAvg,
    Federation,
    QuorumNotReached,
    Report,
    RoundResult,
    RunConfig,
    Silo,
    Status,
    join,
    run_round,
)
from fedllm.messages import (
    FROM_SERVER,
    JOIN_ANSWER,
    Commit,
    Decline,
    Join,
    Ready,
    Task,
    Upload,
)
from fedllm.staged import Stage, StagedContribution
from tests.harness import turns

pytestmark = pytest.mark.usefixtures("no_leaks")

SMALL = ChannelConfig(slot_bytes=1 << 14, slots=4, close_timeout_s=1.0)
WEIGHTS = {"w": np.zeros(1 << 18, np.float32)}
"""Far more than the slots of `SMALL` hold."""
ONES = {"w": np.ones(1 << 18, np.float32)}
DEADLINE_S = 0.5
AT_ONCE_S = 5.0
"""Much less than `UPLOAD_START_TIMEOUT_S`."""

Behaviour = Callable[[Channel], Awaitable[Any]]


@asynccontextmanager
async def acting(**behaviours: Behaviour) -> AsyncIterator[tuple[dict[str, Channel], list[Any]]]:
    """The server's ends of the channels to silos that behave so, and what these return, by name."""
    async with AsyncExitStack() as stack, aiordma.listen(config=SMALL) as listener:
        servers, acts = {}, []
        for name, behave in behaviours.items():
            opening = aiordma.connect(*listener.address, config=SMALL)
            silo = await stack.enter_async_context(opening)
            servers[name] = await stack.enter_async_context(await listener.accept())
            acts.append(asyncio.ensure_future(behave(silo)))
        try:
            yield servers, acts
        finally:
            for act in acts:
                act.cancel()
            await asyncio.gather(*acts, return_exceptions=True)


async def a_round(channels: dict[str, Channel], **options: Any) -> RoundResult:
    options = {"round": 1, "strategy": FedAvg(), "min_silos": 1, **options}
    async with asyncio.timeout(AT_ONCE_S):
        return await run_round(channels, WEIGHTS, **options)


async def take_part(channel: Channel) -> Report:
    silo = Silo(channel, "silo")
    try:
        return await (await anext(silo.rounds())).submit(ONES, weight=1)
    finally:
        await silo.aclose()


def change_ones_mind(when: str) -> Behaviour:
    """A silo that cancels its submission `when`, and asks for the next task."""

    async def behave(channel: Channel) -> Report:
        silo = Silo(channel, "silo")
        rounds = silo.rounds()
        try:
            submitting = asyncio.ensure_future((await anext(rounds)).submit(ONES, weight=1))
            sent = channel.stats().sent_messages
            while channel.stats().sent_messages == sent:  # noqa: ASYNC110 - turns of the loop
                await asyncio.sleep(0)
            while when == "uploading" and not channel.stats().sent_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0)
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
            return await (await anext(rounds)).submit(ONES, weight=1)
        finally:
            await silo.aclose()

    return behave


async def be_asked(channel: Channel) -> Task:
    """Up to the request for the update, as a silo of which only the channel is there."""
    task: Task = await channel.recv(FROM_SERVER)
    await channel.recv_tensors()
    await channel.send(Ready(task.ticket, 1.0, None, {}))
    assert await channel.recv(FROM_SERVER) == Upload(task.ticket, 1)
    return task


@pytest.mark.parametrize("when", ["ready", "uploading"])
async def test_a_round_goes_on_at_once_without_an_update_that_was_given_up(when: str):
    async with acting(a=take_part, c=change_ones_mind(when)) as (servers, acts):
        result = await a_round(servers)
        assert result.outcomes["a"].status is Status.COMMITTED
        outcome = result.outcomes["c"]
        assert (outcome.status, outcome.is_busy) == (Status.REFUSED, False)
        assert "the silo declined: its submission was given up" in outcome.reason
        again = await a_round({"c": servers["c"]}, round=2)
        assert again.outcomes["c"].status is Status.COMMITTED
        assert all(report.accepted for report in await asyncio.gather(*acts))


async def test_a_quorum_that_an_update_was_given_up_for_is_lost_at_once():
    async with acting(a=take_part, c=change_ones_mind("uploading")) as (servers, acts):
        with pytest.raises(QuorumNotReached, match="1 of 2 silos are left"):
            await a_round(servers, min_silos=2)
        assert not (await acts[0]).accepted


async def test_who_begins_no_upload_has_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedllm.participation.UPLOAD_START_TIMEOUT_S", DEADLINE_S)
    async with acting(a=take_part, c=be_asked) as (servers, _):
        outcome = (await a_round(servers)).outcomes["c"]
    assert isinstance(outcome.error, aiordma.TransferTimeout)
    assert "began none within 0.5 s" in outcome.reason


async def test_a_server_that_stood_still_itself_does_not_blame_the_silo(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fedllm.participation.UPLOAD_START_TIMEOUT_S", DEADLINE_S)
    loop = asyncio.get_running_loop()
    now = loop.time

    async def upload_after_the_pause(channel: Channel) -> Commit:
        task = await be_asked(channel)
        monkeypatch.setattr(loop, "time", lambda: now() + 2 * DEADLINE_S)
        await turns(5)
        await channel.send_tensors(ONES, meta=task.meta(1))
        commit: Commit = await channel.recv(FROM_SERVER)
        return commit

    async with acting(c=upload_after_the_pause) as (servers, acts):
        assert (await a_round(servers)).outcomes["c"].status is Status.COMMITTED
        assert (await acts[0]).accepted


async def test_who_says_ready_instead_of_uploading_is_refused():
    async def insist(channel: Channel) -> None:
        await channel.send(Ready((await be_asked(channel)).ticket, 2.0, None, {}))

    async with acting(a=take_part, c=insist) as (servers, _):
        outcome = (await a_round(servers)).outcomes["c"]
    assert outcome.status is Status.REFUSED
    assert "said READY twice" in outcome.reason


async def test_an_upload_of_another_layout_is_turned_away_with_the_reason():
    async def send_too_much(channel: Channel) -> Commit:
        task = await be_asked(channel)
        reason = r"the update's names are not the round's: it has \['x'\] besides"
        with pytest.raises(aiordma.TransferRefused, match=reason):
            await channel.send_tensors({**ONES, "x": ONES["w"]}, meta=task.meta(1))
        commit: Commit = await channel.recv(FROM_SERVER)
        return commit

    async with acting(a=take_part, c=send_too_much) as (servers, acts):
        result = await a_round(servers)
        assert result.outcomes["c"].status is Status.REFUSED
        async with asyncio.timeout(AT_ONCE_S):
            assert not (await acts[1]).accepted


LATE_WEIGHT = 3.0


async def test_a_late_update_is_out_before_the_others_are_folded(monkeypatch):
    """Even if it was added: whoever is told that it missed the deadline is not in the mean."""
    receive, added = StagedContribution.receive, []

    async def receive_and_wait(self: StagedContribution, transfer: Transfer) -> bool:
        is_whole = await receive(self, transfer)
        if self.weight == LATE_WEIGHT:
            added.append(self.stage)
            await asyncio.Event().wait()
        return is_whole

    async def add_at_the_last_moment(channel: Channel) -> Commit:
        task: Task = await channel.recv(FROM_SERVER)
        await channel.recv_tensors()
        await channel.send(Ready(task.ticket, LATE_WEIGHT, None, {}))
        await channel.recv(FROM_SERVER)
        twos = {"w": np.full(1 << 18, 2, np.float32)}
        await channel.send_tensors(twos, meta=task.meta(1))
        commit: Commit = await channel.recv(FROM_SERVER)
        return commit

    monkeypatch.setattr(StagedContribution, "receive", receive_and_wait)
    async with acting(a=take_part, c=add_at_the_last_moment) as (servers, acts):
        result = await a_round(servers, upload_deadline_s=DEADLINE_S)
        assert not (await acts[1]).accepted
    assert added == [Stage.ADDED]
    assert result.outcomes["c"].status is Status.LATE
    assert result.weights["w"].tobytes() == ONES["w"].tobytes()


async def test_an_answer_to_an_earlier_task_is_not_the_one_that_was_late():
    lines: list[str] = []
    fingerprint = {"weights": "1"}
    is_late = asyncio.Event()
    slow_is_heard = asyncio.Event()

    async def on_round(result: RoundResult) -> None:
        if result.round == 2:
            assert result.outcomes["slow"].is_busy
            is_late.set()
            await slow_is_heard.wait()

    def on_silo(name: str, what: str) -> None:
        lines.append(f"{name} {what}")

    async def be_quick(address: tuple[str, int]) -> None:
        async with join(*address, name="quick", fingerprint=fingerprint) as silo:
            async for task in silo.rounds():
                await task.submit(ONES, weight=1)

    async def be_slow(address: tuple[str, int]) -> None:
        async with aiordma.connect(*address) as channel:
            await channel.send(Join("slow", fingerprint))
            await channel.recv(JOIN_ANSWER)
            first = await be_asked(channel)
            assert not (await channel.recv(FROM_SERVER)).accepted
            second: Task = await channel.recv(FROM_SERVER)
            await channel.recv_tensors()
            await is_late.wait()
            await channel.send(Decline(first.ticket, "given up"))
            await channel.ping()
            assert "slow caught up" not in lines
            await channel.send(Ready(second.ticket, 1.0, None, {}))
            while "slow caught up" not in lines:
                await channel.ping()
            slow_is_heard.set()

    settings = RunConfig(
        min_silos=1,
        expect=2,
        rounds=2,
        train_deadline_s=DEADLINE_S,
        upload_deadline_s=DEADLINE_S,
    )
    async with Federation(
        WEIGHTS, settings, fingerprint=fingerprint, on_round=on_round, on_silo=on_silo
    ) as server:
        address = await server.start()
        async with asyncio.timeout(AT_ONCE_S):
            await asyncio.gather(server.run(), be_quick(address), be_slow(address))
