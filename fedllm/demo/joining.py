"""`python -m fedllm join`: one silo, training on text that never leaves it."""

import asyncio
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from fedllm import Backoff, EvaluationTask, Policy, RoundTask, join, run_in_thread
from fedllm.adapters import Arrays
from fedllm.checkpoint import load_checkpoint, save_checkpoint
from fedllm.demo.arguments import LONGEST_WINDOW_TOKENS
from fedllm.demo.consent import preview
from fedllm.demo.events import Report, Said, Step, Wrote
from fedllm.demo.learner import Learner, Mode, prepare_learner
from fedllm.demo.model import load_base, silence
from fedllm.demo.text import read_split
from fedllm.demo.training import (
    Assignment,
    Judgement,
    Tokens,
    TooLittleText,
    encode,
    judge,
    round_seed,
    train,
)
from fedllm.demo.verdict import perplexity
from fedllm.errors import FedError
from fedllm.interrupt import run_interruptibly

ANYTHING = Policy()
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
    keep_local: Sequence[str] = ()
    refuse_above: float | None = None
    policy: Policy = ANYTHING
    journal: Path | None = None
    proxy: str | None = None
    dry_run: bool = False


def take_part(options: JoinOptions, report: Report) -> None:
    """Join a server and train in every round as it asks, until the run is over.

    With `out`, the run's final adapter (or model), with this silo's own layers in it, is written
    there. SIGINT and SIGTERM leave the run, after the training step in progress. A dry run says what would leave, and
    ends.
    """
    silence()
    torch.set_num_threads(options.threads)
    base = load_base(options.base)
    text = read_split(options.text)
    tokens = encode(base.tokenizer, text.training)
    held_out = encode(base.tokenizer, text.held_out)
    report(Said(f"{len(tokens):,} tokens to train on"))
    # The server's weights replace these, but for the layers that stay here.
    learner = prepare_learner(base, options.mode, seed=0, keep_local=options.keep_local)
    if options.refuse_above is not None and len(held_out) < base.block_tokens:
        raise TooLittleText("--refuse-above needs held-out text to judge by: give this silo more")
    if options.dry_run:
        for line in preview(
            learner.arrays(),
            options.policy,
            server=f"{options.host}:{options.port}",
            name=options.name,
            fingerprint=learner.fingerprint,
        ):
            report(Said(line))
        return
    silo = _Silo(options, learner, tokens, held_out, report)
    has_final = run_interruptibly(silo.take_part())
    if options.out is not None and has_final:
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

    async def take_part(self) -> bool:
        """Every round until the run is over; whether the server then sent its final weights."""
        options, learner = self._options, self._learner
        await asyncio.to_thread(self._restore)
        async with join(
            options.host,
            options.port,
            name=options.name,
            fingerprint=learner.fingerprint,
            backoff=Backoff(patience_s=options.retry),
            keep=options.keep,
            policy=options.policy,
            journal=options.journal,
            proxy=options.proxy,
            on_event=lambda what: self._report(Said(what)),
        ) as silo:
            can_judge = len(self._held_out) >= LONGEST_WINDOW_TOKENS
            async for task in silo.rounds(self._evaluate if can_judge else None):
                await self._do(task)
            if silo.final is not None:
                await self._adopt(silo.final, "the last round")
            return silo.final is not None

    async def _do(self, task: RoundTask) -> None:
        try:
            assignment = _assignment(task.arguments)
        except FedError as exc:
            self._report(Said(f"round {task.round}: refused: {exc}"))
            await task.decline(str(exc))
            return
        await self._adopt(task.weights, f"round {task.round}")
        loss = await run_in_thread(partial(self._train, task.round, assignment))
        await asyncio.to_thread(self._save, task.round)
        # Views, not copies: nothing trains until the next round, after the commit.
        update = self._learner.arrays()
        weight = assignment.recipe.steps * assignment.recipe.batch
        verdict = await task.submit(update, weight=weight, metrics={"loss": loss})
        if not verdict.accepted:
            self._report(Said(f"not taken in round {task.round}: {verdict.reason}"))

    async def _adopt(self, weights: Arrays, when: str) -> None:
        """Load the global weights, unless they are worse here than this silo allows: then its own stay."""
        limit = self._options.refuse_above
        if limit is not None:
            mine, theirs = await run_in_thread(lambda stop: self._compare(weights))
            if (
                math.isnan(theirs) or theirs > limit * mine
            ):  # if ours is no number, theirs is better
                self._report(
                    Said(
                        f"{when}: refuses the server's weights, of perplexity {theirs:.1f} here; "
                        f"its own stay, of {mine:.1f}"
                    )
                )
                return
        self._learner.load(weights)

    def _compare(self, weights: Arrays) -> tuple[float, float]:
        """Perplexity on held-out text: of this silo's own weights, and of the server's."""
        block_tokens = self._learner.base.block_tokens
        mine = self._judge(block_tokens)
        with self._learner.on_trial(weights):
            theirs = self._judge(block_tokens)
        return perplexity(mine.nats, mine.tokens), perplexity(theirs.nats, theirs.tokens)

    def _judge(self, block_tokens: int) -> Judgement:
        return judge(
            self._learner.model,
            self._held_out,
            block_tokens=block_tokens,
            limit_tokens=MAX_JUDGED_TOKENS,
        )

    async def _evaluate(self, task: EvaluationTask) -> tuple[float, dict[str, float]]:
        """The loss on held-out text, in nats a token; this silo's own weights stay."""

        def evaluate(stop: threading.Event) -> Judgement:
            with self._learner.on_trial(task.weights):
                return self._judge(_assignment(task.arguments).recipe.block_tokens)

        judgement = await run_in_thread(evaluate)
        return judgement.tokens, {"loss": judgement.nats / judgement.tokens}

    def _train(self, round: int, assignment: Assignment, stop: threading.Event) -> float:
        steps = assignment.recipe.steps
        return train(
            self._learner.model,
            self._tokens,
            assignment.recipe,
            seed=round_seed(assignment.seed, self._options.name, round),
            on_step=lambda step, loss: self._report(Step(f"round {round}", step, steps, loss)),
            stop=stop,
        )

    def _restore(self) -> None:
        """Take up the weights that are this silo's own: only a folder outlives the process."""
        folder, name = self._options.keep, f"own-{self._options.name}"
        if self._has_own and folder is not None and (folder / f"{name}.json").exists():
            whole = self._learner.whole()
            weights, _ = load_checkpoint(folder, name, whole.arrays())
            whole.load(weights)

    def _save(self, round: int) -> None:
        folder, name = self._options.keep, f"own-{self._options.name}"
        if self._has_own and folder is not None:
            save_checkpoint(folder, name, self._learner.whole().arrays(), {"round": round})

    @property
    def _has_own(self) -> bool:
        return bool(self._options.keep_local) or self._options.refuse_above is not None


def _assignment(arguments: Mapping[str, object]) -> Assignment:
    try:
        return msgspec.convert(arguments, Assignment)
    except msgspec.ValidationError as exc:
        raise FedError(f"the server asks for training that this silo does not do: {exc}") from exc
