"""Runs on two nodes at once: federated rounds of numpy-only silos on node 1, led by node 0, over either kind of lane.

OUT holds `start.npz`, the arrays to begin with. Node 0 leaves there `rounds.json`: by kind of lane, a digest of the
result, what the channels said of their lanes, and seconds; node 1 leaves `connected.json`, how many of them a silo
needed to connect. With BLOCK=1 node 1 drops all RoCE packets that it sends.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

import aiordma
import fedllm

_PORT: Final = 7777
_ROUNDS: Final = 2
_SILOS: Final = ("bank", "hospital")
PROBE_S: Final = 5.0
_CONFIG: Final = aiordma.ChannelConfig(slot_bytes=1 << 15, probe_s=PROBE_S, connect_timeout_s=60)
_TIMEOUT_S: Final = 120.0

Arrays = dict[str, np.ndarray[Any, Any]]


async def lead(own: str, out: Path) -> None:
    """Node 0: the same rounds over TCP, then over what the silos get."""
    results = {}
    async with aiordma.listen(own, _PORT, config=_CONFIG, insecure=True) as listener:
        for kind in ("tcp", "any"):
            weights: Any = dict(np.load(out / "start.npz"))
            started = time.monotonic()
            async with AsyncExitStack() as closing:
                channels = {}
                for _ in _SILOS:
                    channel = await closing.enter_async_context(await listener.accept())
                    channels[await channel.recv(str)] = channel
                for number in range(1, _ROUNDS + 1):
                    weights = (
                        await fedllm.run_round(
                            channels, weights, round=number, strategy=fedllm.FedAvg(), min_silos=2
                        )
                    ).weights
                stats = [channel.stats() for channel in channels.values()]
                results[kind] = {
                    "digest": _digest(weights),
                    "lanes": [channel.lanes[0].reason for channel in channels.values()],
                    "bytes": sum(s.received_bytes for s in stats),
                    "seconds": time.monotonic() - started,
                }
    (out / "rounds.json").write_text(json.dumps(results))


async def take_part(
    server: str, name: str, require: Literal["tcp"] | None, connected_s: list[float]
) -> None:
    """Node 1, one silo: what stands for training is fixed by its name and the round."""
    channel, seconds = await _connected(server, require)
    connected_s.append(seconds)
    async with channel, fedllm.Silo(channel, name) as silo:
        await channel.send(name)
        async for task in silo.rounds():
            rng = np.random.default_rng([task.round, _SILOS.index(name)])
            for array in task.weights.values():
                array += rng.normal(0, 0.01, array.shape).astype(array.dtype)
            report = await task.submit(task.weights, weight=100 + len(name))
            assert report.accepted, report.reason
            if task.round == _ROUNDS:
                break


async def _connected(server: str, require: Literal["tcp"] | None) -> tuple[aiordma.Channel, float]:
    """The other node may still be booting, or be at the rounds before. Also how long it took when it was not."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        started = time.monotonic()
        try:
            channel = await aiordma.connect(
                server, _PORT, config=_CONFIG, require=require, timeout_s=30
            )
            return channel, time.monotonic() - started
        except aiordma.ConnectError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def follow(server: str, out: Path) -> None:
    """Node 1: all silos in one process."""
    connected_s: list[float] = []
    for require in ("tcp", None):
        async with asyncio.TaskGroup() as silos:
            for name in _SILOS:
                silos.create_task(take_part(server, name, require, connected_s))
    (out / "connected.json").write_text(json.dumps(connected_s))


def block_roce() -> None:
    """Drop every RoCE v2 packet that this node sends, and nothing else."""
    device = next(d for d in os.listdir("/sys/class/net") if d != "lo")
    for line in (
        f"qdisc add dev {device} root handle 1: prio",
        f"qdisc add dev {device} parent 1:3 handle 30: netem loss 100%",
        f"filter add dev {device} protocol ip parent 1: u32 match ip dport 4791 0xffff flowid 1:3",
    ):
        subprocess.run(["tc", *line.split()], check=True)


def _digest(weights: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    env = os.environ
    if env["NODE"] == "0":
        asyncio.run(asyncio.wait_for(lead(env["ADDR"], Path(env["OUT"])), _TIMEOUT_S))
    else:
        if env.get("BLOCK"):
            block_roce()
        asyncio.run(asyncio.wait_for(follow(env["PEER"], Path(env["OUT"])), _TIMEOUT_S))
