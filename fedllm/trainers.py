"""transformers' `Trainer` in a coroutine.

Plain torch needs no more than `fedllm.run_in_thread`, and Accelerate no more than that: the arrays are
those of ``accelerator.unwrap_model(model)``.
"""

import threading
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl

from fedllm.threads import run_in_thread

__all__ = ["run_trainer"]


async def run_trainer(trainer: Trainer) -> dict[str, float]:
    """``trainer.train()`` in a thread; its metrics, "train_loss" among them.

    Make a Trainer a round, with a seed of that round (``TrainingArguments(seed=...)``): one that is used
    again keeps its optimizer's moments, which belong to weights that are gone, and draws the same batches
    in the same order each time. One at a time in a process, from making it on: accelerate keeps one state for all
    Trainers, and a new one clears it. `trainer.model` is trained in place, where `full_arrays` or
    `lora_arrays` find it.

    Cancelled, training ends after the step in progress, and this returns when it has: see `run_in_thread`.
    """

    def train(stop: threading.Event) -> dict[str, float]:
        callback = _StopsWhenTold(stop)
        trainer.add_callback(callback)
        try:
            return dict(trainer.train().metrics)
        finally:
            trainer.remove_callback(callback)

    return await run_in_thread(train)


class _StopsWhenTold(TrainerCallback):
    """The one way that Trainer has to be stopped from outside."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """After each optimizer step; Trainer looks at the flag next."""
        if self._stop.is_set():
            control.should_training_stop = True
