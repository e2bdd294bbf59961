"""A silo whose model is too large for one process: two ranks share it by FSDP2, and each talks to the server itself.

The global weights never lie in one rank. Each gets its rows, looks at them together with the other, trains with it, and
sends its rows back, while the shop, which has the model whole, does all of it in one process. Here both ranks are
children of this program; as a rule torchrun starts them, and knows their numbers.

python examples/sharded.py
"""

import asyncio
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import fedllm
from fedllm.adapters import full_arrays, full_on_trial, full_shard, load_full

RANKS, ROUNDS = 2, 5
EXAMPLES = {"bank": 96, "shop": 32}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 1))


def data(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(examples)
    inputs = torch.randn(examples, 8)
    return inputs, inputs.sum(1, keepdim=True)


@torch.no_grad()
def judge(model: nn.Module, examples: int) -> float:
    """Here all ranks see the same; ranks that see different data would `dist.all_reduce` the loss, to decide alike."""
    inputs, wanted = data(examples)
    return nn.functional.mse_loss(model(inputs), wanted).item()


def train(model: nn.Module, examples: int) -> float:
    inputs, wanted = data(examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


async def take_part(
    address: tuple[str, int], name: str, model: nn.Module, shard: fedllm.Shard | None
) -> None:
    async with fedllm.join(*address, name=name, fingerprint={}, shard=shard) as silo:
        async for task in silo.rounds():
            mine = await asyncio.to_thread(judge, model, EXAMPLES[name])
            with full_on_trial(model, task.weights):
                theirs = await asyncio.to_thread(judge, model, EXAMPLES[name])
            if theirs <= 2 * mine + 0.1:  # all ranks, or none
                load_full(model, task.weights)
            loss = await asyncio.to_thread(train, model, EXAMPLES[name])
            # All ranks report the weight of the whole silo.
            await task.submit(full_arrays(model), weight=EXAMPLES[name], metrics={"loss": loss})


def be_rank(rank: int, address: tuple[str, int], folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS
    )
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    shard = full_shard(model)
    print(f"rank {rank} holds rows {shard.rows['0.weight']} of the first layer's 33", flush=True)
    asyncio.run(take_part(address, "bank", model, shard))
    dist.destroy_process_group()


def tell(result: fedllm.RoundResult) -> None:
    bank = result.outcomes["bank"]
    print(
        f"round {result.round}: loss {result.metrics['loss']:.3f}; {bank.bytes} bytes of the bank"
    )


async def main() -> None:
    weights: Mapping[str, Any] = full_arrays(build())
    settings = fedllm.RunConfig(min_silos=2, rounds=ROUNDS)
    server = fedllm.Federation(weights, settings, fingerprint={}, on_round=tell)
    with tempfile.TemporaryDirectory() as folder:
        async with server, asyncio.TaskGroup() as silos:
            address = await server.start()
            silos.create_task(asyncio.to_thread(spawn, be_rank, (address, folder), nprocs=RANKS))
            silos.create_task(take_part(address, "shop", build(), None))
            await server.run()


if __name__ == "__main__":
    asyncio.run(main())
