"""Training in a thread: `run_in_thread` for anything that blocks, `run_trainer` for transformers' Trainer."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedllm import run_in_thread
from fedllm.trainers import run_trainer
from tests.tiny_models import tiny_gpt2


async def test_it_returns_and_raises_what_the_training_does():
    assert await run_in_thread(lambda stop: (stop.is_set(), threading.current_thread().name)) != (
        False,
        threading.current_thread().name,
    )
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(lambda stop: 1 / 0)


@pytest.mark.parametrize("raises", [False, True])
async def test_cancelled_it_returns_when_the_training_has_stopped(raises: bool):
    loop, is_training = asyncio.get_running_loop(), asyncio.Event()
    may_end, trail = threading.Event(), []

    def train(stop: threading.Event) -> None:
        loop.call_soon_threadsafe(is_training.set)
        stop.wait()
        may_end.wait()
        trail.append("the last step")
        if raises:
            raise RuntimeError("stopped")

    task = asyncio.create_task(run_in_thread(train))
    await is_training.wait()
    done = []
    for _ in range(3):  # the second and third find it waiting for the step in progress
        task.cancel()
        await asyncio.wait({task}, timeout=0)
        done.append(task.done())
    may_end.set()
    assert done == [False] * 3
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trail == ["the last step"]


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that tell which of them were read."""

    def __init__(self, on_read: Callable[[int], object] = lambda index: None) -> None:
        self.read: list[int] = []
        self._on_read = on_read

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        self._on_read(len(self.read))
        ids = torch.full((8,), index)
        return {"input_ids": ids, "labels": ids}


def trainer_of(rows: Sentences, folder: Any, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", per_device_train_batch_size=2, learning_rate=0.1,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return Trainer(tiny_gpt2(), arguments, train_dataset=rows)


async def test_a_trainer_trains_its_model_in_place(tmp_path):
    trainer = trainer_of(Sentences(), tmp_path, max_steps=3)
    assert trainer.model is not None
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    callbacks = list(trainer.callback_handler.callbacks)
    metrics = await run_trainer(trainer)
    assert metrics["train_loss"] > 0
    assert trainer.state.global_step == 3
    assert not any(map(torch.equal, trainer.model.parameters(), before))
    assert trainer.callback_handler.callbacks == callbacks


async def test_a_trainer_a_round_draws_other_rows_each_round(tmp_path):
    read = []
    for seed in (1, 2, 1):
        rows = Sentences()
        await run_trainer(trainer_of(rows, tmp_path, max_steps=3, seed=seed))
        read.append(rows.read)
    assert read[0] == read[2] != read[1]


async def test_cancelled_a_trainer_ends_after_the_step_in_progress(tmp_path):
    loop, is_training = asyncio.get_running_loop(), asyncio.Event()
    rows = Sentences(lambda count: count < 6 or loop.call_soon_threadsafe(is_training.set))
    trainer = trainer_of(rows, tmp_path, max_steps=1_000_000)
    steps: list[int] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer.add_callback(Counts())
    task = asyncio.create_task(run_trainer(trainer))
    await is_training.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trainer.state.global_step == len(steps) < 1_000_000
