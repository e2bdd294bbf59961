"""One round over real channels with silos that behave as a test wants them to."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import (
    Aggregation,
    FedAvg,
    FedError,
    Ready,
    Report,
    RoundResult,
    Silo,
    Staged,
    Strategy,
    Task,
    run_round,
)
from fedllm.messages import FROM_SERVER, Commit, Upload

SMALL = ChannelConfig(slot_bytes=1 << 14, slots=4, close_timeout_s=1.0)
LARGE_ITEMS = 1 << 20
"""Far more than the slots of `SMALL` hold."""
DEADLINE_S = 0.3

AGGREGATE: Callable[[Mapping[str, Any]], Aggregation] = Staged
"""How the rounds of `play` gather their updates."""

Update = dict[str, np.ndarray[Any, Any]]
Behaviour = Callable[[Channel], Awaitable[Any]]


def update(value: float) -> Update:
    """Of more chunks than `SMALL` has slots: no upload is whole before its receiver has claimed it."""
    rng = np.random.default_rng(int(value * 8))
    wide = rng.standard_normal(20_000).astype(np.float32)
    return {"w": wide.reshape(-1, 4), "b": np.full(3, value, np.float16)}


WEIGHTS = update(0)


def strategy() -> Strategy:
    return FedAvg(aggregate=AGGREGATE)


@asynccontextmanager
async def pairs(*names: str) -> AsyncIterator[tuple[dict[str, Channel], dict[str, Channel]]]:
    """A channel a name: the server's ends, and the silos'."""
    async with AsyncExitStack() as stack, aiordma.listen(config=SMALL) as listener:
        servers, silos = {}, {}
        for name in names:
            opening = aiordma.connect(*listener.address, config=SMALL)
            silos[name] = await stack.enter_async_context(opening)
            servers[name] = await stack.enter_async_context(await listener.accept())
        yield servers, silos


def silo_on(channel: Channel) -> Silo:
    return Silo(channel, "silo")


def takes_part(
    sends: Update,
    *,
    weight: float = 1.0,
    turn: asyncio.Event | None = None,
    silo: Silo | None = None,
) -> Callable[[Channel], Awaitable[Report]]:
    """A silo that does what it should, in one round; its training ends when its turn comes."""

    async def behave(channel: Channel) -> Report:
        me = silo or silo_on(channel)
        try:
            async for task in me.rounds():
                assert task.weights["w"].dtype == np.float32
                if turn is not None:
                    await turn.wait()
                return await task.submit(sends, weight=weight, metrics={"loss": weight})
        finally:
            await me.aclose()
        raise AssertionError("the run was over before it began")

    return behave


def of_the_round() -> list[str]:
    """The tasks that run_round made and that live."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name in ("exchange", "_Round._dismiss")]


async def play(
    behaviours: Mapping[str, Behaviour],
    *,
    ends: tuple[dict[str, Channel], dict[str, Channel]] | None = None,
    weights: Update = WEIGHTS,
    **options: Any,
) -> tuple[RoundResult, dict[str, Any]]:
    """One round with silos that behave so; what the round came to, and what each silo saw."""
    async with AsyncExitStack() as stack:
        if ends is None:
            ends = await stack.enter_async_context(pairs(*behaviours))
        servers, silos = ends
        acts = {
            name: asyncio.ensure_future(behaviour(silos[name]))
            for name, behaviour in behaviours.items()
        }
        options = {"round": 1, "strategy": strategy(), "min_silos": 1, **options}
        try:
            result = await run_round({n: servers[n] for n in behaviours}, weights, **options)
        finally:
            assert of_the_round() == []
            async with asyncio.timeout(5):
                seen = await asyncio.gather(*acts.values(), return_exceptions=True)
    for one in seen:
        if isinstance(one, Exception) and not isinstance(one, aiordma.AiordmaError | FedError):
            raise one
    return result, dict(zip(acts, seen, strict=True))


def mean_of(*parts: tuple[str, float, Update]) -> dict[str, bytes]:
    staged = Staged(WEIGHTS)
    for name, weight, arrays in parts:
        contribution = staged.begin(name, weight)
        for key, buffer in contribution.buffers.items():
            buffer[...] = arrays[key]
        contribution.add()
    staged.commit()
    return bits(staged.result())


def bits(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


A, B, C = update(1), update(2), update(3)
TWO = mean_of(("a", 1.0, A), ("b", 2.0, B))


def changed(**changes: Any) -> Update:
    return {**C, **changes}


NAN, INF = C["w"].copy(), C["b"].copy()
NAN[3, 1], INF[2] = math.nan, -math.inf


# What one silo may do instead of what it should: raw channels.


async def take_task(channel: Channel) -> Task:
    task: Task = await channel.recv(FROM_SERVER)
    received = await channel.recv_tensors()
    assert received.meta == task.meta(0)
    return task


async def say_ready(channel: Channel) -> Task:
    task = await take_task(channel)
    await channel.send(Ready(task.ticket, 1.0, None, {}))
    return task


async def be_asked(channel: Channel) -> tuple[Task, int]:
    task = await say_ready(channel)
    upload: Upload = await channel.recv(FROM_SERVER)
    assert (upload.ticket, upload.attempt) == (task.ticket, 1)
    return task, upload.attempt


async def begin_upload(channel: Channel, task: Task, attempt: int) -> asyncio.Task[None]:
    """The update is on its way, and not there."""
    sent = channel.stats().sent_bytes
    sending = asyncio.ensure_future(channel.send_tensors(LARGE, meta=task.meta(attempt)))
    while channel.stats().sent_bytes == sent:  # noqa: ASYNC110 - turns of the loop, no time
        await asyncio.sleep(0)
    assert not sending.done()
    return sending


LARGE: Update = {"w": np.zeros((LARGE_ITEMS // 4, 4), np.float32), "b": np.zeros(3, np.float16)}


async def die_before_ready(channel: Channel) -> None:
    await take_task(channel)
    await channel.aclose()


async def break_every_upload_off(channel: Channel) -> Commit:
    task, attempt = await be_asked(channel)
    while True:
        sending = asyncio.ensure_future(channel.send_tensors(B, meta=task.meta(attempt)))
        await asyncio.sleep(0)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        message = await channel.recv(FROM_SERVER)
        if isinstance(message, Commit):
            return message
        attempt = message.attempt
