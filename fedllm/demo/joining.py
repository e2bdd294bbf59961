"""`python -m fedllm join`: one silo, training on text that never leaves it."""

import asyncio
import threading
from dataclasses import dataclass

import msgspec
import torch

from fedllm import join
from fedllm.demo.events import Report, Said, Step
from fedllm.demo.learner import Learner, Mode, prepare_learner
from fedllm.demo.model import load_base, silence
from fedllm.demo.text import read_split
from fedllm.demo.training import Assignment, Tokens, encode, round_seed, train


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `join` is told."""

    host: str
    port: int
    name: str
    base: str
    mode: Mode
    text: str
    seed: int
    threads: int


async def take_part(options: JoinOptions, report: Report) -> None:
    """Join a server, train in every round as it asks, until the run is over."""
    silence()
    torch.set_num_threads(options.threads)
    base = load_base(options.base)
    learner = prepare_learner(base, options.mode, seed=options.seed)
    tokens = encode(base.tokenizer, read_split(options.text).training)
    report(Said(f"{len(tokens):,} tokens to train on"))
    async with join(
        options.host, options.port, name=options.name, fingerprint=learner.fingerprint
    ) as silo:
        async for task in silo.rounds():
            assignment = msgspec.convert(task.arguments, Assignment)
            learner.load(task.weights)
            loss = await _train(learner, tokens, assignment, options.name, task.round, report)
            recipe = assignment.recipe
            await task.submit(
                learner.arrays(), weight=recipe.steps * recipe.batch, metrics={"loss": loss}
            )


async def _train(
    learner: Learner, tokens: Tokens, assignment: Assignment, name: str, round: int, report: Report
) -> float:
    """One round's training in a thread; cancelling ends that thread after the step in progress."""
    stop = threading.Event()
    steps = assignment.recipe.steps
    try:
        return await asyncio.to_thread(
            train,
            learner.model,
            tokens,
            assignment.recipe,
            seed=round_seed(assignment.seed, name, round),
            on_step=lambda step, loss: report(Step(f"round {round}", step, steps, loss)),
            stop=stop,
        )
    finally:
        stop.set()
