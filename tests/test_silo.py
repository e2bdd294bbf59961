"""A run of rounds, seen from a silo: tasks and answers to them, and servers that are lost."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

import aiordma
from fedllm import FedError, ServerLost, SettingError, Silo, Status
from fedllm.messages import Join, Ready, Task, Upload, Welcome
from tests.federation import QUICK, Log, joining, running, take_part, weights_of
from tests.harness import cancel

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


async def test_a_server_that_stops_is_lost_to_its_silos():
    async with running(Log(), expect=2) as (address, run):
        gate = asyncio.Event()
        training = asyncio.ensure_future(take_part(address, "a", 1, gate=gate))
        async with joining(address, "b") as idle:
            waiting = asyncio.ensure_future(anext(idle.rounds()))
            task = await waiting
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            with pytest.raises(ServerLost, match="the connection to the server is gone"):
                await task.submit(task.weights, weight=1)
        gate.set()
        with pytest.raises(ServerLost):
            await training


async def test_a_server_that_dies_while_it_sends_the_weights_is_lost():
    async with aiordma.listen(config=QUICK) as listener:

        async def die() -> None:
            async with await listener.accept() as channel:
                await channel.recv(Join)
                await channel.send(Welcome("run", 1, 1))
                await channel.send({"type": "Task", "round": 1, "ticket": 1, "arguments": {}})

        dying = asyncio.ensure_future(die())
        async with joining(listener.address, "a") as silo:
            with pytest.raises(ServerLost):
                await anext(silo.rounds())
        await dying


async def test_a_task_that_is_passed_over_is_declined():
    log = Log()
    async with running(log, rounds=1, min_silos=1, expect=2) as (address, run):

        async def pass_over() -> None:
            async with joining(address, "picky") as silo:
                async for task in silo.rounds():
                    assert task.round == 1

        await asyncio.gather(pass_over(), take_part(address, "a", 1), run)
    outcome = log.rounds[0].outcomes["picky"]
    assert outcome.status is Status.REFUSED
    assert "declined: no update was submitted" in outcome.reason


async def test_a_silo_may_decline_a_round_and_say_why():
    log = Log()
    async with running(log, rounds=2, min_silos=1, expect=2) as (address, run):

        async def decline_the_first() -> list[bool]:
            accepted = []
            async with joining(address, "picky") as silo:
                async for task in silo.rounds():
                    if task.round == 1:
                        await task.decline("these weights are worse than mine" + "!" * 9000)
                        with pytest.raises(FedError, match="already, or declined"):
                            await task.decline("again")
                        with pytest.raises(FedError, match="already, or declined"):
                            await task.submit(task.weights, weight=1)
                    else:
                        accepted.append((await task.submit(task.weights, weight=1)).accepted)
            return accepted

        picky, _, _ = await asyncio.gather(decline_the_first(), take_part(address, "a", 1), run)
    assert picky == [True]
    outcome = log.rounds[0].outcomes["picky"]
    assert outcome.status is Status.REFUSED
    assert "the silo declined: these weights are worse than mine!!" in outcome.reason
    assert not outcome.is_busy


async def test_a_task_that_was_left_is_declined_by_who_asks_for_rounds_anew():
    log = Log()
    async with running(log, rounds=2, min_silos=1, expect=2) as (address, run):

        async def stumble() -> None:
            async with joining(address, "clumsy") as silo:
                async for _ in silo.rounds():
                    break  # or training that raised
                async for task in silo.rounds():
                    assert (await task.submit(task.weights, weight=1)).accepted

        async with asyncio.timeout(10):
            await asyncio.gather(stumble(), take_part(address, "a", 1), run)
    statuses = [result.outcomes["clumsy"].status for result in log.rounds]
    assert statuses == [Status.REFUSED, Status.COMMITTED]


async def test_an_update_that_cannot_be_sent_can_be_mended():
    async with running(Log()) as (address, run), joining(address, "a") as silo:
        async for task in silo.rounds():
            with pytest.raises(aiordma.TensorError, match="'w' is not contiguous"):
                await task.submit({**task.weights, "w": task.weights["w"].T}, weight=1)
            assert (await task.submit(task.weights, weight=1)).accepted
            with pytest.raises(FedError, match="submitted already"):
                await task.submit(task.weights, weight=1)
        await run


async def test_figures_may_be_any_kind_of_number():
    log = Log()
    figures: dict[str, Any] = {"loss": np.float32(0.5), "accuracy": np.mean([0.25]), "steps": 3}
    async with running(log) as (address, run), joining(address, "a") as silo:
        async for task in silo.rounds():
            for wrong in ({"loss": "low"}, {"x" * 65: 1.0}, {str(n): 1.0 for n in range(257)}):
                with pytest.raises(SettingError, match="must be numbers by short names"):
                    await task.submit(task.weights, weight=1, metrics=wrong)  # type: ignore[arg-type]
            report = await task.submit(
                task.weights, weight=np.int64(2), metrics=figures, norm=np.float32(1.5)
            )
            assert report.accepted
        await run
    assert log.rounds[0].metrics == {"accuracy": 0.25, "loss": 0.5, "steps": 3.0}
    assert log.rounds[0].outcomes["a"].norm == 1.5


async def test_weights_that_come_right_behind_their_task_are_taken():
    """Though the silo still waits for those of another task, whose round was cancelled."""
    async with aiordma.listen(config=QUICK) as listener:
        accepting = asyncio.ensure_future(listener.accept())
        async with aiordma.connect(*listener.address, config=QUICK) as channel:
            silo = Silo(channel, "a")
            async with await accepting as server:
                waiting = asyncio.ensure_future(anext(silo.rounds()))
                await server.send(Task(1, 1, {}))
                await channel.ping()
                try:
                    async with asyncio.timeout(10):
                        await server.send(Task(2, 2, {}))
                        meta = Task(2, 2, {}).meta(0)
                        await server.send_tensors(weights_of(0), meta=meta, confirm=True)
                        assert (await waiting).round == 2
                finally:
                    await cancel(waiting)
                    await silo.aclose()


async def drain(chunks: AsyncIterator[aiordma.Chunk]) -> None:
    async for chunk in chunks:
        chunk.release()


@pytest.mark.parametrize("stage", ["ready", "uploading"])
async def test_a_cancelled_submit_gives_the_upload_up(stage: str):
    """The silo can go on with the next task afterwards."""
    async with aiordma.listen(config=QUICK) as listener:
        accepting = asyncio.ensure_future(listener.accept())

        async with aiordma.connect(*listener.address, config=QUICK) as channel:
            server = await accepting
            silo = Silo(channel, "a")
            tasks = silo.rounds()
            large = {"w": np.zeros(1 << 20, np.float32)}
            for ticket in (1, 2):
                first = asyncio.ensure_future(anext(tasks))
                wire = {"type": "Task", "round": 1, "ticket": ticket, "arguments": {}}
                await server.send(wire)
                await server.send_tensors(weights_of(0), meta={"ticket": ticket, "attempt": 0})
                task = await first
                submitting = asyncio.ensure_future(task.submit(large, weight=1))
                assert (await server.recv(Ready)).ticket == ticket
                if stage == "uploading":
                    await server.send(Upload(ticket, 1))
                    async with contextlib.aclosing(server.incoming()) as transfers:
                        transfer = await anext(transfers)
                    async with contextlib.aclosing(transfer.chunks()) as chunks:
                        (await anext(chunks)).release()
                        submitting.cancel()
                        with pytest.raises(aiordma.TransferAborted):
                            await drain(chunks)
                submitting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await submitting
            await tasks.aclose()
            await silo.aclose()
            await server.aclose()
