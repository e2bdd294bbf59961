"""`python -m tests.crowd SILOS ROUNDS TENSORS`: a server and silos, a process each, exchange updates of LoRA's size.

Prints, round by round, what the server and the silos hold; fails if that grows. 24 tensors are 1.2 MB, 96 are
4.7 MB: rank 8 on GPT-2's attention and feed-forward layers has such shapes. No torch, no training.
"""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from aiordma import ChannelConfig
from fedllm import Federation, RoundResult, RunConfig, join

FINGERPRINT = {"weights": "1"}
CONFIG = ChannelConfig(slot_bytes=1 << 16, slots=4)
"""Of small rings: pages of a ring come to be when they are first used, which may take many rounds."""
SETTLED = 3
"""Rounds before anything is compared: buffers, threads and caches come to be in these."""
SPARE_MIB = 8.0
"""What the allocator may keep, beside three updates, more after the last round than after the first settled one:
freed memory that it has not given back. Models that wait for the collector of circles would be more."""

Held = dict[str, float]


def adapter(tensors: int) -> dict[str, np.ndarray[Any, Any]]:
    return {f"layer.{n}": np.zeros((8, 1536), np.float32) for n in range(tensors)}


def held() -> Held:
    """Tasks, open files (sockets among them) and anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    anonymous_kib = int(status.partition("RssAnon:")[2].split()[0])
    files = os.listdir("/proc/self/fd")
    sockets = sum(is_socket(name) for name in files)
    return {
        "tasks": len(asyncio.all_tasks()),
        "files": len(files) - 1,  # the listing itself
        "sockets": sockets,
        "mib": anonymous_kib / 1024,
    }


def is_socket(name: str) -> bool:
    path = Path("/proc/self/fd", name)
    return path.exists() and path.is_socket()


async def take_part(port: int, name: str) -> None:
    async with join(
        "127.0.0.1", port, name=name, fingerprint=FINGERPRINT, config=CONFIG, backoff=None
    ) as silo:
        async for task in silo.rounds():
            for array in task.weights.values():
                array += 1
            metrics = held()
            assert (await task.submit(task.weights, weight=1, metrics=metrics)).accepted


def compare(what: str, rounds: list[Held], growth_mib: float) -> None:
    """The last round holds no more than the settled ones."""
    before, after = rounds[SETTLED:-1], rounds[-1]
    for kind in ("tasks", "files", "sockets"):
        assert after[kind] <= max(one[kind] for one in before), (what, kind, rounds)
    first = before[0]["mib"]
    assert after["mib"] <= first + growth_mib, (what, [round(one["mib"], 1) for one in rounds])


def end(process: Process) -> None:
    if process.returncode is None:
        process.kill()


async def lead(silos: int, rounds: int, tensors: int) -> None:
    of_server: list[Held] = []
    of_silos: list[dict[str, Held]] = []

    def on_round(result: RoundResult) -> None:
        of_server.append(held())
        of_silos.append({name: dict(o.metrics) for name, o in result.outcomes.items()})
        most = {kind: max(one[kind] for one in of_silos[-1].values()) for kind in of_server[-1]}
        cells = [
            f"{who} " + ", ".join(f"{value:.0f} {kind}" for kind, value in one.items())
            for who, one in (("server", of_server[-1]), ("most of a silo", most))
        ]
        print(f"round {result.round:2} {result.seconds:5.2f} s: {'; '.join(cells)}", flush=True)

    settings = RunConfig(min_silos=silos, rounds=rounds)
    weights = adapter(tensors)
    server = Federation(
        weights, settings, fingerprint=FINGERPRINT, on_round=on_round, config=CONFIG
    )
    async with server, AsyncExitStack() as stack:
        _, port = await server.start()
        crew = []
        for number in range(silos):
            words = ("-m", "tests.crowd", "silo", str(port), f"silo-{number}")
            process = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=PIPE)
            stack.callback(end, process)
            crew.append(process)
        history = await server.run()
        assert [await process.wait() for process in crew] == [0] * silos
    assert all((array == rounds).all() for array in history.weights.values())
    nbytes = sum(array.nbytes for array in weights.values())
    growth_mib = SPARE_MIB + 3 * nbytes / 2**20
    compare("server", of_server, growth_mib)
    for name in of_silos[0]:
        compare(name, [one[name] for one in of_silos], growth_mib)
    print(f"{silos} silos, {rounds} rounds of {nbytes / 1e6:.1f} MB: nothing grows")


if __name__ == "__main__":
    if sys.argv[1] == "silo":
        asyncio.run(take_part(int(sys.argv[2]), sys.argv[3]))
    else:
        asyncio.run(lead(*map(int, sys.argv[1:])))
