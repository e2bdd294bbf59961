"""A silo whose DataLoader forks two workers, which inherit its sockets: in whatever way its channel ends, it ends.

The workers are persistent ones: they outlive the channel, and hold copies of its descriptors when it closes.
To close these in the silo ends no connection then; only to shut them down does. Without `shutdown` in `TcpLane`
the lanes' connections stay, and without it in `TcpControl` a broken channel's peer does not see the end.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from aiordma import Channel, ChannelConfig, ChannelError
from fedllm import Federation, History, RoundResult, RunConfig, Status
from tests.harness import cancel, program, until

pytestmark = pytest.mark.usefixtures("no_leaks")

ENDING_S = 5.0
"""How long the end of a channel may take on a busy machine."""
CONFIG = ChannelConfig(close_timeout_s=50.0)
"""Whoever waits for a close that is never answered waits far longer than `ENDING_S`."""

SILO = """
import asyncio, json, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import aiordma, fedllm
from tests.conftest import LOOPS, leak_check

port, leaves_after, ending_s, close_timeout_s, loop_kind = json.loads(sys.argv[1])
torch.set_num_threads(1)
data = TensorDataset(torch.arange(64.0))
loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)

def fit(weights):
    for (batch,) in loader:
        weights["w"] += batch.sum().numpy()
    return weights

async def take_part():
    config = aiordma.ChannelConfig(close_timeout_s=close_timeout_s)
    joining = fedllm.join(
        "127.0.0.1", port, name="forks", fingerprint={}, config=config, backoff=None
    )
    async with asyncio.timeout(None) as ending:
        async with joining as silo:
            try:
                async for task in silo.rounds():
                    update = await asyncio.to_thread(fit, task.weights)
                    assert (await task.submit(update, weight=64)).accepted
                    if task.round == leaves_after:
                        break
                how = "in order"
            except fedllm.ServerLost as lost:
                how = str(lost)
            ending.reschedule(asyncio.get_running_loop().time() + ending_s)
    return how

async def main():
    async with leak_check():
        how = await take_part()
        workers = loader._iterator._workers
        assert all(worker.is_alive() for worker in workers)
        print(json.dumps([how, *(worker.pid for worker in workers)]), flush=True)
        sys.stdin.read()  # meanwhile the other end looks
        loader._iterator._shutdown_workers()

with asyncio.Runner(loop_factory=LOOPS[loop_kind]) as runner:
    runner.run(main())
"""


def connections(port: int) -> list[str]:
    """The kernel's connections from and to a port that are not over, whoever holds them; proc_net_tcp(5)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listen, time_wait = "0A", "06"
    return [
        f"{local} {remote} {state}"
        for _, local, remote, state, *_ in lines
        if f":{port:04X}" in (local[-5:], remote[-5:]) and state not in (listen, time_wait)
    ]


@asynccontextmanager
async def running(server: Federation) -> AsyncIterator[tuple[int, asyncio.Task[History]]]:
    """The port of a server that runs, and its run."""
    async with server:
        _, port = await server.start()
        run = asyncio.create_task(server.run())
        try:
            yield port, run
        finally:
            await cancel(run)


@pytest.mark.parametrize(
    ("rounds", "leaves_after", "breaks", "heard", "said"),
    [
        (2, None, False, "in order", "closed the channel"),
        (3, 2, False, "in order", "the peer closed the channel: goodbye"),
        (3, None, True, "is gone", "the peer closed the channel: what came breaks the protocol"),
    ],
    ids=["the run is over", "the silo leaves", "the silo breaks off"],
)
async def test_a_channel_ends_though_forked_workers_hold_its_sockets(
    rounds: int, leaves_after: int | None, breaks: bool, heard: str, said: str, loop_kind: str
):
    results: list[RoundResult] = []
    channels: list[Channel] = []

    def on_round(result: RoundResult) -> None:
        results.append(result)
        if result.round == 1:
            channel = server._members.free()["forks"]
            assert isinstance(channel, Channel)
            channels.append(channel)
        elif breaks:  # what no server says, so that the silo ends the channel without a word
            channels[0]._link._control.write(b"\xff" * 64)

    server = Federation(
        {"w": np.zeros(3, np.float32)},
        RunConfig(min_silos=1, rounds=rounds, farewell_s=0.1),
        fingerprint={},
        on_round=on_round,
        config=CONFIG,
    )
    async with running(server) as (port, run):
        words = json.dumps([port, leaves_after, ENDING_S, CONFIG.close_timeout_s, loop_kind])
        async with program(SILO, words) as silo:
            assert silo.stdin is not None
            assert silo.stdout is not None
            how, *workers = json.loads(await silo.stdout.readline())
            assert heard in how
            (channel,) = channels
            with pytest.raises(ChannelError, match=said):
                async with asyncio.timeout(ENDING_S):
                    await channel.recv()
            if rounds == 2:
                async with asyncio.timeout(ENDING_S):
                    await run
            await until(lambda: not connections(port), "the last connection is over")
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, 0)  # they live, and hold the sockets of the channel that is over
            silo.stdin.close()
            async with asyncio.timeout(ENDING_S):
                assert await silo.wait() == 0
            for pid in workers:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
    assert [result.outcomes["forks"].status for result in results] == [Status.COMMITTED] * 2
    assert results[-1].weights["w"].tolist() == [2 * 2016.0] * 3
