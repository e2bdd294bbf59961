"""Federated rounds without torch: three silos find a line that none of them could find alone.

Each silo's inputs are 0 in one place, so that its data says nothing of the weight there. This program owns
its channels; `fedllm.Federation` and `fedllm.join` do the same for who would rather not.

python examples/federated.py
"""

import asyncio
from contextlib import AsyncExitStack

import numpy as np

import aiordma
import fedllm

TRUTH = np.array([3.0, -2.0, 0.5])
EXAMPLES = {"bank": 50, "hospital": 100, "telecom": 200}
ROUNDS = 8


async def take_part(address: tuple[str, int], name: str, x: np.ndarray, y: np.ndarray) -> None:
    """A silo: train on what stays here, and hand in the update when the server asks for it."""
    async with aiordma.connect(*address) as channel, fedllm.Silo(channel, name) as silo:
        await channel.send(name)
        async for task in silo.rounds():
            w = task.weights["w"]
            for _ in range(20):
                w -= 0.1 * x.T @ (x @ w - y) / len(y)
            report = await task.submit({"w": w}, weight=len(y))
            assert report.accepted, report.reason
            if task.round == ROUNDS:
                break


async def lead(listener: aiordma.Listener) -> None:
    """The server: gather the silos, then average what they send, round by round."""
    weights, error = {"w": np.zeros(TRUTH.size)}, float("inf")
    async with AsyncExitStack() as closing:
        channels = {}
        for _ in EXAMPLES:
            channel = await closing.enter_async_context(await listener.accept())
            channels[await channel.recv(str)] = channel
        for number in range(1, ROUNDS + 1):
            result = await fedllm.run_round(
                channels, weights, round=number, strategy=fedllm.FedAvg(), min_silos=3
            )
            weights, before = result.weights, error
            error = float(np.linalg.norm(weights["w"] - TRUTH))
            print(f"round {number}: off by {error:.3f}")
            assert error < before
    assert error < 0.01


async def main() -> None:
    rng = np.random.default_rng(0)
    async with aiordma.listen() as listener, asyncio.TaskGroup() as silos:
        for blind, (name, examples) in enumerate(EXAMPLES.items()):
            x = rng.normal(blind, 1.0, (examples, TRUTH.size))
            x[:, blind] = 0.0
            silos.create_task(take_part(listener.address, name, x, x @ TRUTH))
        await lead(listener)


if __name__ == "__main__":
    asyncio.run(main())
