"""Memory that a transfer lent: back when no lane reads it, and not before."""

from __future__ import annotations

import asyncio

import pytest

from aiordma.loans import Loans
from tests.harness import turns

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


class Lanes:
    """Read the memory of some transfers."""

    def __init__(self, *reading: int) -> None:
        self.reading = set(reading)
        self.recalls: list[int] = []
        self.loans = Loans(self.recall)

    def recall(self, transfer: int) -> bool:
        self.recalls.append(transfer)
        return transfer not in self.reading

    def stop(self, transfer: int) -> None:
        self.reading.discard(transfer)
        self.loans.settle(transfer)


async def test_what_nobody_reads_is_back_at_once():
    lanes = Lanes()
    await lanes.loans.returned(1)
    assert lanes.recalls == [1]
    lanes.loans.settle(1)
    assert lanes.recalls == [1]


async def test_what_is_read_is_back_when_the_lanes_let_go():
    lanes = Lanes(1, 2)
    one, two, again = (asyncio.create_task(lanes.loans.returned(i)) for i in (1, 2, 1))
    await turns(3)
    lanes.loans.settle(1)  # a chunk of several
    lanes.stop(3)
    await turns(3)
    assert not any(task.done() for task in (one, two, again))
    lanes.stop(1)
    await asyncio.gather(one, again)
    assert not two.done()
    lanes.stop(2)
    await two


async def test_a_cancellation_waits_and_is_not_forgotten():
    lanes = Lanes(1)
    waiting = asyncio.create_task(lanes.loans.returned(1))
    for _ in range(3):
        await turns(2)
        waiting.cancel()
    await turns(3)
    assert not waiting.done()
    lanes.stop(1)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await lanes.loans.returned(1)


async def test_a_cancellation_in_the_turn_in_which_it_is_back():
    lanes = Lanes(1)
    waiting = asyncio.create_task(lanes.loans.returned(1))
    await turns(2)
    lanes.stop(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_timeout_is_told_as_one():
    lanes = Lanes(1)
    asyncio.get_running_loop().call_later(0.03, lanes.stop, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lanes.loans.returned(1), 0.01)
    assert not lanes.reading


async def test_the_end_gives_everything_back():
    lanes = Lanes(1, 2)
    waiting = [asyncio.create_task(lanes.loans.returned(i)) for i in (1, 2, 2)]
    await turns(2)
    waiting[0].cancel()
    lanes.loans.end()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]
    await lanes.loans.returned(1)
    lanes.loans.settle(2)
    lanes.loans.end()
