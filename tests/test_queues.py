"""The queue and the gate: nothing is lost, nothing is spent for nothing, wherever tasks are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aiordma.errors import ChannelClosed, TensorError
from aiordma.queues import Fifo, Gate
from aiordma.wire.credit import SendWindow

ticks = st.booleans()  # whether the loop turns after the step
steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "put", "snatch", "cancel"]), st.integers(0, 2), ticks
    ),
    min_size=10,
    max_size=40,
)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """On a loop of its own, with no look at the environment; a hypothesis test cannot be `async`."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(coroutine)


async def turn() -> None:
    """Let everything run that can."""
    for _ in range(4):
        await asyncio.sleep(0)


def cancel_one(tasks: list[asyncio.Task[Any]], n: int) -> None:
    """Cancel one of those that wait, the first ones rather."""
    waiting = [task for task in tasks if not task.done()]
    if waiting:
        waiting[n % len(waiting)].cancel()


def outcome(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """What the tasks got that were not cancelled."""
    return [task.result() for task in tasks if task.done() and not task.cancelled()]


# Fifo


async def test_items_come_in_order_to_takers_in_order() -> None:
    fifo: Fifo[int] = Fifo()
    fifo.put(0)
    fifo.put(1)
    tasks = [asyncio.create_task(fifo.take()) for _ in range(4)]
    await turn()
    assert (len(fifo), fifo.waiting) == (0, 2)
    fifo.put(2)
    fifo.put(3)
    fifo.put(4)
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
    assert (len(fifo), fifo.waiting) == (1, 0)
    fifo.put_back(3)
    assert [await fifo.take(), await fifo.take()] == [3, 4]


@given(steps)
def test_cancelled_takers_lose_no_item_and_no_order(steps: Any) -> None:
    run(_cancelled_takers(steps))


async def _cancelled_takers(steps: list[tuple[str, int, bool]]) -> None:
    accepted: list[int] = []
    waiting: list[int] = []

    def undo(item: int) -> bool:
        accepted.remove(item)
        return True

    fifo: Fifo[int] = Fifo(undo=undo, on_waiting=waiting.append)
    tasks: list[asyncio.Task[int]] = []
    put = 0
    for step, n, is_turn in steps:
        if step == "take":
            tasks.append(asyncio.create_task(fifo.take(accepted.append)))
        if step in ("put", "snatch"):
            fifo.put(put)
            put += 1
        if step in ("snatch", "cancel"):  # "snatch": the taker is cancelled with the item in hand
            cancel_one(tasks, n)
        if is_turn:
            await asyncio.sleep(0)
    await turn()
    taken = outcome(tasks)
    assert sorted(taken) == sorted(accepted)
    assert fifo.waiting == fifo.accepting == sum(not task.done() for task in tasks)
    assert (waiting[-1] if waiting else 0) == fifo.accepting
    left = [await fifo.take() for _ in range(len(fifo))]
    assert sorted(taken + left) == list(range(put)), "lost or doubled"
    assert left == sorted(left), "out of order"
    assert not (left and fifo.waiting), "a taker waits though there is something"
    for task in tasks:
        task.cancel()
    await turn()
    assert fifo.waiting == 0
    assert not waiting or waiting[-1] == 0


async def test_two_takers_cancelled_with_items_in_hand_keep_the_order() -> None:
    fifo: Fifo[str] = Fifo()
    tasks = [asyncio.create_task(fifo.take()) for _ in range(2)]
    await turn()
    fifo.put("first")
    fifo.put("second")
    fifo.put("third")
    for task in tasks:
        task.cancel()
    await turn()
    assert len(fifo) == 3
    assert [await fifo.take() for _ in range(3)] == ["first", "second", "third"]


async def test_an_item_that_cannot_be_taken_back_is_gone() -> None:
    fifo: Fifo[int] = Fifo(undo=lambda item: False)
    task = asyncio.create_task(fifo.take())
    await turn()
    fifo.put(1)
    fifo.put(2)
    task.cancel()
    await turn()
    assert await fifo.take() == 2


@pytest.mark.parametrize("is_early", [True, False])
async def test_what_a_taker_does_not_accept_stays_first(is_early: bool) -> None:
    fifo: Fifo[int] = Fifo()

    def refuse(item: int) -> None:
        raise TensorError(f"{item} does not fit")

    if is_early:
        fifo.put(1)
    picky = asyncio.create_task(fifo.take(refuse))
    await turn()
    easy = asyncio.create_task(fifo.take())
    await turn()
    if not is_early:
        fifo.put(1)
    with pytest.raises(TensorError, match="1 does not fit"):
        await picky
    assert await easy == 1
    assert (len(fifo), fifo.waiting) == (0, 0)


async def test_only_takers_that_accept_want_whatever_comes_next() -> None:
    told: list[int] = []
    fifo: Fifo[int] = Fifo(on_waiting=told.append)
    tasks = [asyncio.create_task(fifo.take(*args)) for args in ([], [told.append], [])]
    await turn()
    assert (fifo.waiting, fifo.accepting, told) == (3, 1, [0, 1, 1])
    fifo.put(7)
    assert (fifo.waiting, fifo.accepting, told) == (2, 1, [0, 1, 1, 1])
    fifo.put(8)
    assert (fifo.waiting, fifo.accepting, told) == (1, 0, [0, 1, 1, 1, 8, 0])
    fifo.put(9)
    assert await asyncio.gather(*tasks) == [7, 8, 9]


async def test_items_that_come_back_are_ordered_by_their_number() -> None:
    fifo: Fifo[int] = Fifo(order=lambda item: item)
    fifo.put(3)
    fifo.put_back(2)
    fifo.put_back(1)
    fifo.put(4)
    assert [await fifo.take() for _ in range(4)] == [1, 2, 3, 4]


async def test_accept_is_called_at_once() -> None:
    fifo: Fifo[int] = Fifo()
    accepted: list[int] = []
    task = asyncio.create_task(fifo.take(accepted.append))
    await turn()
    fifo.put(7)
    assert accepted == [7]
    assert await task == 7


async def test_discarded_items_are_not_taken() -> None:
    fifo: Fifo[int] = Fifo()
    for item in range(4):
        fifo.put(item)
    fifo.discard(lambda item: item % 2 == 0)
    assert [await fifo.take() for _ in range(len(fifo))] == [1, 3]


async def test_after_a_failure_items_come_first_and_then_each_gets_an_error_of_its_own() -> None:
    fifo: Fifo[int] = Fifo()
    tasks = [asyncio.create_task(fifo.take()) for _ in range(2)]
    await turn()
    error = ChannelClosed("over")
    fifo.fail(error)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(e) for e in errors] == ["over"] * 2
    assert len({*map(id, errors), id(error)}) == 3
    fifo.put(1)
    assert await fifo.take() == 1
    with pytest.raises(ChannelClosed, match="over"):
        await fifo.take()


