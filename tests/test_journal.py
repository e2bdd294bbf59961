"""A silo's own record of what left it: every line before that of which it tells, and nothing without one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import aiordma
from aiordma import Channel, prepare
from fedllm import Backoff, FedError, JoinRefused, JournalError, Policy, ServerLost, Silo
from fedllm.journal import Journal, digest_of
from fedllm.messages import Commit, Ready, Task, Upload
from tests.federation import FINGERPRINT, QUICK, Log, joining, running, server_of
from tests.harness import cancel, until
from tests.test_checkpoint import files_of_at_most
from tests.test_resume import Die, die_in
from tests.test_sharded_runs import TWO, rank

pytestmark = pytest.mark.usefixtures("no_leaks")


async def take_part(address: tuple[str, int], journal: Path, **options: Any) -> list[bytes]:
    """A silo; the bytes of its updates, tensor after tensor."""
    updates = []
    async with joining(address, "a", journal=journal, **options) as silo:
        async for task in silo.rounds():
            update = {n: a + np.ones((), a.dtype) for n, a in task.weights.items()}
            await task.submit(update, weight=7, metrics={"loss": 0.5})
            updates.append(b"".join(array.tobytes() for array in update.values()))
    return updates


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.usefixtures("loop_kind")
async def test_all_that_leaves_is_there_in_order(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    before = datetime.now(UTC)
    async with running(Log(), rounds=2, arguments={"lr": 0.5}) as (address, run):
        policy = Policy(tells_weight=False)
        _, updates = await asyncio.gather(run, take_part(address, path, policy=policy))
    found = lines(path)
    assert [(line["event"], line.get("message", "")) for line in found] == [
        ("join", ""),
        ("welcome", ""),
        *[
            ("heard", "Task"),
            ("said", "Ready"),
            ("heard", "Upload"),
            ("upload", ""),
            ("uploaded", ""),
            ("heard", "Commit"),
        ]
        * 2,
        ("heard", "Goodbye"),
    ]
    assert {line["silo"] for line in found} == {"a"}
    times = [datetime.fromisoformat(line["time"]) for line in found]
    assert times == sorted(times)
    assert (times[0] - before).total_seconds() > -0.001
    assert found[0]["server"] == f"{address[0]}:{address[1]}"
    assert found[0]["fingerprint"] == FINGERPRINT
    assert found[2]["arguments"] == {"lr": 0.5}
    assert (found[3]["weight"], found[3]["metrics"]) == (None, {"loss": 0.5})
    for number, line in enumerate(line for line in found if line["event"] == "upload"):
        assert (line["round"], line["bytes"]) == (number + 1, len(updates[number]))
        assert line["tensors"] == {"w": ["F32", [5, 3]], "b": ["BF16", [2]]}
        assert line["sha256_at_ready"] == hashlib.sha256(updates[number]).hexdigest()
        assert line["run"] == found[1]["run"]
    ends = [line for line in found if line["event"] == "uploaded"]
    assert [(line["round"], line["acknowledged"]) for line in ends] == [(1, True), (2, True)]
    assert [line["accepted"] for line in found if line.get("message") == "Commit"] == [True] * 2
    assert path.stat().st_mode & 0o777 == 0o600


async def test_ranks_that_share_a_file_say_which_they_are(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    async with running(Log()) as (address, run):
        await asyncio.gather(*(rank(address, shard, 4, journal=path) for shard in TWO), run)
    events = "join welcome heard heard said heard upload uploaded heard heard"
    for number in (0, 1):
        mine = [line["event"] for line in lines(path) if line["rank"] == number]
        assert mine == events.split()


async def test_a_rank_that_is_refused_says_which_it_is(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    async with running(Log()) as (address, _):
        with pytest.raises(JoinRefused):
            await rank(address, TWO[1], 4, journal=path, fingerprint={"weights": "another"})
    assert [(line["event"], line["rank"]) for line in lines(path)] == [("join", 1), ("refused", 1)]


async def test_lines_are_only_ever_added(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "earlier"}\n{"event": "cut sh')
    Journal(path, "a").write("next", number=1)
    assert path.read_bytes().startswith(b'{"event": "earlier"}\n{"event": "cut sh\n{')
    assert json.loads(path.read_bytes().splitlines()[-1])["number"] == 1


@pytest.mark.parametrize(
    "value",
    [msgspec.msgpack.Ext(5, b"x"), b"\xff", {None: 1}, {(1, 2): 3}, float("nan"), 2**64 - 1],
)
def test_whatever_a_server_sends_has_its_line(value: object, tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path, "a").write("heard", arguments={"x": value})
    assert lines(path)[0]["event"] == "heard"


def test_each_line_is_flushed_and_a_new_file_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    journal = Journal(tmp_path / "journal.jsonl", "a")
    journal.write("one")
    journal.write("two")
    path = str(tmp_path / "journal.jsonl")
    assert flushed == [path, str(tmp_path), path]


@pytest.mark.parametrize("items", [0, 1, 1 << 18, (1 << 18) + 1, 700_000])
def test_a_digest_is_of_all_bytes_whatever_their_number(items: int):
    second, first = np.arange(items, dtype=np.float32), np.arange(3, dtype=np.int64)
    expected = hashlib.sha256(first.tobytes() + second.tobytes()).hexdigest()
    assert digest_of(prepare({"second": second, "first": first})) == expected


async def test_a_silo_that_finds_its_server_again_has_its_journal_and_its_policy(tmp_path: Path):
    path, log = tmp_path / "journal.jsonl", Log()
    options = {"policy": Policy(tells_weight=False), "backoff": Backoff(first_s=0.01)}
    first = server_of(log, rounds=2, on_round=die_in(1, log))
    address = await first.start()
    part = asyncio.ensure_future(take_part(address, path, **options))
    with pytest.raises(Die):
        await first.run()
    await server_of(log, rounds=1).run(*address)
    await part
    assert [result.outcomes["a"].weight for result in log.rounds] == [None, None]
    events = [line["event"] for line in lines(path)]
    assert [events.count(event) for event in ("join", "welcome", "upload")] == [2, 2, 2]


async def test_without_a_journal_to_write_to_nothing_leaves(tmp_path: Path):
    log = Log()
    async with running(log) as (address, run):
        with pytest.raises(JournalError, match="'join', and so nothing more is sent: No such file"):
            await take_part(address, tmp_path / "none" / "journal.jsonl")
        await log.has("refused: ")  # as one that said nothing
        assert not any("joined" in line for line in log.lines)
        assert not run.done()


async def test_a_server_that_wants_no_such_silo_is_written_down(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    async with running(Log()) as (address, _):
        with pytest.raises(JoinRefused) as info:
            await take_part(address, path, fingerprint={"weights": "another"})
    join, refused = lines(path)
    assert (join["event"], refused["event"]) == ("join", "refused")
    assert (refused["reason"], refused["is_final"]) == (info.value.reason, True)


@asynccontextmanager
async def uploading(
    path: Path, update: dict[str, Any], **options: Any
) -> AsyncIterator[tuple[Channel, Any]]:
    """A silo with a journal in a round of which the test is the server; its submission, before the upload."""
    async with aiordma.listen(config=QUICK) as listener:
        accepting = asyncio.ensure_future(listener.accept())
        async with aiordma.connect(*listener.address, config=QUICK) as channel:
            async with (
                await accepting as server,
                Silo(channel, "a", journal=Journal(path, "a"), **options) as silo,
            ):
                waiting = asyncio.ensure_future(anext(silo.rounds()))
                await server.send(Task(1, 7, {}))
                await server.send_tensors(update, meta=Task(1, 7, {}).meta(0))
                task = await waiting
                submitting = asyncio.ensure_future(task.submit(update, weight=1))
                await server.recv(Ready)
                try:
                    yield server, submitting
                finally:
                    await cancel(submitting)


LARGE = {"w": np.zeros(1 << 20, np.float32)}
"""Far more than the slots hold."""


async def test_each_attempt_has_its_end_and_the_update_is_digested_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before READY: behind it the server waits, and not for ever."""
    path, digested = tmp_path / "journal.jsonl", []

    def digest(_: object) -> str:
        digested.append(lines(path))
        return "d"

    monkeypatch.setattr("fedllm.silo.digest_of", digest)
    async with uploading(path, LARGE) as (server, submitting):
        for attempt in (1, 2, 3):
            await server.send(Upload(7, attempt))
            async with contextlib.aclosing(server.incoming()) as transfers:
                transfer = await anext(transfers)
            if attempt == 1:
                await transfer.refuse("not now")
                await until(lambda: lines(path)[-1]["event"] == "uploaded")
            elif attempt == 3:  # a verdict may overtake the last acknowledgement
                await server.send(Commit(7, True, ""))
        assert (await submitting).accepted
    found = lines(path)
    assert digested == [found[:1]]
    assert found[0]["message"] == "Task"
    assert found[1]["message"] == "Ready"
    ends = [line for line in found if line["event"] in ("upload", "uploaded")]
    assert [(line["event"], line["attempt"]) for line in ends] == [
        (event, attempt) for attempt in (1, 2, 3) for event in ("upload", "uploaded")
    ]
    assert [line["sha256_at_ready"] for line in ends[::2]] == ["d"] * 3
    assert [line["acknowledged"] for line in ends[1::2]] == [False, False, True]
    assert "not now" in ends[1]["reason"]
    assert "Upload of the server came first" in ends[3]["reason"]


