"""`python -m fedllm join`: one silo, training on text that never leaves it."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from fedllm import Backoff, EvaluationTask, join
from fedllm.adapters import Arrays
from fedllm.demo.events import Report, Said, Step, Wrote
from fedllm.demo.interrupt import run_interruptibly
from fedllm.demo.learner import Learner, Mode, prepare_learner
from fedllm.demo.model import load_base, silence
from fedllm.demo.text import read_split
from fedllm.demo.training import (
    LONGEST_WINDOW_TOKENS,
    Assignment,
    Tokens,
    encode,
    judge,
    round_seed,
    train,
)
from fedllm.errors import FedError

MAX_JUDGED_TOKENS = 24_576
"""Of held-out text that an evaluation takes, like the demo's last step."""


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `join` is told."""

    host: str
    port: int
    name: str
    base: str
    mode: Mode
    text: str
    threads: int
    out: Path | None
    keep: Path | None
    retry: float


def take_part(options: JoinOptions, report: Report) -> None:
    """Join a server and train in every round as it asks, until the run is over.

    With `out`, the run's final adapter (or model) is written there. SIGINT and SIGTERM leave the
    run, after the training step in progress.
    """
    silence()
    torch.set_num_threads(options.threads)
    base = load_base(options.base)
    text = read_split(options.text)
    tokens = encode(base.tokenizer, text.training)
    held_out = encode(base.tokenizer, text.held_out)
    report(Said(f"{len(tokens):,} tokens to train on"))
    learner = prepare_learner(base, options.mode, seed=0)  # the server's weights replace these
    final = run_interruptibly(_Silo(options, learner, tokens, held_out, report).take_part())
    if options.out is not None and final is not None:
        learner.load(final)
        learner.save(options.out)
        report(Wrote("the federated model", str(options.out)))


class _Silo:
    def __init__(
        self,
        options: JoinOptions,
        learner: Learner,
        tokens: Tokens,
        held_out: Tokens,
        report: Report,
    ) -> None:
        self._options = options
        self._learner = learner
        self._tokens = tokens
        self._held_out = held_out
        self._report = report

    async def take_part(self) -> Arrays | None:
        """Every round until the run is over; the final weights, if the server sent them."""
        options, learner = self._options, self._learner
        async with join(
            options.host,
            options.port,
            name=options.name,
            fingerprint=learner.fingerprint,
            backoff=Backoff(patience_s=options.retry),
            keep=options.keep,
            on_event=lambda what: self._report(Said(what)),
        ) as silo:
            can_judge = len(self._held_out) >= LONGEST_WINDOW_TOKENS
            async for task in silo.rounds(self._evaluate if can_judge else None):
                assignment = _assignment(task.arguments)
                learner.load(task.weights)
                loss = await self._train(task.round, assignment)
                # Views, not copies: nothing trains until the next round, after the commit.
                update = learner.arrays()
                recipe = assignment.recipe
                weight = recipe.steps * recipe.batch
                verdict = await task.submit(update, weight=weight, metrics={"loss": loss})
                if not verdict.accepted:
                    self._report(Said(f"not taken in round {task.round}: {verdict.reason}"))
            return silo.final

    async def _evaluate(self, task: EvaluationTask) -> tuple[float, dict[str, float]]:
        """The loss on held-out text, in nats a token."""
        self._learner.load(task.weights)
        judgement = await asyncio.to_thread(
            judge,
            self._learner.model,
            self._held_out,
            block_tokens=_assignment(task.arguments).recipe.block_tokens,
            limit_tokens=MAX_JUDGED_TOKENS,
        )
        return judgement.tokens, {"loss": judgement.nats / judgement.tokens}

    async def _train(self, round: int, assignment: Assignment) -> float:
        stop = threading.Event()
        steps = assignment.recipe.steps
        try:
            return await asyncio.to_thread(
                train,
                self._learner.model,
                self._tokens,
                assignment.recipe,
                seed=round_seed(assignment.seed, self._options.name, round),
                on_step=lambda step, loss: self._report(Step(f"round {round}", step, steps, loss)),
                stop=stop,
            )
        finally:
            stop.set()  # a thread cannot be cancelled: it looks at this before each step


def _assignment(arguments: Mapping[str, object]) -> Assignment:
    try:
        return msgspec.convert(arguments, Assignment)
    except msgspec.ValidationError as exc:
        raise FedError(f"the server asks for training that this silo does not do: {exc}") from exc
