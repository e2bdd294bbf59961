"""Runs on two nodes at once: registered memory to registered memory, both ways, while packets are lost.

Some of the receives are cancelled amid it. Both fail unless every byte is right; node 1 leaves what it copied in
its OUT.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Final

import numpy as np

import aiordma
from aiordma import Channel, ChannelConfig, ConnectError, TransferAborted
from tests.harness import until

_TRANSFERS: Final = 9
_BYTES: Final = 2 << 20
_PORT: Final = 7777
_PATIENCE_S: Final = 60.0
_CONFIG: Final = ChannelConfig(
    slot_bytes=64 << 10, probe_s=20, connect_timeout_s=60, idle_timeout_s=20
)


async def main(node: int, own: str, peer: str, out: Path) -> None:
    """The same at both ends."""
    if node == 0:
        async with aiordma.listen(own, _PORT, config=_CONFIG, insecure=True) as listener:
            channel = await listener.accept()
    else:
        channel = await _connected(peer)
    async with channel:
        await asyncio.gather(_send(channel, node), _receive(channel, 1 - node))
        copied_bytes = channel.stats().copied_bytes
        await channel.send("done")
        await channel.recv()
    if node == 1:
        result = {"bytes": _TRANSFERS * _BYTES, "copied": copied_bytes}
        (out / "into.json").write_text(json.dumps(result))


async def _send(channel: Channel, node: int) -> None:
    for number in range(_TRANSFERS):
        source = _content(node, number)
        channel.register(source)
        try:
            await channel.send_tensor(source)
        except TransferAborted:
            await channel.send_tensor(source)


async def _receive(channel: Channel, sender: int) -> None:
    for number in range(_TRANSFERS):
        into = np.zeros(_BYTES, np.uint8)
        channel.register(into)
        if number % 3 == 2:
            came = channel.stats().received_chunks
            receiving = asyncio.create_task(channel.recv_tensor(into=into))
            await so_many(channel, came + 10)
            receiving.cancel()
            await asyncio.wait([receiving])
            assert receiving.cancelled()
            into[:] = 7
            again = np.zeros_like(into)
            channel.register(again)
            await channel.recv_tensor(into=again)
            assert (into == 7).all(), "written after the call had returned"
            into = again
        else:
            await channel.recv_tensor(into=into)
        assert np.array_equal(into, _content(sender, number)), f"transfer {number}"


async def so_many(channel: Channel, chunks: int) -> None:
    await until(lambda: channel.stats().received_chunks >= chunks)


def _content(node: int, number: int) -> np.ndarray:
    return np.random.default_rng([node, number]).integers(0, 256, _BYTES, np.uint8)


async def _connected(peer: str) -> Channel:
    """To the other node, which may still be booting."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                return await aiordma.connect(
                    peer, _PORT, config=_CONFIG, require="verbs", timeout_s=40
                )
            except ConnectError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    env = os.environ
    asyncio.run(main(int(env["NODE"]), env["ADDR"], env["PEER"], Path(env["OUT"])))
