"""A round that is tried again: who is asked the next time, who is out, and what the server says of it."""

import asyncio
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from aiordma import Channel, ChannelBroken, ChannelClosed, PeerTimeout, RemoteProtocolError
from fedllm import Outcome, QuorumNotReached, RunFailed, Status
from fedllm.membership import choose
from fedllm.messages import FROM_SERVER, Goodbye
from fedllm.tries import FIRST_PAUSE_S, MOST_PAUSE_S, Tries
from tests.federation import DEADLINE_S, QUICK, Log, joining, raw, running
from tests.harness import cancel
from tests.playing import LARGE, Behaviour, be_asked, begin_upload
from tests.test_round_faults import send_a_huge_meta

pytestmark = pytest.mark.usefixtures("no_leaks")

FAULTS: list[tuple[Status, Exception | None]] = [
    (Status.REFUSED, None),
    (Status.LATE, None),
    (Status.LATE, TimeoutError()),
    (Status.FAILED, PeerTimeout()),
    (Status.FAILED, RemoteProtocolError("")),
]


@pytest.mark.parametrize(("status", "error"), FAULTS)
def test_who_fails_twice_is_out(status: Status, error: Exception | None):
    tries = Tries(2)
    fault, fine = Outcome(status=status, error=error), Outcome(status=Status.ABANDONED)
    tries.note({"a": fine, "c": fault})
    assert tries.worth_asking("abc") == set("abc")
    tries.note({"a": fine, "c": fault})
    assert tries.out == {"c"}
    assert tries.worth_asking("abc") == set("ab")
    assert not tries.is_hopeless("abc")
    assert tries.is_hopeless("ac")
    assert tries.pause_s("abc") == 0


@pytest.mark.parametrize("error", [ChannelBroken(), ChannelClosed()])
def test_who_dies_each_time_is_asked_if_the_others_are_too_few_and_after_growing_pauses(
    error: Exception,
):
    tries = Tries(2)
    pauses = []
    for _ in range(100):
        tries.note(
            {"a": Outcome(status=Status.ABANDONED), "c": Outcome(status=Status.FAILED, error=error)}
        )
        pauses.append(tries.pause_s("ac"))
    assert tries.out == set()
    assert tries.worth_asking("abc") == set("ab")
    assert tries.worth_asking("ac") == set("ac")
    assert tries.left("abc") == set("abc")
    assert tries.pause_s("abc") == 0
    assert pauses[:4] == [0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == MOST_PAUSE_S
    assert not tries.is_hopeless("ac")


@pytest.mark.parametrize(
    ("breaks", "limit_s", "patience_s"),
    [
        (0, None, None),
        (1, 4.0, None),
        (2, None, FIRST_PAUSE_S),
        (3, None, 2 * FIRST_PAUSE_S),
        (99, None, MOST_PAUSE_S),
        (99, 4.0, 2.0),
        (2, 4.0, FIRST_PAUSE_S),
    ],
)
def test_busy_silos_are_waited_for_until_one_that_died_each_time_is_worth_it(
    breaks: int, limit_s: float | None, patience_s: float | None
):
    tries = Tries(2)
    for _ in range(breaks):
        tries.note({"c": Outcome(status=Status.FAILED, error=ChannelBroken())})
    assert tries.patience_s(limit_s) == patience_s


# In runs


async def train(
    address: tuple[str, int], name: str, trained: list[int], gate: Callable[[], Any] | None = None
) -> None:
    async with joining(address, name) as silo:
        async for task in silo.rounds():
            trained.append(task.round)
            if gate is not None:
                await gate()
            await task.submit(task.weights, weight=1)


async def misbehave_twice(address: tuple[str, int], log: Log, act: Behaviour) -> None:
    """A silo that does something to its channel when it is asked, and comes back."""
    for times in (1, 2):
        async with await raw(address, "c") as channel:
            await act(channel)
        while sum("c gone: " in line for line in log.lines) < times:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)


async def hang_up(channel: Channel) -> None:
    await channel.recv(FROM_SERVER)


