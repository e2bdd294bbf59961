"""A server and its silos over loopback: joining, runs of rounds, leaving, dying, coming back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import (
    FedError,
    History,
    JoinRefused,
    QuorumNotReached,
    Report,
    RoundResult,
    RunFailed,
    Server,
    ServerLost,
    SettingError,
    Silo,
    Status,
    WeightsError,
    join,
)
from fedllm.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fedllm.messages import FROM_SERVER, JOIN_ANSWER, Join, Ready, Refused, Upload, Welcome

pytestmark = pytest.mark.usefixtures("no_leaks")

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


@asynccontextmanager
async def running(
    log: Log, **options: Any
) -> AsyncIterator[tuple[tuple[str, int], asyncio.Task[History]]]:
    """A server that runs: its address, and the task that returns its history."""
    options = {"min_silos": 1, "rounds": 1, "fingerprint": FINGERPRINT, **options}
    options = {"on_round": log.round, "on_silo": log.silo, "config": QUICK, **options}
    server = Server(weights_of(0), **options)
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
    options = {"fingerprint": FINGERPRINT, "config": QUICK, **options}
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


async def test_a_run_of_rounds_ends_with_the_same_weights_everywhere():
    log = Log()
    async with running(log, rounds=3, min_silos=2, expect=3) as (address, run):
        silos = [take_part(address, name, adds) for name, adds in (("c", 3), ("a", 1), ("b", 2))]
        ended = await asyncio.gather(*silos)
        history = await run
    for name, array in weights_of(6).items():
        assert history.weights[name].dtype == array.dtype
        assert history.weights[name].tobytes() == array.tobytes()
        for silo, _ in ended:
            assert silo.final is not None
            assert silo.final[name].tobytes() == array.tobytes()
    assert [[report.accepted for report in reports] for _, reports in ended] == [[True] * 3] * 3
    assert [record.round for record in history.rounds] == [1, 2, 3]
    assert [result.round for result in log.rounds] == [1, 2, 3]
    assert list(history.rounds[0].outcomes) == ["a", "b", "c"]
    assert [record.metrics["loss"] for record in history.rounds] == [1, 1 / 2, 1 / 3]
    assert {silo.run for silo, _ in ended} == {ended[0][0].run}
    assert ended[0][0].total_rounds == 3


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
        with pytest.raises(JoinRefused, match="the name 'a' is in use by a silo that is there"):
            async with joining(address, "a"):
                pass
        await first.aclose()
        again = asyncio.ensure_future(take_part(address, "a", 1))
        await log.until(lambda log: log.lines.count("a joined") == 2)
        await asyncio.gather(again, take_part(address, "b", 1), run)
    assert [report.accepted for report in again.result()[1]] == [True]


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
            assert answer == Refused("it did not say who it is within 0.3 s")
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


async def test_who_joins_during_a_round_takes_part_from_the_next():
    log, gate = Log(), asyncio.Event()
    async with running(log, rounds=2) as (address, run):
        first = asyncio.ensure_future(take_part(address, "a", 1, gate=gate))
        await log.has("a joined")
        second = asyncio.ensure_future(take_part(address, "b", 3))
        await log.has("b joined")
        gate.set()
        await asyncio.gather(first, second, run)
    assert [list(result.outcomes) for result in log.rounds] == [["a"], ["a", "b"]]
    assert log.rounds[-1].weights["w"][0, 0] == 1 + (1 + 3) / 2


async def test_who_was_late_is_left_out_until_it_has_caught_up():
    log, gate = Log(), asyncio.Event()

    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        if result.round == 2:
            gate.set()
            await log.has("slow caught up")

    options = {"rounds": 3, "expect": 2, "deadline_s": DEADLINE_S, "on_round": on_round}
    async with running(log, **options) as (address, run):
        slow = asyncio.ensure_future(take_part(address, "slow", 1, gate=gate))
        await asyncio.gather(slow, take_part(address, "quick", 1), run)
    committed, late = Status.COMMITTED, Status.LATE
    assert [{name: o.status for name, o in result.outcomes.items()} for result in log.rounds] == [
        {"quick": committed, "slow": late},
        {"quick": committed},
        {"quick": committed, "slow": committed},
    ]
    reason = "READY did not come within 0.3 s"
    assert [(report.accepted, report.reason) for report in slow.result()[1]] == [
        (False, reason),
        (True, ""),
    ]


async def test_who_is_late_at_the_end_hears_that_the_run_is_over():
    log, gate = Log(), asyncio.Event()
    async with running(log, expect=2, deadline_s=DEADLINE_S) as (address, run):
        slow = asyncio.ensure_future(take_part(address, "slow", 1, gate=gate))
        await asyncio.gather(take_part(address, "quick", 1), run)
        gate.set()
        silo, reports = await slow
    assert [report.accepted for report in reports] == [False]
    assert silo.final is None


async def test_a_round_that_lost_a_silo_is_tried_again_when_it_is_back():
    log = Log()
    async with running(log, rounds=2, min_silos=2) as (address, run):
        other = asyncio.ensure_future(take_part(address, "b", 2))
        dying = await raw(address, "a")
        await dying.recv(FROM_SERVER)
        await dying.aclose()
        await log.has("a gone: ")
        back = await take_part(address, "a", 4)
        await run
        _, reports = await other
    assert [report.accepted for report in back[1]] == [True, True]
    assert [report.accepted for report in reports] == [False, True, True]
    assert "1 of 2 silos are left, and 2 are needed" in reports[0].reason
    assert [result.round for result in log.rounds] == [1, 2]
    assert log.rounds[-1].weights["w"][0, 0] == 6


async def test_a_silo_that_died_is_no_loss_while_there_is_a_quorum():
    log = Log()
    handlers: list[int] = []

    async def on_round(result: RoundResult) -> None:
        await log.round(result)
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        handlers.append(names.count("Server._handle"))

    async with running(log, rounds=2, expect=2, on_round=on_round) as (address, run):
        dying = await raw(address, "a")
        other = asyncio.ensure_future(take_part(address, "b", 2))
        await dying.recv(FROM_SERVER)
        await dying.aclose()
        await asyncio.gather(other, run)
    assert handlers[-1] == 1
    assert log.rounds[0].outcomes["a"].status is Status.FAILED
    assert list(log.rounds[1].outcomes) == ["b"]


async def test_a_run_whose_silos_stay_away_fails_and_says_so():
    log = Log()
    options = {"min_silos": 2, "absence_timeout_s": DEADLINE_S}
    async with running(log, **options) as (address, run):
        with pytest.raises(RunFailed, match=r"1 silos were there within 0.3 s, and 2 are needed"):
            await take_part(address, "a", 1)
        with pytest.raises(QuorumNotReached, match=r"1 silos were there within 0.3 s"):
            await run


async def test_a_run_whose_silos_are_all_late_fails_and_says_so():
    gate = asyncio.Event()
    async with running(Log(), deadline_s=DEADLINE_S) as (address, run):
        slow = asyncio.ensure_future(take_part(address, "slow", 1, gate=gate))
        with pytest.raises(QuorumNotReached, match="0 of 1 silos are left") as info:
            await run
        gate.set()
        with pytest.raises(RunFailed, match="0 of 1 silos are left"):
            await slow
    assert info.value.outcomes["slow"].status is Status.LATE


async def test_a_server_that_stops_is_lost_to_its_silos():
    async with running(Log(), expect=2) as (address, run):
        gate = asyncio.Event()
        training = asyncio.ensure_future(take_part(address, "a", 1, gate=gate))
        async with joining(address, "b") as idle:
            waiting = asyncio.ensure_future(anext(idle.rounds()))
            task = await waiting
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            with pytest.raises(ServerLost, match="the connection to the server is gone"):
                await task.submit(task.weights, weight=1)
        gate.set()
        with pytest.raises(ServerLost):
            await training


async def test_a_server_that_dies_while_it_sends_the_weights_is_lost():
    async with aiordma.listen(config=QUICK) as listener:

        async def die() -> None:
            async with await listener.accept() as channel:
                await channel.recv(Join)
                await channel.send(Welcome("run", 1, 1))
                await channel.send({"type": "Task", "round": 1, "ticket": 1, "arguments": {}})

        dying = asyncio.ensure_future(die())
        async with joining(listener.address, "a") as silo:
            with pytest.raises(ServerLost):
                await anext(silo.rounds())
        await dying


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


async def test_a_task_that_is_passed_over_is_declined():
    log = Log()
    async with running(log, rounds=1, min_silos=1, expect=2) as (address, run):

        async def pass_over() -> None:
            async with joining(address, "picky") as silo:
                async for task in silo.rounds():
                    assert task.round == 1

        await asyncio.gather(pass_over(), take_part(address, "a", 1), run)
    outcome = log.rounds[0].outcomes["picky"]
    assert outcome.status is Status.REFUSED
    assert "declined: no update was submitted" in outcome.reason


async def test_a_task_that_was_left_is_declined_by_who_asks_for_rounds_anew():
    log = Log()
    async with running(log, rounds=2, min_silos=1, expect=2) as (address, run):

        async def stumble() -> None:
            async with joining(address, "clumsy") as silo:
                async for _ in silo.rounds():
                    break  # or training that raised
                async for task in silo.rounds():
                    assert (await task.submit(task.weights, weight=1)).accepted

        async with asyncio.timeout(10):
            await asyncio.gather(stumble(), take_part(address, "a", 1), run)
    statuses = [result.outcomes["clumsy"].status for result in log.rounds]
    assert statuses == [Status.REFUSED, Status.COMMITTED]


async def test_an_update_that_cannot_be_sent_can_be_mended():
    async with running(Log()) as (address, run), joining(address, "a") as silo:
        async for task in silo.rounds():
            with pytest.raises(aiordma.TensorError, match="'w' is not contiguous"):
                await task.submit({**task.weights, "w": task.weights["w"].T}, weight=1)
            assert (await task.submit(task.weights, weight=1)).accepted
            with pytest.raises(FedError, match="submitted already"):
                await task.submit(task.weights, weight=1)
        await run


async def test_figures_may_be_any_kind_of_number():
    log = Log()
    figures: dict[str, Any] = {"loss": np.float32(0.5), "accuracy": np.mean([0.25]), "steps": 3}
    async with running(log) as (address, run), joining(address, "a") as silo:
        async for task in silo.rounds():
            for wrong in ({"loss": "low"}, {"x" * 65: 1.0}, {str(n): 1.0 for n in range(257)}):
                with pytest.raises(SettingError, match="must be numbers by short names"):
                    await task.submit(task.weights, weight=1, metrics=wrong)  # type: ignore[arg-type]
            report = await task.submit(
                task.weights, weight=np.int64(2), metrics=figures, norm=np.float32(1.5)
            )
            assert report.accepted
        await run
    assert log.rounds[0].metrics == {"accuracy": 0.25, "loss": 0.5, "steps": 3.0}
    assert log.rounds[0].outcomes["a"].norm == 1.5


async def drain(chunks: AsyncIterator[aiordma.Chunk]) -> None:
    async for chunk in chunks:
        chunk.release()


@pytest.mark.parametrize("stage", ["ready", "uploading"])
async def test_a_cancelled_submit_gives_the_upload_up(stage: str):
    """The silo can go on with the next task afterwards."""
    async with aiordma.listen(config=QUICK) as listener:
        accepting = asyncio.ensure_future(listener.accept())

        async with aiordma.connect(*listener.address, config=QUICK) as channel:
            server = await accepting
            silo = Silo(channel, "a", Welcome("run", 1, 1))
            tasks = silo.rounds()
            large = {"w": np.zeros(1 << 20, np.float32)}
            for ticket in (1, 2):
                first = asyncio.ensure_future(anext(tasks))
                wire = {"type": "Task", "round": 1, "ticket": ticket, "arguments": {}}
                await server.send(wire)
                await server.send_tensors(weights_of(0), meta={"ticket": ticket, "attempt": 0})
                task = await first
                submitting = asyncio.ensure_future(task.submit(large, weight=1))
                assert (await server.recv(Ready)).ticket == ticket
                if stage == "uploading":
                    await server.send(Upload(ticket, 1))
                    async with contextlib.aclosing(server.incoming()) as transfers:
                        transfer = await anext(transfers)
                    async with contextlib.aclosing(transfer.chunks()) as chunks:
                        (await anext(chunks)).release()
                        submitting.cancel()
                        with pytest.raises(aiordma.TransferAborted):
                            await drain(chunks)
                submitting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await submitting
            await tasks.aclose()
            await silo.aclose()
            await server.aclose()


async def test_settings_that_cannot_work_are_refused_at_once():
    wrong: tuple[dict[str, Any], ...] = (
        {"min_silos": 0},
        {"rounds": 0},
        {"rounds": True},
        {"min_silos": 3, "expect": 2},
        {"deadline_s": -1},
        {"absence_timeout_s": float("inf")},
        {"join_timeout_s": 0},
    )
    for options in wrong:
        with pytest.raises(SettingError, match=next(reversed(options))):
            Server(weights_of(0), **{"fingerprint": {}, "min_silos": 1, "rounds": 1, **options})
    with pytest.raises(WeightsError, match="'step'"):
        Server({"step": np.zeros(1, np.int64)}, fingerprint={}, min_silos=1, rounds=1)
    server = Server(weights_of(0), fingerprint={}, min_silos=1, rounds=1)
    with pytest.raises(FedError, match="start"):
        _ = server.address
    async with server:
        await server.start()
        assert server.silos == ()
        with pytest.raises(FedError, match="already"):
            await server.start()


async def test_what_a_callback_raises_ends_the_run():
    async def on_round(result: RoundResult) -> None:
        raise ZeroDivisionError

    async with running(Log(), on_round=on_round) as (address, run):
        with pytest.raises(ServerLost):
            await take_part(address, "a", 1)
        with pytest.raises(ZeroDivisionError):
            await run


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    folder = tmp_path / "new"
    for value in (1, 2):
        written = save_checkpoint(folder, "round-1", weights_of(value), {"round": value})
    assert written == folder / "round-1.json"
    weights, state = load_checkpoint(folder, "round-1")
    assert state == {"round": 2}
    for name, array in weights_of(2).items():
        assert (weights[name].dtype, weights[name].tobytes()) == (array.dtype, array.tobytes())
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    save_checkpoint(tmp_path, "a", weights_of(1), {"round": 1})
    for weights, state in ((weights_of(2), {"x": object()}), ({"w": np.ones(2, "c16")}, {})):
        with pytest.raises(CheckpointError, match="'a' cannot be written"):
            save_checkpoint(tmp_path, "a", weights, state)
    weights, state = load_checkpoint(tmp_path, "a")
    assert (state, weights["w"][0, 0]) == ({"round": 1}, 1)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"'b' in .* cannot be read"):
        load_checkpoint(tmp_path, "b")
