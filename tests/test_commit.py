"""What a silo hears of a round is true, however the server ends: it is on the disk before."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedllm import CheckpointError, Checkpoints
from tests.federation import Log, joining, running, server_of
from tests.test_resume import PATIENCE_S, SOON

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


async def test_a_round_is_on_the_disk_before_its_silos_hear_of_it(tmp_path: Path):
    checkpoints, there = Checkpoints(tmp_path), list[list[int]]()
    async with running(Log(), rounds=2, checkpoints=checkpoints) as (address, run):
        async with joining(address, "a") as silo:
            async for task in silo.rounds():
                assert (await task.submit(task.weights, weight=1)).accepted
                there.append(checkpoints.rounds())
        await run
    assert there == [[0, 1], [0, 1, 2]]


async def test_no_silo_hears_twice_that_it_counts_in_a_round(tmp_path: Path):
    """The server dies while it writes round 1, and another one resumes."""
    heard: list[tuple[int, bool]] = []

    class Dying(Checkpoints):
        def save(self, round: int, *rest: Any) -> Path:
            if round == 1:
                raise CheckpointError("killed while it wrote")
            return super().save(round, *rest)

    async def work() -> None:
        async with joining(address, "a", backoff=SOON) as silo:
            async for task in silo.rounds():
                report = await task.submit(task.weights, weight=1)
                heard.append((task.round, report.accepted))

    first = server_of(Log(), rounds=2, checkpoints=Dying(tmp_path))
    address = await first.start()
    async with asyncio.timeout(PATIENCE_S):
        working = asyncio.ensure_future(work())
        with pytest.raises(CheckpointError, match="killed"):
            await first.run()
        second = server_of(Log(), rounds=2, checkpoints=Checkpoints(tmp_path))
        assert await second.resume() == 0
        await second.run(*address)
        await working
    assert heard == [(1, False), (1, True), (2, True)]
