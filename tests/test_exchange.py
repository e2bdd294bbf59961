"""One silo's half of a round alone, and what is no silo's failure."""

import asyncio
import threading
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

import aiordma
from fedllm import FedAvg, Ready, Staged, Status, Task, exchange, run_round
from fedllm.messages import Commit, Upload
from tests.playing import WEIGHTS, A, B, bits, break_every_upload_off, pairs, takes_part

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


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


async def test_a_round_that_is_cancelled_while_it_folds_waits_for_the_thread():
    loop, is_folding, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    trail: list[str] = []

    class Slow(FedAvg):
        def step(self, weights, combined):
            loop.call_soon_threadsafe(is_folding.set)
            may_end.wait()
            trail.append("folded")
            return combined

    async with pairs("a") as (servers, silos):
        act = asyncio.ensure_future(takes_part(A)(silos["a"]))
        options: dict[str, Any] = {"round": 1, "strategy": Slow(), "min_silos": 1}
        running = asyncio.ensure_future(run_round(servers, WEIGHTS, **options))
        await is_folding.wait()
        running.cancel()
        for _ in range(100):
            await asyncio.sleep(0)
        was_done = running.done()
        may_end.set()
        assert not was_done
        with pytest.raises(asyncio.CancelledError):
            await running
        assert trail == ["folded"]
        act.cancel()
        await asyncio.gather(act, return_exceptions=True)
