"""What a server is told: wrong settings are its own errors, at once; and what it keeps of a run that failed."""

import asyncio
from typing import Any

import numpy as np
import pytest

from aiordma import TensorError
from fedllm import (
    FedAvg,
    Federation,
    QuorumNotReached,
    RoundResult,
    RunConfig,
    RunFailed,
    SettingError,
    join,
    run_round,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

FINGERPRINT = {"weights": "1"}
WEIGHTS = {"w": np.zeros(3, np.float32)}


def server(weights: Any = WEIGHTS, *, rounds: int = 1, **options: Any) -> Federation:
    return Federation(
        weights, RunConfig(min_silos=1, rounds=rounds), **{"fingerprint": FINGERPRINT, **options}
    )


@pytest.mark.parametrize(
    "arguments",
    [{"x": object()}, {"x": np.float32(1)}, {1: 2}, {"x": 1 << 64}, {"x": "\ud800"}],
    ids=["object", "numpy", "key", "large", "surrogate"],
)
async def test_arguments_that_no_silo_can_be_told_are_refused_at_once(arguments: Any):
    with pytest.raises(SettingError, match=r"no silo can be told these arguments: .*; give names"):
        server(arguments=arguments)
    options: Any = {"round": 1, "strategy": FedAvg(), "min_silos": 1, "arguments": arguments}
    with pytest.raises(SettingError, match="no silo can be told these arguments"):
        await run_round({}, WEIGHTS, **options)


def test_weights_that_cannot_be_sent_are_refused_at_once():
    with pytest.raises(TensorError, match="'w' is not contiguous"):
        server({"w": np.zeros((3, 4), np.float32).T})


async def add_one(address: tuple[str, int], *, rounds: int) -> None:
    """A silo that adds 1 to all weights in so many rounds, and then has nothing to give."""
    async with join(*address, name="a", fingerprint=FINGERPRINT) as silo:
        async for task in silo.rounds():
            if task.round <= rounds:
                update = {name: array + 1 for name, array in task.weights.items()}
                await task.submit(update, weight=1)


async def test_what_a_run_had_come_to_outlives_its_failure_and_can_be_gone_on_from():
    seen: list[int] = []

    def on_round(result: RoundResult) -> None:
        seen.append(len(running.history.rounds))

    running = server(rounds=3, on_round=on_round)
    assert list(running.history.rounds) == []
    assert running.history.weights["w"].tolist() == [0, 0, 0]
    address = await running.start()
    run, silo = await asyncio.gather(
        running.run(), add_one(address, rounds=2), return_exceptions=True
    )
    assert isinstance(run, QuorumNotReached)
    assert isinstance(silo, RunFailed)
    assert [record.round for record in running.history.rounds] == seen == [1, 2]
    assert running.history.weights["w"].tolist() == [2, 2, 2]

    address = await running.start()
    history, _ = await asyncio.gather(running.run(), add_one(address, rounds=3))
    assert history == running.history
    assert [record.round for record in history.rounds] == [1, 2, 3]
    assert history.weights["w"].tolist() == [3, 3, 3]
