"""Federated rounds with a training loop of Accelerate's: two silos, each with the source of one Python module.

Accelerate moves and wraps the model; what is sent and loaded is what it wraps, `accelerator.unwrap_model`. In one
process: a silo of several ranks is another matter.

python examples/accelerated.py
"""

import argparse
import asyncio
import inspect
import threading
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import fedllm
from fedllm.adapters import full_arrays, load_full

MODULES = {"left": argparse, "right": inspect}
CONFIG = GPT2Config(
    vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
STEPS = 30


def make_model() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(CONFIG)
    model.loss_type = "ForCausalLM"  # which transformers cannot tell from the name of the class
    return model


def rows_of(module: ModuleType) -> list[torch.Tensor]:
    """A module's source in rows of 64 bytes, a byte a token."""
    assert module.__file__ is not None
    tokens = torch.tensor(list(Path(module.__file__).read_bytes()))
    return list(tokens[: len(tokens) // 64 * 64].reshape(-1, 64))


class Training:
    """One silo's loop: prepared once, run each round."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        loader = DataLoader(rows, batch_size=8, shuffle=True)  # type: ignore[arg-type, var-annotated]
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        prepared = self.accelerator.prepare(model, optimizer, loader)
        self.model, self.optimizer, self.loader = prepared

    @property
    def plain(self) -> torch.nn.Module:
        plain: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return plain

    def run(self, stop: threading.Event) -> float:
        self.optimizer.state.clear()  # its moments are of weights that are gone
        losses: list[float] = []
        for _, batch in zip(range(STEPS), self.loader, strict=False):
            if stop.is_set():
                break
            loss = self.model(input_ids=batch, labels=batch).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / STEPS


async def take_part(address: tuple[str, int], name: str) -> None:
    rows = rows_of(MODULES[name])
    training = Training(rows)
    async with fedllm.join(*address, name=name, fingerprint={}) as silo:
        async for task in silo.rounds():
            load_full(training.plain, task.weights)
            loss = await fedllm.run_in_thread(training.run)
            await task.submit(full_arrays(training.plain), weight=len(rows), metrics={"loss": loss})


async def main() -> None:
    server = fedllm.Federation(
        full_arrays(make_model()),
        fedllm.RunConfig(min_silos=2, rounds=3),
        fingerprint={},
        on_round=lambda result: print(f"round {result.round}: loss {result.metrics['loss']:.2f}"),
    )
    async with server, asyncio.TaskGroup() as silos:
        address = await server.start()
        for name in MODULES:
            silos.create_task(take_part(address, name))
        await server.run()


if __name__ == "__main__":
    asyncio.run(main())
