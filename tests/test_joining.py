"""Who is admitted to a run: fingerprints, names, peers that say nothing or nonsense, and servers that are none."""

import asyncio

import pytest

import aiordma
from fedllm import Backoff, JoinRefused, ServerLost, SettingError
from fedllm.messages import JOIN_ANSWER, Join, Refused
from tests.federation import DEADLINE_S, FINGERPRINT, QUICK, Log, joining, raw, running, take_part

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"tokenizer": "sha256:xx"},
            "not the same tokenizer: the server has sha256:bb, the silo sha256:xx; both need the same base",
        ),
        ({"adapter": ""}, "not the same adapter: the server has sha256:cc, the silo"),
        ({"layers": "7"}, "not the same layers: the server has none, the silo 7"),
        ({"weights": "1", "tokenizer": "2"}, "not the same tokenizer: .*; not the same weights: "),
    ],
)
async def test_another_fingerprint_is_refused_and_says_which(change: dict[str, str], says: str):
    log = Log()
    async with running(log) as (address, run):
        with pytest.raises(JoinRefused, match=says) as info:
            async with joining(address, "a", fingerprint={**FINGERPRINT, **change}):
                pass
        assert log.lines == [f"a refused: {info.value.reason}"]
        lacking = {key: FINGERPRINT[key] for key in ("weights", "tokenizer")}
        with pytest.raises(JoinRefused, match=r"not the same adapter: .* the silo none"):
            async with joining(address, "a", fingerprint=lacking):
                pass
        await take_part(address, "a", 1)
        await run


async def test_a_name_is_one_silos_as_long_as_it_is_there():
    log = Log()
    async with running(log, min_silos=2) as (address, run):
        first = await raw(address, "a")
        taken = "the name 'a' is in use by a silo that is there"
        with pytest.raises(JoinRefused, match=taken) as info:
            async with joining(address, "a"):
                pass
        assert info.value.is_final
        await first.aclose()
        again = asyncio.ensure_future(take_part(address, "a", 1))
        await log.until(lambda log: log.lines.count("a joined") == 2)
        await asyncio.gather(again, take_part(address, "b", 1), run)
    assert [report.accepted for report in again.result()[1]] == [True]


async def test_a_silo_that_comes_back_while_its_old_connection_is_half_dead_gets_in_later(
    monkeypatch: pytest.MonkeyPatch,
):
    """Who does not answer may be gone, or hold its interpreter's lock: it keeps its name, for now."""
    monkeypatch.setattr("fedllm.membership.PING_TIMEOUT_S", 0.02)
    log, said = Log(), list[str]()
    heard = asyncio.Event()

    def hear(line: str) -> None:
        said.append(line)
        heard.set()

    async def come_back(address: tuple[str, int]) -> None:
        backoff = Backoff(first_s=0.01, most_s=0.01, patience_s=10.0)
        async with joining(address, "a", backoff=backoff, on_event=hear) as silo:
            async for task in silo.rounds():
                assert (await task.submit(task.weights, weight=1)).accepted

    async def old_one_ends(old: aiordma.Channel) -> None:
        await heard.wait()
        assert "the name 'a' is in use by a silo that has not answered for 0.02 s" in said[0]
        assert "a joined" in log.lines
        assert not any(line.startswith("a gone") for line in log.lines)
        old._link._control.abort()

    async with running(log, min_silos=2) as (address, run), asyncio.timeout(10):
        async with await raw(address, "a") as old:
            old._link._control._transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.TaskGroup() as group:
                group.create_task(come_back(address))
                group.create_task(old_one_ends(old))
                group.create_task(take_part(address, "b", 1))
                await run
    assert log.lines.count("a joined") == 2


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "../a", "a\n"])
async def test_a_name_that_is_none_is_refused_at_either_end(name: str):
    async with running(Log()) as (address, run):
        with pytest.raises(SettingError, match=r"no server takes .*Expected `str`.* `\$.name`"):
            async with joining(address, name):
                pass
        async with aiordma.connect(*address, config=QUICK) as channel:
            await channel.send(Join(name, FINGERPRINT))
            answer = await channel.recv(JOIN_ANSWER)
            assert answer.reason.startswith("this is no valid request to join: ")
        await take_part(address, "a", 1)
        await run


async def test_a_peer_that_says_nothing_times_out_alone():
    log = Log()
    async with running(log, join_timeout_s=DEADLINE_S) as (address, run):
        async with aiordma.connect(*address, config=QUICK) as silent:
            answer = await silent.recv(JOIN_ANSWER)
            assert answer == Refused("it did not say who it is within 0.3 s", is_final=False)
            with pytest.raises(aiordma.ChannelClosed):
                await silent.recv()
            await take_part(address, "a", 1)
            await run
    assert any("refused: it did not say who it is" in line for line in log.lines)


async def test_a_peer_that_joins_with_nonsense_is_refused():
    async with running(Log()) as (address, run), aiordma.connect(*address, config=QUICK) as channel:
        await channel.send({"hello": 1})
        answer = await channel.recv(JOIN_ANSWER)
        assert answer.reason.startswith("this is no valid request to join")
        await take_part(address, "a", 1)
        await run


async def test_a_server_that_says_nothing_is_given_up():
    async with aiordma.listen(config=QUICK) as listener:
        accepting = asyncio.ensure_future(listener.accept())
        with pytest.raises(ServerLost, match=r"did not answer the join within 0.3 s"):
            async with joining(listener.address, "a", timeout_s=DEADLINE_S):
                pass
        await (await accepting).aclose()


async def test_no_server_at_all_is_aiordmas_error():
    async with aiordma.listen() as listener:
        address = listener.address
    with pytest.raises(aiordma.ConnectError):
        async with joining(address, "a"):
            pass
