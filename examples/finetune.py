"""Full fine-tuning of any torch module: layers that stay at home, and silos that may refuse a new model.

Two clinics learn to read the same scans. What they look for differs, so each keeps a head of its own, which
the server never sees. Before it adopts the global layers a silo tries them, under its own head and on its
own scans: when one clinic's scanner breaks, the other goes on with what it had.

python examples/finetune.py
"""

import asyncio
import threading
from functools import partial

import torch
from torch import nn

import fedllm
from fedllm.adapters import full_arrays, full_on_trial, load_full

KEEP = ["head"]
FINGERPRINT = {"keep_local": str(KEEP)}
CLINICS = ("north", "south")
BROKEN = ("south", 4)
ROUNDS = 8
torch.manual_seed(0)
FEATURES = torch.randn(8, 3) / 8**0.5
LOOKS_FOR = {name: torch.eye(3) + torch.randn(3, 3) / 4 for name in CLINICS}
SCANS = {name: torch.randn(2, 50, 8) for name in CLINICS}


class Reader(nn.Module):
    """Reads three features out of a scan, and tells what they amount to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)  # the same beginning for all
        self.body = nn.Linear(8, 3)
        self.head = nn.Linear(3, 3)
        nn.init.eye_(self.head.weight)

    def loss(self, scans: torch.Tensor, findings: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.head(self.body(scans)), findings)


def train(
    model: Reader, scans: torch.Tensor, findings: torch.Tensor, stop: threading.Event
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        if stop.is_set():
            return
        optimizer.zero_grad()
        model.loss(scans, findings).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def judge(model: Reader, scans: torch.Tensor, findings: torch.Tensor) -> float:
    return model.loss(scans, findings).item()


async def take_part(address: tuple[str, int], name: str) -> None:
    model = Reader()
    scans, fresh = SCANS[name]
    wanted = FEATURES @ LOOKS_FOR[name]
    own_test = (fresh, fresh @ wanted)
    async with fedllm.join(*address, name=name, fingerprint=FINGERPRINT) as silo:
        async for task in silo.rounds():
            with full_on_trial(model, task.weights, keep_local=KEEP):
                theirs = judge(model, *own_test)
            mine = judge(model, *own_test)
            if theirs <= 2 * mine + 0.1:
                load_full(model, task.weights, keep_local=KEEP)
            else:  # it trains what it has; `await task.decline(...)` would sit the round out
                print(f"round {task.round}: {name} refuses: loss {theirs:.3g}, its own {mine:.3g}")
            seen = 2 * torch.randn_like(scans) if (name, task.round) == BROKEN else scans
            await fedllm.run_in_thread(partial(train, model, seen, scans @ wanted))
            await task.submit(full_arrays(model, keep_local=KEEP), weight=len(scans))
        print(f"{name} ends with loss {judge(model, *own_test):.3g}")


async def main() -> None:
    weights = full_arrays(Reader(), keep_local=KEEP)
    print("the server sees", ", ".join(weights))
    server = fedllm.Federation(
        weights, fedllm.RunConfig(min_silos=2, rounds=ROUNDS), fingerprint=FINGERPRINT
    )
    async with server, asyncio.TaskGroup() as silos:
        address = await server.start()
        for name in CLINICS:
            silos.create_task(take_part(address, name))
        await server.run()


if __name__ == "__main__":
    asyncio.run(main())