async def stall(channel: Channel) -> None:
    """As a process does that was stopped: nothing is sent any more, not even what answers."""
    task, attempt = await be_asked(channel)
    sending = await begin_upload(channel, task, attempt)
    channel._link.flush = lambda: None  # type: ignore[method-assign]
    channel._link.session.sender.next = lambda lane: None  # type: ignore[method-assign]
    with pytest.raises(ChannelBroken):
        await sending


@pytest.mark.usefixtures("loop_kind")
async def test_a_quorum_of_others_does_not_wait_for_who_dies_each_time():
    """Of three the choice falls upon "c", which is back each time before the next try."""
    log, trained = Log(), list[int]()
    options = {"min_silos": 2, "expect": 3, "fraction": 0.6}
    assert "c" in choose("abc", round=1, seed=0, fraction=0.6, at_least=2)

    async def until_it_is_back() -> None:
        tries = log.lines.count("c joined")
        if tries < 3:
            await log.until(lambda log: log.lines.count("c joined") > tries)

    async def die_twice(address: tuple[str, int]) -> None:
        await misbehave_twice(address, log, hang_up)
        async with await raw(address, "c") as channel:
            assert isinstance(await channel.recv(FROM_SERVER), Goodbye)

    async with running(log, **options) as (address, run), asyncio.timeout(10):
        good = (train(address, name, trained, until_it_is_back) for name in "ab")
        await asyncio.gather(die_twice(address), *good, run)
    assert list(log.rounds[0].outcomes) == ["a", "b"]
    assert trained == [1] * 4


@pytest.mark.usefixtures("loop_kind")
async def test_a_quorum_with_who_died_each_time_is_used_while_others_are_busy_for_good(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fedllm.tries.FIRST_PAUSE_S", 0.01)
    log, trained = Log(), list[int]()

    async def die_twice_and_come_back(address: tuple[str, int]) -> None:
        await misbehave_twice(address, log, hang_up)
        await train(address, "c", trained)

    options = {"min_silos": 2, "expect": 3, "train_deadline_s": DEADLINE_S}
    async with running(log, **options) as (address, run), asyncio.timeout(10):
        busy = asyncio.ensure_future(train(address, "b", [], asyncio.Event().wait))
        try:
            good = train(address, "a", trained)
            await asyncio.gather(good, die_twice_and_come_back(address), run)
        finally:
            await cancel(busy)
    assert list(log.rounds[0].outcomes) == ["a", "c"]
    assert trained == [1] * 4
    assert "b caught up" not in log.lines


@pytest.mark.usefixtures("loop_kind")
@pytest.mark.parametrize(
    ("act", "says"), [(send_a_huge_meta, "a control frame of"), (stall, "said nothing for")]
)
async def test_who_breaks_the_protocol_or_stalls_twice_is_out(act: Behaviour, says: str):
    log, trained = Log(), list[int]()
    large = {name: array.copy() for name, array in LARGE.items()}
    config = dataclasses.replace(QUICK, idle_timeout_s=0.4)
    options: dict[str, Any] = {"min_silos": 2, "weights": large, "config": config}
    async with running(log, **options) as (address, run), asyncio.timeout(20):
        good = asyncio.ensure_future(train(address, "a", trained))
        bad = asyncio.ensure_future(misbehave_twice(address, log, act))
        with pytest.raises(QuorumNotReached, match=f"1 of 2 silos are left.*{says}"):
            await run
        with pytest.raises(RunFailed):
            await good
        await bad
    assert trained == [1, 1]


async def test_the_server_says_why_a_try_failed():
    log = Log()

    async def spoil_once(address: tuple[str, int]) -> None:
        async with joining(address, "bad") as silo:
            spoils = math.nan
            async for task in silo.rounds():
                await task.submit(
                    {n: a + a.dtype.type(spoils) for n, a in task.weights.items()}, weight=1
                )
                spoils = 0

    async with running(log, min_silos=2) as (address, run), asyncio.timeout(10):
        await asyncio.gather(spoil_once(address), train(address, "a", []), run)
    assert [line for line in log.lines if "round" in line] == [
        "bad refused in round 1: receiving the update: tensor 'w' holds nan at [0, 0]"
    ]
