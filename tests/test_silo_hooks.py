"""A coroutine that is told of silos: in order, beside the run, and however long it takes."""

import asyncio

import pytest

from fedllm import ServerLost
from tests.federation import Log, running, server_of, take_part
from tests.harness import cancel

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


async def test_a_coroutine_may_be_told_of_silos_one_thing_after_the_other():
    log, told = Log(), list[str]()

    async def on_silo(name: str, what: str) -> None:
        told.append(f"begin {what}")
        await asyncio.sleep(0)
        told.append(f"end {what}")
        log.silo(name, what)

    async with running(log, rounds=2, on_silo=on_silo) as (address, run):
        await asyncio.gather(take_part(address, "a", 1), run)
    whats = [line.removeprefix("a ") for line in log.lines]
    assert whats[0] == "joined"
    assert told == [f"{when} {what}" for what in whats for when in ("begin", "end")]


async def test_what_a_coroutine_raises_that_is_told_of_silos_ends_the_run():
    async def on_silo(name: str, what: str) -> None:
        if what == "joined":
            await asyncio.sleep(0)
            raise ZeroDivisionError

    async with running(Log(), on_silo=on_silo, rounds=2) as (address, run):
        silo = asyncio.ensure_future(take_part(address, "a", 1))
        with pytest.raises(ZeroDivisionError):
            await run
        with pytest.raises(ServerLost):
            await silo


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_one_that_never_answers_holds_up_neither_a_run_nor_its_cancellation(
    is_cancelled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fedllm.hooks.LAST_ANSWER_S", 0.01)
    log, told, gate = Log(), list[str](), asyncio.Event()

    async def on_silo(name: str, what: str) -> None:
        told.append(what)
        log.silo(name, what)
        await asyncio.Event().wait()

    async with running(log, rounds=2, on_silo=on_silo) as (address, run), asyncio.timeout(10):
        silo = asyncio.ensure_future(take_part(address, "a", 1, gate=gate))
        await log.has("a joined")
        if is_cancelled:
            run.cancel()
        gate.set()
        await asyncio.wait({run})
        assert run.cancelled() == is_cancelled
        await asyncio.gather(silo, return_exceptions=True)
    assert len(log.rounds) == (0 if is_cancelled else 2)
    assert told == ["joined"]


async def test_one_may_close_the_server_itself():
    is_closed = asyncio.Event()

    async def on_silo(name: str, what: str) -> None:
        if what == "joined":
            await server.aclose()
            is_closed.set()

    server = server_of(Log(), min_silos=2, on_silo=on_silo)
    async with server, asyncio.timeout(10):
        address = await server.start()
        run = asyncio.ensure_future(server.run())
        with pytest.raises(ServerLost):
            await take_part(address, "a", 1)
        await is_closed.wait()
        await cancel(run)
