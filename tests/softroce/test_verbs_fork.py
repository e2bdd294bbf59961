"""What a forked process, such as a DataLoader's worker, has of the memory that its parent has registered."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from aiordma import Registration
from tests.harness import noise, program, usable
from tests.softroce.lanes import SIZE, pair

pytestmark = [pytest.mark.verbs, pytest.mark.usefixtures("clean_device")]

PROGRAM = """
import asyncio
from pyverbs.fork import fork_init
from tests.softroce.test_verbs_fork import fork_and_send

fork_init()
asyncio.run(fork_and_send())
print("done")
"""


async def fork_and_send() -> int:
    """A child reads, writes and releases what is registered; its parent sends something else from there to there."""
    async with pair(require="verbs") as (near, far):

        async def send() -> None:
            for array, into in zip(arrays, places, strict=True):
                into[:] = 0
                await asyncio.gather(near.send_tensor(array), far.recv_tensor(into=into))
                assert np.array_equal(into, ~noise(array.size))

        arrays = noise(SIZE), noise(100)  # on a small array's pages other things lie too
        places = np.zeros(SIZE, np.uint8), np.zeros(100, np.uint8)
        registrations = [near.register(array) for array in arrays]
        registrations += [far.register(into) for into in places]
        assert all(registration.is_pinned for registration in registrations)
        sums = [int(array.sum()) for array in arrays]
        gate, opened = os.pipe()
        child = os.fork()
        if not child:
            _live(gate, arrays, sums, registrations)
        for array in arrays:
            array ^= 0xFF
        await send()
        assert _end_of(child, opened) == 0
        await send()
        assert near.stats().copied_bytes == 0
        os.close(gate)
        await usable(near, far)
        return far.stats().received_bytes


def _live(
    gate: int,
    arrays: Sequence[np.ndarray],
    sums: Sequence[int],
    registrations: Sequence[Registration],
) -> None:
    """The child's life: 0 is a good end."""
    end = 1
    try:
        os.read(gate, 1)
        found = [int(array.sum()) for array in arrays]
        for array in arrays:
            array[:] = 0
        for registration in registrations:
            registration.release()
        if found == sums:
            end = 0
    finally:
        os._exit(end)


def _end_of(child: int, opened: int) -> int:
    """Let it live, and tell its exit status."""
    os.write(opened, b".")
    os.close(opened)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("loop_kind")
async def test_a_child_has_a_copy_of_its_own_and_leaves_its_parents_alone(record_property):
    record_property("lane_bytes", await fork_and_send())


async def test_so_it_is_where_another_library_has_asked_libibverbs_to_withhold_it():
    """As NCCL does, and IBV_FORK_SAFE=1: libibverbs obeys up to version 50, though the kernel copies."""
    async with program(PROGRAM) as process:
        output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"done\n")


@pytest.mark.parametrize("does_kernel_copy", [True, False])
async def test_only_where_the_kernel_copies_it_do_children_get_it(does_kernel_copy, monkeypatch):
    """Elsewhere the parent's next write would part its page from the device's."""
    asked: list[str] = []
    api = "aiordma.lanes.verbs.api"
    monkeypatch.setattr(f"{api}.fork_init", lambda: asked.append("fork_init"))
    if not does_kernel_copy:
        monkeypatch.setattr(f"{api}.is_fork_initialized", lambda: len(asked))  # 0: no, 1: yes
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # what libibverbs does once it was asked
    array = np.frombuffer(memory, np.uint8)
    async with pair(require="verbs") as (near, _):
        assert near.register(array).is_pinned
        assert is_withheld(array) is not does_kernel_copy
    assert asked == ([] if does_kernel_copy else ["fork_init"])


def is_withheld(array: np.ndarray) -> bool:
    """Whether children will not have its first page: "dc" among the flags of proc_pid_smaps(5)."""
    smaps = Path("/proc/self/smaps").read_text()
    for first, end, flags in re.findall(
        r"^(\w+)-(\w+) .*?^VmFlags:(.*?)$", smaps, re.MULTILINE | re.DOTALL
    ):
        if int(first, 16) <= array.ctypes.data < int(end, 16):
            return "dc" in flags.split()
    raise LookupError(f"nothing is mapped at {array.ctypes.data:#x}")
