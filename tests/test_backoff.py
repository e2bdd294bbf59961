"""How a silo finds a server: when it tries again, when it does not, and when it gives up. No time passes here."""

import asyncio
import math
from typing import Any

import pytest

import aiordma
from fedllm import Backoff, JoinRefused, ServerLost, SettingError
from fedllm.messages import Join, Refused, Welcome
from tests.federation import FINGERPRINT, QUICK, Log, joining, running, server_of

pytestmark = pytest.mark.usefixtures("no_leaks")


class Naps:
    """A `sleep` that does not, but writes down how long, and may do something else."""

    def __init__(self, *then: Any) -> None:
        self.seconds: list[float] = []
        self._then = list(then)

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self._then:
            await self._then.pop(0)()
        await asyncio.sleep(0)


def whole(naps: Naps, patience_s: float = 10.0) -> Backoff:
    """Without chance: 1, 2, 4, 4, ... seconds."""
    return Backoff(first_s=1, most_s=4, patience_s=patience_s, jitter=lambda: 1.0, sleep=naps)


def test_pauses_double_up_to_the_longest_and_end_with_patience():
    assert list(whole(Naps()).pauses()) == [1, 2, 4, 3]
    lowest = Backoff(first_s=1, most_s=4, patience_s=3, jitter=lambda: 0.0)
    assert list(lowest.pauses()) == [0.5, 1, 1.5]
    for_ever = Backoff(patience_s=math.inf, jitter=lambda: 1.0).pauses()
    assert [next(for_ever) for _ in range(9)][-1] == 30
    random = Backoff(first_s=8, most_s=8, patience_s=800)
    pauses = list(random.pauses())[:-1]
    assert all(4 <= pause <= 8 for pause in pauses)
    assert len(set(pauses)) > 50


@pytest.mark.parametrize("wrong", [{"first_s": 0}, {"patience_s": -1}, {"first_s": 9, "most_s": 8}])
def test_a_backoff_that_cannot_work_is_refused(wrong: dict[str, float]):
    with pytest.raises(SettingError, match=next(reversed(wrong))):
        Backoff(**wrong)  # type: ignore[arg-type]


async def test_a_server_that_never_comes_is_given_up_with_what_was_wrong():
    async with aiordma.listen() as listener:
        address = listener.address
    naps, said = Naps(), list[str]()
    with pytest.raises(aiordma.ConnectError, match="refused"):
        async with joining(address, "a", backoff=whole(naps), on_event=said.append):
            pass
    assert naps.seconds == [1, 2, 4, 3]
    assert [line.rpartition("; ")[2] for line in said] == [
        f"trying again in {pause}.0 s" for pause in (1, 2, 4, 3)
    ]


async def test_a_server_that_comes_late_is_found():
    async with aiordma.listen(config=QUICK) as listener:
        address = listener.address
    server = server_of(Log())

    async def come() -> None:
        await server.start(*address)

    async def not_yet() -> None:
        assert server.silos == ()

    naps = Naps(not_yet, come)
    async with server, joining(address, "a", backoff=whole(naps)) as silo:
        assert silo.total_rounds == 1
        assert naps.seconds == [1, 2]


async def test_a_final_refusal_is_not_asked_twice_and_another_is():
    naps = Naps()
    async with running(Log()) as (address, _):
        with pytest.raises(JoinRefused, match="not the same weights") as info:
            async with joining(
                address, "a", backoff=whole(naps), fingerprint={**FINGERPRINT, "weights": "other"}
            ):
                pass
    assert (info.value.is_final, naps.seconds) == (True, [])
    async with aiordma.listen(config=QUICK) as listener:

        async def refuse_once() -> None:
            for answer in (Refused("it was slow", is_final=False), Welcome("run", 1, 1)):
                async with await listener.accept() as channel:
                    await channel.recv(Join)
                    await channel.send(answer)
                    await left.wait() if isinstance(answer, Welcome) else None

        left = asyncio.Event()
        serving = asyncio.ensure_future(refuse_once())
        async with joining(listener.address, "a", backoff=whole(naps)) as silo:
            assert silo.run == "run"
            left.set()
        await serving
    assert naps.seconds == [1]


async def test_a_lost_server_is_looked_for_after_a_pause_and_given_up_as_lost():
    naps = Naps()
    async with aiordma.listen(config=QUICK) as listener:

        async def die() -> None:
            async with await listener.accept() as channel:
                await channel.recv(Join)
                await channel.send(Welcome("run", 1, 1))
            await listener.aclose()

        dying = asyncio.ensure_future(die())
        async with joining(listener.address, "a", backoff=whole(naps)) as silo:
            await dying
            with pytest.raises(ServerLost, match="was lost, and did not come back: cannot connect"):
                await anext(silo.rounds())
            assert naps.seconds == [1, 2, 4, 3]
            with pytest.raises(ServerLost):  # asked anew, it looks anew
                await anext(silo.rounds())
            assert len(naps.seconds) == 8


async def test_a_server_of_another_protocol_is_not_looked_for_again():
    naps = Naps()
    async with aiordma.listen(config=QUICK) as listener:

        async def talk_nonsense() -> None:
            async with await listener.accept() as channel:
                await channel.recv(Join)
                await channel.send(Welcome("run", 1, 1))
                await channel.send({"type": "Gibberish"})
                await left.wait()

        left = asyncio.Event()
        talking = asyncio.ensure_future(talk_nonsense())
        async with joining(listener.address, "a", backoff=whole(naps)) as silo:
            with pytest.raises(ServerLost, match="speaks another protocol"):
                await anext(silo.rounds())
            left.set()
        await talking
    assert naps.seconds == []