# Gate


gate_steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from([0, 1, 20, 50]), ticks),
        st.tuples(
            st.sampled_from(["grant", "snatch"]), st.sampled_from([0, 1, 5, 60, 61, 62]), ticks
        ),
        st.tuples(st.just("cancel"), st.sampled_from([0, 20, 40]), ticks),
    ),
    min_size=10,
    max_size=40,
)


@given(gate_steps)
def test_cancelled_senders_spend_nothing_and_block_nobody(steps: Any) -> None:
    run(_cancelled_senders(steps))


async def _cancelled_senders(steps: list[tuple[str, int, bool]]) -> None:
    window = SendWindow(2, 50)
    gate = Gate(window)
    order: list[int] = []
    sizes: list[int] = []
    tasks: list[asyncio.Task[None]] = []
    count, nbytes = 2, 50

    async def send(number: int) -> None:
        await gate.enter(sizes[number])
        order.append(number)

    for step, n, is_turn in steps:
        if step == "enter":
            sizes.append(n)
            tasks.append(asyncio.create_task(send(len(tasks))))
        if step in ("grant", "snatch"):
            count, nbytes = count + n % 3, nbytes + n // 3
            window.grant(count, nbytes)
            gate.open()
        if step in ("snatch", "cancel"):
            cancel_one(tasks, n // 20)
        if is_turn:
            await asyncio.sleep(0)
    await turn()
    spent = [sizes[number] for number in order]
    assert len(spent) <= count
    assert sum(spent) <= nbytes
    assert order == sorted(order), "out of turn"
    waiting = [number for number, task in enumerate(tasks) if not task.done()]
    # The window holds exactly what went through: one thing more fits up to the last byte and no further.
    if len(spent) < count:
        assert window.fits(nbytes - sum(spent))
        assert not window.fits(nbytes - sum(spent) + 1)
        assert not waiting or sizes[waiting[0]] > nbytes - sum(spent), "waits though it fits"
    else:
        assert not window.fits(0)
    for task in tasks:
        task.cancel()
    await turn()
    window.grant(count + 1, nbytes)
    if nbytes > sum(spent):
        await asyncio.wait_for(gate.enter(nbytes - sum(spent)), 1)


async def test_a_large_one_that_waits_holds_back_the_small_ones_behind_it() -> None:
    window = SendWindow(9, 10)
    gate = Gate(window)
    await gate.enter(6)
    large = asyncio.create_task(gate.enter(5))
    await turn()
    small = asyncio.create_task(gate.enter(1))
    await turn()
    window.grant(9, 10)  # news that changes nothing
    gate.open()
    await turn()
    assert not small.done()
    large.cancel()
    await turn()
    assert large.cancelled()
    assert small.done()
    assert window.fits(3)
    assert not window.fits(4)


async def test_a_newcomer_does_not_overtake_who_was_just_let_in() -> None:
    window = SendWindow(1, 10)
    gate = Gate(window)
    order: list[str] = []

    async def send(name: str) -> None:
        await gate.enter(1)
        order.append(name)

    await gate.enter(1)
    first = asyncio.create_task(send("first"))
    await turn()
    second = asyncio.create_task(send("second"))  # has not run yet when the gate opens
    window.grant(3, 10)
    gate.open()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]


async def test_who_is_cancelled_when_let_in_gives_the_room_to_the_next() -> None:
    window = SendWindow(1, 10)
    gate = Gate(window)
    await gate.enter(1)
    first, second = (asyncio.create_task(gate.enter(9)) for _ in range(2))
    await turn()
    window.grant(2, 10)
    gate.open()
    first.cancel()
    await turn()
    assert first.cancelled()
    assert second.done()
    assert not window.fits(0)


async def test_a_gate_that_failed_lets_nobody_in() -> None:
    gate = Gate(SendWindow(1, 10))
    await gate.enter(1)
    tasks = [asyncio.create_task(gate.enter(1)) for _ in range(2)]
    await turn()
    error = ChannelClosed("over")
    gate.fail(error)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(e) for e in errors] == ["over"] * 2
    assert len({*map(id, errors), id(error)}) == 3
    with pytest.raises(ChannelClosed, match="over"):
        await gate.enter(0)
