"""Round after round a server and its silos hold no more than they did, in memory, tasks, sockets and files."""

import asyncio
import gc
import sys
import weakref
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path

import pytest

from fedllm import Aligned, FedAvg, Staged
from tests.harness import until
from tests.playing import A, B, play, takes_part, update

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("aggregate", [Staged, Aligned])
async def test_a_round_leaves_no_model_to_the_collector_of_circles(aggregate):
    weights = update(0)
    held = weakref.ref(weights["w"])
    gc.collect()
    gc.disable()
    try:
        result, _ = await play(
            {"a": takes_part(A), "b": takes_part(B)},
            weights=weights,
            strategy=FedAvg(aggregate=aggregate),
        )
        new = weakref.ref(result.weights["w"])
        del weights, result
        # The thread that folded lets go of it a moment after it has told so.
        await until(lambda: held() is None and new() is None, "the round is gone")
    finally:
        gc.enable()


async def test_silos_in_processes_of_their_own_and_nothing_grows():
    words = ("-m", "tests.crowd", "4", "40", "24")
    root = Path(__file__).parents[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, cwd=root, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert said.decode().endswith("4 silos, 40 rounds of 1.2 MB: nothing grows\n"), said.decode()
