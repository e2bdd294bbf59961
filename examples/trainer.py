"""Federated rounds with transformers' Trainer: two silos, each with the source of one Python module.

For LoRA give Trainer a peft model, and take `lora_arrays` and `load_lora` in place of `full_arrays` and `load_full`.

python examples/trainer.py
"""

import argparse
import asyncio
import inspect
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import fedllm
from fedllm.adapters import full_arrays, load_full
from fedllm.trainers import run_trainer

MODULES = {"left": argparse, "right": inspect}
CONFIG = GPT2Config(
    vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)


def make_model() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(CONFIG)
    model.loss_type = "ForCausalLM"  # which transformers cannot tell from the name of the class
    return model


def rows_of(module: ModuleType) -> list[dict[str, torch.Tensor]]:
    """A module's source in rows of 64 bytes, a byte a token."""
    assert module.__file__ is not None
    tokens = torch.tensor(list(Path(module.__file__).read_bytes()))
    return [
        {"input_ids": row, "labels": row}
        for row in tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    ]


def arguments(seed: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        seed=seed,  # of the round: else each would draw the same rows
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


async def take_part(address: tuple[str, int], name: str, folder: str, turn: asyncio.Lock) -> None:
    model, rows = make_model(), rows_of(MODULES[name])
    async with fedllm.join(*address, name=name, fingerprint={}) as silo:
        async for task in silo.rounds():
            load_full(model, task.weights)
            async with turn:
                trainer = Trainer(model, arguments(task.round, folder), train_dataset=rows)
                trainer.remove_callback(PrinterCallback)
                metrics = await run_trainer(trainer)
            await task.submit(
                full_arrays(model), weight=len(rows), metrics={"loss": metrics["train_loss"]}
            )


async def main() -> None:
    server = fedllm.Federation(
        full_arrays(make_model()),
        fedllm.RunConfig(min_silos=2, rounds=3),
        fingerprint={},
        on_round=lambda result: print(f"round {result.round}: loss {result.metrics['loss']:.2f}"),
    )
    turn = asyncio.Lock()  # both silos are in this process, and so is accelerate's one state
    with tempfile.TemporaryDirectory() as folder:
        async with server, asyncio.TaskGroup() as silos:
            address = await server.start()
            for name in MODULES:
                silos.create_task(take_part(address, name, folder, turn))
            await server.run()


if __name__ == "__main__":
    asyncio.run(main())
