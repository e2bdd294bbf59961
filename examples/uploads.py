"""Three silos upload at once; the server folds each chunk as it comes, and never holds a whole update.

python examples/uploads.py
"""

import asyncio

import numpy as np

import aiordma

SHAPES = {"embedding": (2048, 256), "projection": (256, 256)}


async def upload(address: tuple[str, int], silo: int) -> None:
    """A silo: connect, send everything, wait until the server has used it."""
    update = {name: np.full(shape, silo, np.float32) for name, shape in SHAPES.items()}
    async with aiordma.connect(*address) as channel:
        await channel.send_tensors(update, meta={"silo": silo}, confirm=True)


async def fold(channel: aiordma.Channel, totals: dict[str, np.ndarray]) -> None:
    """Add one silo's update to the totals, straight from the receive slots."""
    async for transfer in channel.incoming():
        async for chunk in transfer.chunks():
            with chunk:
                for spec, start, values in chunk.parts():
                    totals[spec.name][start : start + values.size] += values


async def main() -> None:
    totals = {name: np.zeros(np.prod(shape), np.float32) for name, shape in SHAPES.items()}
    async with aiordma.serve(lambda channel: fold(channel, totals)) as server:
        async with asyncio.TaskGroup() as silos:
            for silo in (1, 2, 3):
                silos.create_task(upload(server.address, silo))
    for name, total in totals.items():
        print(f"{name}: every element is {total.min():g}")
        assert (total == 6).all()


if __name__ == "__main__":
    asyncio.run(main())