async def test_an_upload_amid_which_the_server_is_lost_is_not_acknowledged(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    async with uploading(path, LARGE) as (server, submitting):
        await server.send(Upload(7, 1))
        async with contextlib.aclosing(server.incoming()) as transfers:
            await anext(transfers)
        await server.aclose()
        with pytest.raises(ServerLost):
            await submitting
    end = lines(path)[-1]
    assert (end["event"], end["acknowledged"]) == ("uploaded", False)
    assert "the connection to the server is gone" in end["reason"]


async def test_an_upload_that_is_given_up_here_has_its_end_too(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    async with uploading(path, LARGE) as (server, submitting):
        await server.send(Upload(7, 1))
        async with contextlib.aclosing(server.incoming()) as transfers:
            await anext(transfers)
        await cancel(submitting)
    end = lines(path)[-1]
    assert (end["event"], end["attempt"], end["acknowledged"]) == ("uploaded", 1, False)
    assert end["reason"] == "it was given up here"


@pytest.mark.parametrize("is_cancelled_twice", [False, True])
async def test_a_line_that_is_being_written_comes_before_the_next_one(
    is_cancelled_twice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, write = tmp_path / "journal.jsonl", Journal.write
    begun, may_end = threading.Event(), threading.Event()

    def slowly(journal: Journal, event: str, **facts: Any) -> None:
        if event == "upload":
            begun.set()
            assert may_end.wait(10)
        write(journal, event, **facts)

    monkeypatch.setattr(Journal, "write", slowly)
    async with uploading(path, LARGE) as (server, submitting):
        await server.send(Upload(7, 1))
        await asyncio.to_thread(begun.wait, 10)
        submitting.cancel()
        if is_cancelled_twice:
            await asyncio.sleep(0)
            submitting.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert server.stats().received_bytes == 0
    assert [line["event"] for line in lines(path)][-2:] == ["upload", "uploaded"]


SMALL = {"w": np.zeros(4, np.float32)}


async def test_an_update_that_is_refused_unseen_is_not_acknowledged(tmp_path: Path):
    """It lies in the server's slots, whole, before anybody has looked at it."""
    path = tmp_path / "journal.jsonl"
    async with uploading(path, SMALL) as (server, submitting):
        await server.send(Upload(7, 1))
        async with contextlib.aclosing(server.incoming()) as transfers:
            transfer = await anext(transfers)
        await server.ping()  # the silo has heard that all of it is there
        await transfer.refuse("of another model")
        await until(lambda: lines(path)[-1]["event"] == "uploaded")
        await server.send(Commit(7, False, "of another model"))
        report = await submitting
    assert (report.accepted, report.bytes) == (False, 0)
    (end,) = [line for line in lines(path) if line["event"] == "uploaded"]
    assert end["acknowledged"] is False
    assert "of another model" in end["reason"]


@pytest.mark.parametrize("full_at", ["join", "said", "upload"])
async def test_a_full_disk_ends_it_before_anything_leaves(
    full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The name, the report, and the update."""
    path, log, write = tmp_path / "journal.jsonl", Log(), Journal.write
    path.write_text('{"event":"earlier"}\n')

    def on_a_full_disk(journal: Journal, event: str, **facts: Any) -> None:
        room = files_of_at_most(path.stat().st_size + 5) if event == full_at else nullcontext()
        with room:
            write(journal, event, **facts)

    monkeypatch.setattr(Journal, "write", on_a_full_disk)
    async with running(log, min_silos=1) as (address, run):
        with pytest.raises(JournalError, match=f"cannot take the line on '{full_at}'"):
            await take_part(address, path)
        await log.has("refused: " if full_at == "join" else "a gone")
        assert any("joined" in line for line in log.lines) is (full_at != "join")
        assert not log.rounds
        run.cancel()
    *whole, torn = path.read_bytes().splitlines()
    last = {"join": "earlier", "said": "heard", "upload": "heard"}
    assert json.loads(whole[-1])["event"] == last[full_at]
    assert len(torn) == 5


def test_the_kinds_of_errors():
    assert issubclass(JournalError, FedError)
    assert not issubclass(JournalError, ServerLost)
