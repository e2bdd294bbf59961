"""Updates beyond the memory budget wait in files: the same bits, and no room is one silo's outcome."""

from __future__ import annotations

import gc
import mmap
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm import FedAvg, QuorumNotReached, SettingError, Staged, StagingError, Status
from fedllm.staged import StagedContribution
from tests.playing import TWO, WEIGHTS, A, B, C, Update, bits, changed, pairs, play, takes_part

NBYTES = sum(array.nbytes for array in WEIGHTS.values())
ROOM_FOR_ONE = NBYTES + 1000


@contextmanager
def a_full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB (setrlimit(2); Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(contribution: StagedContribution, arrays: Update) -> None:
    for name, buffer in contribution.buffers.items():
        buffer[...] = arrays[name]
    contribution.add()


def mapped(array: Any) -> mmap.mmap | None:
    """The file that an array lies in."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else array.base
    return array


def reserved_bytes(folder: Path) -> list[int]:
    """What the disk has set aside for each file of the folder's that is open, named or not."""
    links = Path("/proc/self/fd").iterdir()
    files = [link for link in links if link.is_file() or "(deleted)" in str(link.resolve())]
    return [f.stat().st_blocks * 512 for f in files if str(f.resolve()).startswith(str(folder))]


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("memory_bytes", [0, ROOM_FOR_ONE, 1 << 30])
def test_a_file_gives_the_bits_of_memory(memory_bytes: int, tmp_path: Path):
    before = descriptors()
    staged = Staged(WEIGHTS, memory_bytes=memory_bytes, folder=tmp_path)
    b, a = staged.begin("b", 2.0), staged.begin("a", 1.0)
    in_files = [c for c in (b, a) if mapped(c.buffers["w"]) is not None]
    assert in_files == {0: [b, a], ROOM_FOR_ONE: [a], 1 << 30: []}[memory_bytes]
    assert [c.is_filed for c in (b, a)] == [c in in_files for c in (b, a)]
    assert not list(tmp_path.iterdir())  # nothing that a crash could leave behind
    assert len(reserved_bytes(tmp_path)) == len(in_files)
    # A hole for which the disk has no room when it is written kills the process.
    assert all(reserved >= NBYTES for reserved in reserved_bytes(tmp_path))
    fill(b, B)
    fill(a, A)
    staged.commit()
    assert bits(staged.result()) == TWO
    assert all(mapped(array) is None for array in staged.result().values())
    assert descriptors() == before


def test_what_is_tied_stays_tied_while_all_silos_agree():
    """So it travels once in the next round as well."""
    table = np.zeros(1000, np.float32)
    tied: Update = {"wte": table, "head": table, "b": np.zeros(3, np.float16)}
    for agrees in (True, False):
        staged = Staged(tied)
        for name, value in (("a", 1.0), ("b", 2.0)):
            arrays = {key: array + array.dtype.type(value) for key, array in tied.items()}
            arrays["head"][7] += not agrees
            fill(staged.begin(name, 1.0), arrays)
        staged.commit()
        result = staged.result()
        assert list(result) == list(tied)
        assert (result["wte"] is result["head"]) == agrees
        assert result["wte"].tolist() == [1.5] * 1000
        assert result["head"][7] == 1.5 + (not agrees)


def test_who_aborts_gives_its_memory_back(tmp_path: Path):
    staged = Staged(WEIGHTS, memory_bytes=ROOM_FOR_ONE, folder=tmp_path)
    first = staged.begin("a", 1.0)
    assert staged.begin("b", 1.0).is_filed
    first.abort()
    assert not staged.begin("c", 1.0).is_filed


def test_when_there_is_no_memory_a_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: object) -> None:
        raise MemoryError

    staged = Staged(WEIGHTS, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", no_memory)
        contribution = staged.begin("a", 1.0)
    assert contribution.is_filed
    fill(contribution, A)
    staged.commit()
    assert bits(staged.result()) == bits(A)


def test_a_full_disk_is_an_error_before_a_byte_came(tmp_path: Path):
    staged = Staged(WEIGHTS, memory_bytes=ROOM_FOR_ONE, folder=tmp_path)
    kept = staged.begin("a", 1.0)
    says = (
        rf"\d+ bytes go to a file in {tmp_path}, .* \(File too large\): free space there, or give"
    )
    with a_full_disk(), pytest.raises(StagingError, match=says) as info:
        staged.begin("b", 1.0)
    assert isinstance(info.value.__cause__, OSError)
    assert not list(tmp_path.iterdir())
    fill(staged.begin("b", 2.0), B)  # there is room again
    fill(kept, A)
    staged.commit()
    assert bits(staged.result()) == TWO


def test_settings_that_cannot_work():
    with pytest.raises(SettingError, match="memory_bytes must not be negative"):
        Staged(WEIGHTS, memory_bytes=-1)
    with pytest.raises(StagingError, match="No such file"):
        Staged(WEIGHTS, memory_bytes=0, folder="/nowhere").begin("a", 1.0)


@pytest.mark.usefixtures("no_leaks")
async def test_a_round_goes_on_without_the_silo_that_there_is_no_room_for(tmp_path: Path):
    strategy = FedAvg(aggregate=partial(Staged, memory_bytes=2 * NBYTES + 1000, folder=tmp_path))
    behaviours = {n: takes_part(u, weight=w) for n, w, u in (("a", 1.0, A), ("b", 2.0, B))}
    async with pairs("a", "b", "c") as ends:
        with a_full_disk():
            result, seen = await play(
                {**behaviours, "c": takes_part(C)}, ends=ends, strategy=strategy
            )
        lost = [name for name, o in result.outcomes.items() if o.status is Status.FAILED]
        assert len(lost) == 1
        outcome = result.outcomes[lost[0]]
        assert isinstance(outcome.error, StagingError)
        assert not seen[lost[0]].accepted
        assert "no room for another update" in seen[lost[0]].reason
        assert not outcome.is_busy
        result, _ = await play(
            {**behaviours, "c": takes_part(changed(w=A["w"]))}, ends=ends, round=2
        )
    assert {o.status for o in result.outcomes.values()} == {Status.COMMITTED}


async def test_no_room_for_anybody_leaves_the_old_weights(tmp_path: Path):
    strategy = FedAvg(aggregate=partial(Staged, memory_bytes=0, folder=tmp_path))
    before = bits(WEIGHTS)
    with a_full_disk(), pytest.raises(QuorumNotReached, match="no room for another update"):
        await play({"a": takes_part(A), "b": takes_part(B)}, strategy=strategy)
    assert bits(WEIGHTS) == before
