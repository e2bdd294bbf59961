"""Who is cancelled while it saves ends when that is done: nobody is at work in the folder when it goes on."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm import Checkpoints
from fedllm.checkpoint import load_checkpoint
from fedllm.kept import Kept
from tests.federation import Log, joining, running, server_of, weights_of
from tests.harness import turns
from tests.test_resume import PATIENCE_S, Worker, files_in, working

pytestmark = pytest.mark.usefixtures("no_leaks")


class Disk:
    """On which fsync(2) takes as long as it is held."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self._is_free = threading.Event()
        self._is_free.set()
        self._fsync = os.fsync

    def fsync(self, handle: int) -> None:
        self.is_asked.set()
        self._is_free.wait()
        self._fsync(handle)

    def hold(self) -> None:
        self.is_asked.clear()
        self._is_free.clear()

    def let_go(self) -> None:
        self._is_free.set()

    async def cancelled_in_its_midst(self, task: asyncio.Task[object]) -> None:
        """Cancel who saves, twice; it ends when the disk is done."""
        await asyncio.to_thread(self.is_asked.wait)
        for _ in range(2):
            task.cancel()
            await turns(5)
            assert not task.done()
        self.let_go()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr("os.fsync", disk.fsync)
    yield disk
    disk.let_go()


async def test_a_server_that_is_cancelled_while_it_saves_its_first_weights(
    tmp_path: Path, disk: Disk
):
    server = server_of(Log(), checkpoints=Checkpoints(tmp_path))
    disk.hold()
    await disk.cancelled_in_its_midst(asyncio.ensure_future(server.start()))
    assert len(files_in(tmp_path)) == 2
    async with server:
        await server.start()  # they are its own


async def test_a_server_that_is_cancelled_while_it_saves_a_round(tmp_path: Path, disk: Disk):
    checkpoints, worker = Checkpoints(tmp_path), Worker("a", 1)
    worker.before_submit[1] = asyncio.Event()
    server = server_of(Log(), checkpoints=checkpoints)
    address = await server.start()
    async with working(address, worker), asyncio.timeout(PATIENCE_S):
        run = asyncio.ensure_future(server.run())
        while not worker.trained:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        disk.hold()
        worker.before_submit[1].set()
        await disk.cancelled_in_its_midst(run)
        assert len(files_in(tmp_path)) == 4
        history = await server.run(*address)
    assert checkpoints.rounds() == [0, 1]
    weights, _ = checkpoints.load(1, weights_of(0))
    assert weights["w"].tobytes() == history.weights["w"].tobytes() == weights_of(1)["w"].tobytes()


async def test_a_submission_that_is_cancelled_while_it_is_kept(tmp_path: Path, disk: Disk):
    async with running(Log()) as (address, run), joining(address, "a", keep=tmp_path) as silo:
        async for task in silo.rounds():
            disk.hold()
            first = asyncio.ensure_future(task.submit(weights_of(1), weight=1))
            await disk.cancelled_in_its_midst(first)
            assert (await task.submit(weights_of(5), weight=1)).accepted
        await run
    update, _ = load_checkpoint(tmp_path, "silo-a", weights_of(0))
    assert update["w"].tobytes() == weights_of(5)["w"].tobytes()


async def test_a_silo_that_is_cancelled_while_it_writes_its_key_has_that_key(
    tmp_path: Path, disk: Disk
):
    async def join() -> None:
        async with joining(("127.0.0.1", 1), "a", keep=tmp_path):
            pass

    disk.hold()
    await disk.cancelled_in_its_midst(asyncio.ensure_future(join()))
    key = Kept(tmp_path, "a").key()
    assert key == Kept(tmp_path, "a").key()
    assert len(files_in(tmp_path)) == 1
