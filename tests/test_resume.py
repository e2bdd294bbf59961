"""A run outlives its server and its silos: what is on disk, what is done again, and who finds whom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiordma
from fedllm import (
    Backoff,
    CheckpointError,
    Checkpoints,
    EarlyStop,
    EvaluationTask,
    FedError,
    RoundResult,
    ServerLost,
)
from fedllm.messages import FROM_SERVER, JOIN_ANSWER, Join, Welcome
from tests.federation import (
    DEADLINE_S,
    FINGERPRINT,
    QUICK,
    Log,
    joining,
    raw,
    running,
    server_of,
    take_part,
    weights_of,
)
from tests.playing import be_asked
from tests.test_checkpoint import files_of_at_most

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")

SOON = Backoff(first_s=0.01, most_s=0.05, patience_s=10.0)
PATIENCE_S = 10.0


class Worker:
    """A silo that finds its server again, and counts how often it trains in which round."""

    def __init__(self, name: str, adds: float, keep: Path | None = None) -> None:
        self.trained: list[int] = []
        self.said: list[str] = []
        self.refusals: list[str] = []
        self.final: Any = None
        self.before_submit: dict[int, asyncio.Event] = {}
        self._name, self._adds, self._keep = name, adds, keep

    async def run(self, address: tuple[str, int]) -> None:
        options: dict[str, Any] = {"backoff": SOON, "keep": self._keep}
        async with joining(address, self._name, **options, on_event=self.said.append) as silo:
            async for task in silo.rounds():
                self.trained.append(task.round)
                update = {n: a + np.asarray(self._adds, a.dtype) for n, a in task.weights.items()}
                if task.round in self.before_submit:
                    await self.before_submit[task.round].wait()
                report = await task.submit(update, weight=1, metrics={"loss": 1.0})
                if not report.accepted:
                    self.refusals.append(report.reason)
            self.final = silo.final


@asynccontextmanager
async def working(address: tuple[str, int], *workers: Worker) -> AsyncIterator[list[Any]]:
    tasks = [asyncio.ensure_future(worker.run(address)) for worker in workers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Die(Exception):
    """What ends a server at once, without a word to anybody."""


def die_in(round: int, log: Log) -> Any:
    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        if result.round == round:
            raise Die

    return on_round


@pytest.mark.parametrize("keeps", [False, True])
async def test_a_server_that_resumes_goes_on_where_it_was(tmp_path: Path, keeps: bool):
    checkpoints = Checkpoints(tmp_path / "server")
    keep = tmp_path if keeps else None
    workers = Worker("a", 1, keep), Worker("b", 3, keep)
    log = Log()
    settings: dict[str, Any] = {"rounds": 4, "min_silos": 2, "checkpoints": checkpoints}
    first = server_of(log, **settings, on_round=die_in(2, log))
    address = await first.start()
    async with working(address, *workers) as tasks, asyncio.timeout(PATIENCE_S):
        with pytest.raises(Die):
            await first.run()
        assert checkpoints.rounds() == [0, 1, 2]
        second = server_of(log, **settings)
        assert await second.resume() == second.round == 2
        assert second.history.weights["w"][0, 0] == 2 * 2
        history = await second.run(*address)
        await asyncio.gather(*tasks)
    assert [record.round for record in history.rounds] == [3, 4]
    for worker in workers:
        assert worker.trained == [1, 2, 3, 4]
        assert worker.refusals == []
        assert worker.final["w"].tobytes() == weights_of(2 * 4)["w"].tobytes()
        assert any("trying again in 0.0 s" in line for line in worker.said)
        assert "back: round 3 of 4" in worker.said


@pytest.mark.parametrize("keeps", [False, True])
async def test_a_round_that_comes_again_needs_no_training_if_the_update_was_kept(
    tmp_path: Path, keeps: bool
):
    """The server dies in round 2, when one silo has handed in its update and the other has not."""
    checkpoints = Checkpoints(tmp_path / "server")
    keep = tmp_path if keeps else None
    quick, slow = Worker("quick", 1, keep), Worker("slow", 3, keep)
    slow.before_submit[2] = asyncio.Event()
    settings: dict[str, Any] = {"rounds": 2, "min_silos": 2, "checkpoints": checkpoints}
    address = await (first := server_of(Log(), **settings)).start()
    async with working(address, quick, slow) as tasks, asyncio.timeout(PATIENCE_S):
        run = asyncio.ensure_future(first.run())
        while slow.trained != [1, 2] or quick.trained != [1, 2]:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        slow.before_submit[2].set()
        second = server_of(Log(), **settings)
        await second.resume()
        history = await second.run(*address)
        await asyncio.gather(*tasks)
    again = [] if keeps else [2]
    assert slow.trained == quick.trained == [1, 2, *again]
    assert all("the connection to the server is gone" in reason for reason in slow.refusals)
    assert len(slow.refusals) == 1
    handed_in = "round 2 again: its update is there, and is handed in"
    assert (handed_in in slow.said) == (handed_in in quick.said) == keeps
    assert history.weights["w"][0, 0] == 2 * 2


def files_in(folder: Path) -> set[Path]:
    return set(folder.iterdir())


async def test_what_was_judged_is_not_judged_again(tmp_path: Path):
    """The run ends when the second loss is no better than the first, of which a server knew that is dead."""
    checkpoints, judged = Checkpoints(tmp_path), list[int]()

    async def judge(task: EvaluationTask) -> tuple[float, dict[str, float]]:
        judged.append(task.round)
        return 1, {"loss": 1.0}

    async def work(address: tuple[str, int]) -> None:
        async with joining(address, "a", backoff=SOON) as silo:
            async for task in silo.rounds(judge):
                await task.submit(task.weights, weight=1)

    async def die(_: Any) -> None:
        raise Die

    stop = EarlyStop(metric="loss", patience=1)
    settings: dict[str, Any] = {"rounds": 9, "evaluate_every": 1, "stop": stop}
    before_it_was_judged = set[Path]()  # no weights are written again for the sake of a figure

    async def look(_: Any) -> None:
        before_it_was_judged.update(files_in(tmp_path))

    hooks: dict[str, Any] = {"on_round": look, "on_evaluation": die}
    first = server_of(Log(), **settings, checkpoints=checkpoints, **hooks)
    address = await first.start()
    async with asyncio.timeout(PATIENCE_S):
        working = asyncio.ensure_future(work(address))
        with pytest.raises(Die):
            await first.run()
        assert files_in(tmp_path) == before_it_was_judged
        second = server_of(Log(), **settings, checkpoints=checkpoints)
        assert await second.resume() == 1
        await second.run(*address)
        await working
    assert judged == [1, 2]
    assert second.round == 2
    assert (await asyncio.to_thread(checkpoints.state, 2))["progress"]["figures"] == [1.0, 1.0]


async def test_an_update_is_kept_for_the_very_same_task_alone(tmp_path: Path):
    worker = Worker("a", 1, tmp_path)
    for arguments in ({"lr": 1}, {"lr": 2}, {"lr": 2}):
        log = Log()
        checkpoints = Checkpoints(tmp_path / "server")
        settings: dict[str, Any] = {"checkpoints": checkpoints, "arguments": arguments, "rounds": 1}
        server = server_of(log, **settings, on_round=die_in(1, log))
        await server.resume()
        address = await server.start()
        async with working(address, worker), asyncio.timeout(PATIENCE_S):
            with pytest.raises(Die):
                await server.run()
        for path in checkpoints.folder.glob("round-000001*"):
            path.unlink()  # as if it had died before it had saved the round
    assert worker.trained == [1, 1]


async def test_a_silo_that_is_started_again_is_the_same_silo(tmp_path: Path):
    """It has its update, and takes its own place even while its old connection seems to live."""
    log = Log()
    first, second = Worker("a", 1, tmp_path), Worker("a", 1, tmp_path)
    other = Worker("b", 3)
    other.before_submit[1] = asyncio.Event()
    async with running(log, min_silos=2) as (address, run), asyncio.timeout(PATIENCE_S):
        async with working(address, first, other):
            await log.has("b joined")
            while first.trained != [1]:  # noqa: ASYNC110 - turns of the loop
                await asyncio.sleep(0)
            while not (tmp_path / "silo-a.json").exists():  # noqa: ASYNC110 - turns of the loop
                await asyncio.sleep(0)
            async with working(address, second):
                await log.has("a gone: ")
                await log.until(lambda log: log.lines.count("a joined") == 2)
                other.before_submit[1].set()
                await run
    assert second.trained == []
    assert any("is handed in" in line for line in second.said)
    assert log.rounds[0].weights["w"][0, 0] == 2


async def test_who_has_the_key_of_a_member_takes_its_place(tmp_path: Path):
    async with running(Log(), min_silos=2) as (address, _), asyncio.timeout(PATIENCE_S):
        async with aiordma.connect(*address, config=QUICK) as old:
            await old.send(Join("a", FINGERPRINT, "key"))
            assert isinstance(await old.recv(JOIN_ANSWER), Welcome)
            for key, is_welcome in (("", False), ("other", False), ("key", True)):
                async with aiordma.connect(*address, config=QUICK) as new:
                    await new.send(Join("a", FINGERPRINT, key))
                    assert isinstance(await new.recv(JOIN_ANSWER), Welcome) == is_welcome
            with pytest.raises(aiordma.ChannelClosed):
                await old.recv()


async def test_who_was_late_and_joins_anew_is_late_no_more():
    """Its old connection, from which an answer is still awaited, is closed."""
    log = Log()
    options: dict[str, Any] = {"expect": 2, "rounds": 2, "train_deadline_s": DEADLINE_S}

    async def join_as_a() -> aiordma.Channel:
        channel = await aiordma.connect(*address, config=QUICK)
        await channel.send(Join("a", FINGERPRINT, "key"))
        assert isinstance(await channel.recv(JOIN_ANSWER), Welcome)
        return channel

    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        if result.round == 1:
            channels.append(await join_as_a())
            await channels[0].recv()  # the task
            await channels[0].recv()  # that it is late
            with pytest.raises(aiordma.ChannelClosed):
                await channels[0].recv()

    channels: list[aiordma.Channel] = []
    async with running(log, **options, on_round=on_round) as (address, run):
        async with asyncio.timeout(PATIENCE_S):
            channels.append(await join_as_a())
            await asyncio.gather(take_part(address, "b", 1), run)
    for channel in channels:
        await channel.aclose()
    assert [list(result.outcomes) for result in log.rounds] == [["a", "b"], ["a", "b"]]
    assert log.rounds[0].outcomes["a"].is_busy


async def test_an_end_waits_for_silos_that_lost_the_way(tmp_path: Path):
    """The server dies between the last round and the goodbye; nobody trains again."""
    checkpoints = Checkpoints(tmp_path)
    log = Log()
    settings: dict[str, Any] = {"checkpoints": checkpoints, "farewell_s": PATIENCE_S}
    first = server_of(log, **settings, min_silos=2, on_round=die_in(1, log))
    address = await first.start()
    workers = Worker("a", 1), Worker("b", 3)
    async with working(address, *workers) as tasks, asyncio.timeout(PATIENCE_S):
        with pytest.raises(Die):
            await first.run()
        second = server_of(log, **settings, min_silos=2)
        assert await second.resume() == 1
        await second.run(*address)
        await asyncio.gather(*tasks)
    assert [worker.trained for worker in workers] == [[1], [1]]
    assert [worker.final["w"][0, 0] for worker in workers] == [2, 2]


async def test_an_end_waits_no_longer_than_it_should_and_not_for_who_left(tmp_path: Path):
    log = Log()

    async def leave(address: tuple[str, int]) -> None:
        async with joining(address, "left") as silo:
            async for task in silo.rounds():
                await task.submit(task.weights, weight=1)
                return

    async with running(log, min_silos=2, farewell_s=1e9) as (address, run):
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(leave(address), take_part(address, "b", 1), run)
    async with running(log, farewell_s=0.1) as (address, run), asyncio.timeout(PATIENCE_S):
        lost = await raw(address, "lost")
        task, attempt = await be_asked(lost)
        await lost.send_tensors(weights_of(1), meta=task.meta(attempt))
        assert (await lost.recv(FROM_SERVER)).accepted
        lost._link._control.write(b"\xff" * 64)  # what no silo says, so that the connection breaks
        await run
        await lost.aclose()
    assert "lost gone without the final weights: it did not come back" in log.lines


async def test_a_folder_of_another_run_is_not_mixed_with_this_one(tmp_path: Path):
    log, checkpoints = Log(), Checkpoints(tmp_path)
    async with running(log, checkpoints=checkpoints) as (address, run):
        await asyncio.gather(take_part(address, "a", 1), run)
    with pytest.raises(CheckpointError, match=r"holds round 1 of an earlier run: resume it"):
        await server_of(log, checkpoints=checkpoints).run()
    other = server_of(log, checkpoints=checkpoints, fingerprint={"weights": "other"})
    with pytest.raises(CheckpointError, match=r"round 1 in .* is of another run \(its fingerprint"):
        await other.resume()
    larger = server_of(log, checkpoints=checkpoints, weights={"w": np.zeros(9)})
    with pytest.raises(CheckpointError, match="it holds other tensors"):
        await larger.resume()
    checkpoints.amend(1, {"round": 1})
    with pytest.raises(
        CheckpointError, match=r"is of another run \(.*missing required field `run`"
    ):
        await server_of(log, checkpoints=checkpoints).resume()
    assert other.history.weights["w"][0, 0] == 0
    with pytest.raises(FedError, match="nothing to resume from"):
        await server_of(log).resume()
    async with server_of(log, checkpoints=Checkpoints(tmp_path / "new")) as new:
        assert await new.resume() == 0
        await new.start()
        with pytest.raises(FedError, match="before start"):
            await new.resume()


async def test_a_disk_that_is_full_ends_the_server_and_not_the_run(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "server")
    worker = Worker("a", 1)
    settings: dict[str, Any] = {"rounds": 2, "checkpoints": checkpoints}
    server = server_of(Log(), **settings)
    address = await server.start()
    async with working(address, worker) as tasks, asyncio.timeout(PATIENCE_S):
        worker.before_submit[1] = asyncio.Event()
        run = asyncio.ensure_future(server.run())
        while worker.trained != [1]:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        worker.before_submit[1].set()
        with files_of_at_most(0), pytest.raises(CheckpointError, match="File too large"):
            await run
        assert checkpoints.rounds() == [0]
        assert server.round == 0
        assert server.history.weights["w"][0, 0] == 0
        history = await server.run(*address)
        await asyncio.gather(*tasks)
    assert worker.trained == [1, 1, 2]
    assert worker.refusals == ["round 1: the server could not finish it"]
    assert history.weights["w"][0, 0] == 2
    assert checkpoints.rounds() == [0, 1, 2]


async def test_a_silo_whose_disk_is_full_says_so_and_can_go_on(tmp_path: Path):
    async with running(Log()) as (address, run), joining(address, "a", keep=tmp_path) as silo:
        async for task in silo.rounds():
            with files_of_at_most(0):
                with pytest.raises(CheckpointError, match="'silo-a' cannot be written"):
                    await task.submit(task.weights, weight=1)
            assert (await task.submit(task.weights, weight=1)).accepted
        await run


async def test_without_a_way_back_the_loss_of_the_server_is_the_end():
    async with running(Log()) as (address, run), joining(address, "a") as silo:
        task = await anext(silo.rounds())
        run.cancel()
        with pytest.raises(ServerLost):
            await task.submit(task.weights, weight=1)
