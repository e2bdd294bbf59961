"""One tensor from one end of a channel to the other, straight into the receiver's array.

python examples/tensor.py
"""

import asyncio

import numpy as np

import aiordma


async def receive(channel: aiordma.Channel) -> None:
    """What the listening end does with each channel."""
    greeting = await channel.recv()
    weights = np.empty(greeting["items"], np.float32)
    await channel.recv_tensor(into=weights)
    await channel.send({"sum": float(weights.sum(dtype=np.float64))})
    try:
        await channel.recv()  # until the peer has read the answer and closes
    except aiordma.ChannelClosed:
        return


async def main() -> None:
    weights = np.ones(1_000_000, np.float32)
    async with (
        aiordma.serve(receive) as server,
        aiordma.connect(*server.address) as channel,
    ):
        await channel.send({"items": weights.size})
        await channel.send_tensor(weights)
        print(f"the other end sums it to {(await channel.recv())['sum']:.0f}")
        print(
            f"{channel.stats().sent_bytes:,} bytes, {channel.stats().copied_bytes} of them copied here"
        )


if __name__ == "__main__":
    asyncio.run(main())
