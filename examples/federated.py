"""Federated rounds without torch: three silos find a line that none of them could find alone.

Each silo's inputs are 0 in one place, so that its data says nothing of the weight there. This program owns
its channels; `fedllm.Server` and `fedllm.join` do the same for who would rather not.

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
    """A silo: train on what stays here, say READY, upload when asked, hear the verdict."""
    async with aiordma.connect(*address) as channel:
        await channel.send(name)
        for _ in range(ROUNDS):
            task = await channel.recv(fedllm.Task)
            weights = (await channel.recv_tensors()).arrays
            for _ in range(20):
                weights["w"] -= 0.1 * x.T @ (x @ weights["w"] - y) / len(y)
            await channel.send(fedllm.Ready(task.ticket, len(y), None, {}))
            message = await channel.recv()
            while message["type"] == "Upload":  # once, and again if it went wrong
                await channel.send_tensors(weights, meta=task.meta(message["attempt"]))
                message = await channel.recv()
            assert message["accepted"], message["reason"]


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
