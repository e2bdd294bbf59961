"""A silo's own record of what left it: every line before that of which it tells, and nothing without one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aiordma import prepare
from fedllm import Backoff, FedError, JournalError, Policy, ServerLost
from fedllm.journal import Journal, digest_of
from tests.federation import FINGERPRINT, Log, joining, running, server_of
from tests.test_checkpoint import files_of_at_most
from tests.test_resume import Die, die_in

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
        assert line["sha256"] == hashlib.sha256(updates[number]).hexdigest()
    assert [line["accepted"] for line in found if line.get("message") == "Commit"] == [True] * 2
    assert path.stat().st_mode & 0o777 == 0o600


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
    async with running(Log()) as (address, run):
        with pytest.raises(JournalError, match="'join', and so nothing is sent: No such file"):
            await take_part(address, tmp_path / "none" / "journal.jsonl")
        assert not run.done()


async def test_a_full_disk_ends_it_before_the_update_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, log, write = tmp_path / "journal.jsonl", Log(), Journal.write

    def on_a_full_disk(journal: Journal, event: str, **facts: Any) -> None:
        room = files_of_at_most(path.stat().st_size + 5) if event == "upload" else nullcontext()
        with room:
            write(journal, event, **facts)

    monkeypatch.setattr(Journal, "write", on_a_full_disk)
    async with running(log, min_silos=1) as (address, run):
        with pytest.raises(JournalError, match="cannot take the line on 'upload'"):
            await take_part(address, path)
        await log.has("a gone")
        assert not log.rounds
        run.cancel()
    *whole, torn = path.read_bytes().splitlines()
    assert [json.loads(line)["event"] for line in whole][-1] == "heard"
    assert len(torn) == 5


def test_the_kinds_of_errors():
    assert issubclass(JournalError, FedError)
    assert not issubclass(JournalError, ServerLost)
