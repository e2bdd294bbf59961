"""A server that runs, silos that take part, and a log of what the server reports: for tests of whole runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import ml_dtypes
import numpy as np

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import Federation, History, Report, RoundResult, RunConfig, Silo, join
from fedllm.messages import JOIN_ANSWER, Join, Welcome

QUICK = ChannelConfig(slot_bytes=1 << 14, slots=4, close_timeout_s=1.0)
FINGERPRINT = {"weights": "sha256:aa", "tokenizer": "sha256:bb", "adapter": "sha256:cc"}
DEADLINE_S = 0.3

Weights = dict[str, np.ndarray[Any, Any]]


def weights_of(value: float) -> Weights:
    return {
        "w": np.full((5, 3), value, np.float32),
        "b": np.full(2, value, ml_dtypes.bfloat16),
    }


class Log:
    """What the server reports, and waiting for it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rounds: list[RoundResult] = []
        self._changed = asyncio.Event()

    def silo(self, name: str, what: str) -> None:
        self.lines.append(f"{name} {what}")
        self._changed.set()

    async def round(self, result: RoundResult) -> None:
        self.rounds.append(result)
        self._changed.set()

    async def until(self, is_there: Callable[["Log"], object]) -> None:
        async with asyncio.timeout(10):
            while not is_there(self):
                self._changed.clear()
                await self._changed.wait()

    async def has(self, line: str) -> None:
        await self.until(lambda log: any(line in one for one in log.lines))


def server_of(log: Log, *, weights: Weights | None = None, **options: Any) -> Federation:
    """A server with the settings and options that are given, by name, and the log's hooks."""
    named = {field.name for field in fields(RunConfig)}
    settings: dict[str, Any] = {"min_silos": 1, "rounds": 1, "farewell_s": DEADLINE_S}
    settings |= {name: value for name, value in options.items() if name in named}
    rest: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "on_round": log.round,
        "on_silo": log.silo,
        "config": QUICK,
    }
    rest |= {name: value for name, value in options.items() if name not in named}
    return Federation(weights or weights_of(0), RunConfig(**settings), **rest)


@asynccontextmanager
async def running(
    log: Log, **options: Any
) -> AsyncIterator[tuple[tuple[str, int], asyncio.Task[History]]]:
    """A server that runs: its address, and the task that returns its history."""
    server = server_of(log, **options)
    async with server:
        address = await server.start()
        task = asyncio.ensure_future(server.run())
        try:
            yield address, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def joining(address: tuple[str, int], name: str, **options: Any) -> AsyncIterator[Silo]:
    options = {"fingerprint": FINGERPRINT, "config": QUICK, "backoff": None, **options}
    async with join(*address, name=name, **options) as silo:
        yield silo


async def take_part(
    address: tuple[str, int], name: str, adds: float, *, gate: asyncio.Event | None = None
) -> tuple[Silo, list[Report]]:
    """A silo whose training adds a number to all weights; it trains only while its gate is open."""
    reports = []
    async with joining(address, name) as silo:
        async for task in silo.rounds():
            assert task.arguments == {}
            if gate is not None:
                await gate.wait()
            update = {
                n: (a.astype(np.float32) + adds).astype(a.dtype) for n, a in task.weights.items()
            }
            reports.append(await task.submit(update, weight=1, metrics={"loss": 1 / task.round}))
    return silo, reports


async def raw(address: tuple[str, int], name: str) -> Channel:
    """A silo of which only the channel is there."""
    channel = await aiordma.connect(*address, config=QUICK)
    await channel.send(Join(name, FINGERPRINT))
    assert isinstance(await channel.recv(JOIN_ANSWER), Welcome)
    return channel
