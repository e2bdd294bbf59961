"""How much memory a server takes for one round, by how its updates are gathered and how many silos there are.

The server is a process of its own. What is counted is anonymous memory, private and shared (RssAnon and RssShmem of
proc(5): a ring is a shared mapping), above what it is after the imports. It is looked at each time that something is
folded, which is when most of it is held: an instant before, the last update had come. The silos are tasks of the
parent's; all of them send one and the same update. Every number of the result is compared with what it must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

import aiordma
import fedllm
from aiordma import Channel, ChannelConfig
from fedllm import Aggregation, Aligned, FedAvg, Ready, RoundResult, Staged, Task
from fedllm.fold import Flat, shares_of, weighted_mean
from fedllm.messages import FROM_SERVER, Commit, Upload

Way = Literal["staged", "filed", "aligned", "flower"]

ROOT: Final = Path(__file__).parents[2]
TENSOR_BYTES: Final = 1 << 22
SLACK_BYTES: Final = 64 << 20
"""What an aligned round may take beside the weights, the sums and the rings, for any number of silos."""
RINGS: Final = ChannelConfig(slot_bytes=1 << 18, slots=4)


class Figures(msgspec.Struct, frozen=True):
    """One server's round. Bytes."""

    way: Way
    silos: int
    model_bytes: int
    anonymous_bytes: int
    """The most that was there while the updates came and were folded."""
    seconds: float | None
    """None where they would be mostly the silos' imports."""


def aligned_limit_bytes(silos: int, model_bytes: int) -> int:
    """What an aligned round may take: global weights, sums, rings, and the slack."""
    return 2 * model_bytes + silos * RINGS.slots * RINGS.slot_bytes + SLACK_BYTES


async def measure(way: Way, silos: int, model_bytes: int, folder: Path) -> Figures:
    """One round of so many silos. `filed` is staged with no memory at all; its files are in `folder`."""
    program = "import asyncio, sys; from tests.benchmarks import memory; asyncio.run(memory.lead(sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, way, str(silos), str(model_bytes), str(folder)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        update = model(model_bytes, 1)
        async with asyncio.TaskGroup() as group:
            for number in range(silos):
                group.create_task(take_part(port, f"silo-{number:03}", update))
        output = await process.stdout.read()
        assert await process.wait() == 0
        return msgspec.json.decode(output, type=Figures)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def measure_flower(python: Path, silos: int, model_bytes: int) -> Figures:
    """The same by Flower, which this interpreter has. Each silo is a process, as its client wants it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("flower.py"))
    start = partial(
        asyncio.create_subprocess_exec,
        *(str(python), script),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    server = await start("server", str(silos), str(model_bytes), str(port))
    clients = [await start("silo", str(model_bytes), str(port)) for _ in range(silos)]
    try:
        output, _ = await server.communicate()
        most = output.decode().split()[-1]
    finally:
        for process in clients:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    return Figures("flower", silos, model_bytes, int(most), None)


def model(nbytes: int, seed: int) -> dict[str, Flat]:
    """Tensors of random float32."""
    rng = np.random.default_rng(seed)
    return {
        f"layer-{i}": rng.random(TENSOR_BYTES // 4, np.float32)
        for i in range(nbytes // TENSOR_BYTES)
    }


async def take_part(port: int, name: str, update: Mapping[str, Flat]) -> None:
    """A silo that throws the weights away, and sends its update as often as it is asked to."""
    async with aiordma.connect("127.0.0.1", port, config=RINGS) as channel:
        await channel.send(name)
        task: Task = await channel.recv(FROM_SERVER)
        async for chunk in (await anext(channel.incoming())).chunks():
            chunk.release()
        await channel.send(Ready(task.ticket, 1.0, None, {}))
        while not isinstance(message := await channel.recv(FROM_SERVER), Commit):
            assert isinstance(message, Upload)
            with contextlib.suppress(aiordma.TransferAborted):
                await channel.send_tensors(update, meta=task.meta(message.attempt))
        assert message.accepted, message.reason


# In the server's process


def anonymous_bytes() -> int:
    """Of this process, in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return sum(int(found[key].split()[0]) << 10 for key in ("RssAnon", "RssShmem"))


async def lead(arguments: Sequence[str]) -> None:
    """A server for one round: writes its port, then its figures."""
    before = anonymous_bytes()
    name, silos, nbytes, folder = arguments
    way = msgspec.convert(name, Way)
    most = 0

    def reduce(rows: Sequence[Flat], shares: Sequence[float], out: Flat) -> None:
        nonlocal most
        weighted_mean(rows, shares, out)
        most = max(most, anonymous_bytes())

    result = await run(_aggregate(way, folder, reduce), int(silos), model(int(nbytes), 0))
    verify(result, model(int(nbytes), 1), int(silos))
    figures = Figures(way, int(silos), int(nbytes), most - before, result.seconds)
    sys.stdout.write(msgspec.json.encode(figures).decode())


def _aggregate(way: Way, folder: str, reduce: Any) -> Callable[[Any], Aggregation]:
    if way == "aligned":
        return partial(Aligned, reduce=reduce)
    memory_bytes = 0 if way == "filed" else 1 << 62
    return partial(Staged, reduce=reduce, memory_bytes=memory_bytes, folder=folder)


async def run(
    aggregate: Callable[[Any], Aggregation], silos: int, weights: Mapping[str, Flat]
) -> RoundResult:
    """Gather so many silos, and lead one round."""
    channels: dict[str, Channel] = {}
    async with contextlib.AsyncExitStack() as stack:
        listener = await stack.enter_async_context(aiordma.listen(config=RINGS))
        sys.stdout.write(f"{listener.address[1]}\n")
        sys.stdout.flush()
        while len(channels) < silos:
            channel = await stack.enter_async_context(await listener.accept())
            channels[await channel.recv(str)] = channel
        strategy = FedAvg(aggregate=aggregate)
        return await fedllm.run_round(
            channels, weights, round=1, strategy=strategy, min_silos=silos
        )


def verify(result: RoundResult, update: Mapping[str, Flat], silos: int) -> None:
    """Every bit."""
    shares = shares_of([1.0] * silos)
    for name, array in update.items():
        expected = np.empty_like(array)
        weighted_mean([array] * silos, shares, expected)
        assert np.array_equal(result.weights[name], expected), name
