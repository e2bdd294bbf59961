"""The server's side of a run: the loop over rounds, and its state on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Self

import msgspec

import aiordma
from aiordma import ChannelConfig, ChannelError, prepare
from fedllm.aggregate import Arrays
from fedllm.checkpoint import Checkpoints
from fedllm.config import RunConfig
from fedllm.errors import CheckpointError, FedError, QuorumNotReached
from fedllm.evaluation import Evaluation, run_evaluation
from fedllm.history import History, Progress, RoundRecord, State
from fedllm.hooks import Hook, SiloHook, Told, call
from fedllm.membership import Membership, choose
from fedllm.messages import Ready, check_arguments
from fedllm.participation import Outcome, Status
from fedllm.rounds import RoundResult, mean_metrics, run_round
from fedllm.strategy import FedAvg, Strategy
from fedllm.threads import finish_in_thread
from fedllm.tries import Tries

__all__ = ["Federation"]


class Federation:
    """Admits silos and runs rounds with them, for those who do not own the loop and the channels.

    ``history = await Federation(weights, RunConfig(...), ...).run(host, port)``, or, to know the address first::

        async with Federation(weights, RunConfig(...), ...) as server:
            await server.start()
            ... server.address ...
            history = await server.run()

    Silos that join while a round is under way take part from the next one. A silo that was late is left out
    until it has caught up. One whose channel broke is no member any more, and may join again by its name.
    """

    def __init__(
        self,
        weights: Arrays,
        settings: RunConfig,
        *,
        fingerprint: Mapping[str, str],
        strategy: Strategy | None = None,
        arguments: Mapping[str, object] | None = None,
        checkpoints: Checkpoints | None = None,
        on_round: Hook[RoundResult] | None = None,
        on_evaluation: Hook[Evaluation] | None = None,
        on_silo: SiloHook | None = None,
        config: ChannelConfig | None = None,
    ) -> None:
        """`weights`: the first global weights; they are not changed. `arguments` are explained in `run_round`.

        `fingerprint`: digests by what they are of ("weights", "tokenizer", "adapter"); a silo with any other is
        refused. `strategy`: `FedAvg()` if None. `checkpoints`: where the first weights and those of each round
        are saved, before anything else is done with them; see `resume`.
        `on_round` and `on_evaluation` are called (and awaited, if they return an awaitable) after each round that
        succeeded and is saved, and each evaluation; a server that dies just before has not called them, and one that
        resumes does not call them again. `on_silo` is called with a silo's name, or the address of one that has none,
        and what became of it: "rank 0 of 2 is there" (if it is sharded), "joined", "refused: ...",
        "caught up" (it was late), "gone: ...", and, of a try that lost its quorum, "refused in round 3: ..." or the
        like; if it returns an awaitable, that is awaited beside the run, before the one of the next call, and dropped
        if it is not over a second after the run is. What they raise ends the run, or that silo's membership.

        Raises `WeightsError` for weights that cannot be averaged, `aiordma.TensorError` for such that cannot be
        sent, `SettingError` for arguments that no silo can be told.
        """
        self._settings = settings
        self._weights: Arrays = dict(weights)
        self._strategy: Strategy = FedAvg() if strategy is None else strategy
        # Both raise what a round would raise.
        takes_parts = self._strategy.aggregation(self._weights).takes_parts
        prepare(self._weights)
        self._fingerprint = dict(fingerprint)
        self._arguments = check_arguments(arguments or {})
        self._checkpoints = checkpoints
        self._on_round = on_round
        self._on_evaluation = on_evaluation
        self._told = Told(on_silo)
        self._config = config
        self._members = Membership(
            settings, fingerprint, self._weights, self._told.tell, takes_parts=takes_parts
        )
        self._records: list[RoundRecord] = []
        self._progress = Progress()
        self._saved: Progress | None = None
        self._serving: aiordma.Server | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on. Raises `FedError` unless it does."""
        if self._serving is None:
            raise FedError("the server does not listen: start() comes first")
        return self._serving.address

    @property
    def history(self) -> History:
        """What the run has come to so far; also after it failed, or was cancelled."""
        return History(weights=self._weights, rounds=tuple(self._records))

    @property
    def round(self) -> int:
        """How many rounds have succeeded, those before a `resume` included."""
        return self._progress.round

    @property
    def silos(self) -> tuple[str, ...]:
        """The names of the members, sorted."""
        return self._members.names

    async def resume(self) -> int:
        """Take the newest checkpoint's weights and go on from there; the number of rounds that are done.

        To be called before `start` and `run`. A folder without checkpoints is a run that begins. However a server
        ended (kill -9, a crash of its host), the run goes on with the round that it was in, from the same weights;
        silos find it again by themselves. Raises `CheckpointError` for a checkpoint that cannot be read or is of
        another run.
        """
        if self._checkpoints is None:
            raise FedError("there is nothing to resume from: give the server checkpoints")
        if self._serving is not None:
            raise FedError("resume() comes before start(): silos are told of the run as they join")
        rounds = await asyncio.to_thread(self._checkpoints.rounds)
        if not rounds:
            return 0
        state = await asyncio.to_thread(self._read, self._checkpoints, rounds[-1])
        load = self._checkpoints.load
        self._weights, _ = await asyncio.to_thread(load, rounds[-1], self._weights)
        self._members.run = state.run
        self._go_on_from(state.progress)
        self._saved = state.progress
        return state.progress.round

    def _read(self, checkpoints: Checkpoints, round: int) -> State:
        try:
            state = msgspec.convert(checkpoints.state(round), State)
        except msgspec.ValidationError as exc:
            objection = str(exc)
        else:
            if state.fingerprint == self._fingerprint:
                return state
            objection = (
                f"its fingerprint is {state.fingerprint}, and this run's {self._fingerprint}"
            )
        raise CheckpointError(
            f"the checkpoint of round {round} in {checkpoints.folder} is of another run ({objection}): give this run a "
            "folder of its own"
        )

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False
    ) -> tuple[str, int]:
        """Save the first weights, listen, and admit silos from now on; the address.

        Raises like `aiordma.listen`, and `CheckpointError`: if the weights cannot be saved, or the checkpoints are of
        an earlier run that was not resumed.
        """
        if self._serving is not None:
            raise FedError("the server listens already")
        await self._save(self._weights, self._progress)
        self._serving = await aiordma.serve(
            self._members.serve, host, port, config=self._config, insecure=insecure
        )
        return self._serving.address

    async def run(
        self, host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False
    ) -> History:
        """Start unless that was done, run all rounds, send the final weights and say goodbye, close.

        A round that lost its quorum is tried again with the same weights, once a quorum is there again that is free.
        Who is late, stalls, or sends what cannot be averaged in two tries is out for the round; whose connection
        broke in two is asked only if there is no quorum of others, after pauses that double. Raises
        `QuorumNotReached` when too few are left, or when the silos stay away for `absence_timeout_s`; the silos are
        told. Raises `CheckpointError` when a round cannot be saved: it does not count, the silos are told so, and come
        back to whoever resumes. Cancelled, it closes the channels and leaves nothing behind. What the run had come
        to is `history`; run again, it goes on from there.
        """
        try:
            if self._serving is None:
                await self.start(host, port, insecure=insecure)
            try:
                await self._run_rounds()
            except QuorumNotReached as exc:
                await self._members.give_up(exc.reason)
                raise
            await self._members.part(self._weights, self._progress.cohort)
            await self._told.aclose()
            self._told.check()
            return self.history
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Stop listening and close all channels. A closed server can be started again."""
        serving, self._serving = self._serving, None
        try:
            if serving is not None:
                await serving.aclose()
        finally:
            await self._told.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    # Rounds

    async def _run_rounds(self) -> None:
        await self._evaluate()
        if not self._is_over():
            await self._members.gather(self._settings.expect or self._settings.min_silos)
        while not self._is_over():
            result = await self._succeed()
            self._records.append(RoundRecord.of(result))
            await call(self._on_round, result)
            self._told.check()
            await self._evaluate()

    def _is_over(self) -> bool:
        stop = self._settings.stop
        return self._progress.round >= self._settings.rounds or (
            stop is not None and stop.is_due(self._progress.figures)
        )

    async def _take_over(self, weights: Arrays, reports: Mapping[str, Ready]) -> None:
        """Save a round's new weights, of which nobody has heard yet, and go on from there."""
        figures = self._progress.figures
        if self._settings.evaluate_every is None:
            figures += self._figure(mean_metrics(reports.values()))
        progress = replace(
            self._progress,
            round=self._progress.round + 1,
            cohort=tuple(reports),
            figures=figures,
        )
        await self._save(weights, progress)
        self._weights = weights
        self._go_on_from(progress)

    def _figure(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        stop = self._settings.stop
        return (metrics[stop.metric],) if stop and stop.metric in metrics else ()

    def _go_on_from(self, progress: Progress) -> None:
        self._progress = progress
        self._members.round = progress.round + 1

    async def _save(self, weights: Arrays, progress: Progress) -> None:
        """Save how far the run has come, unless that is saved; and, if they are new, the weights.

        Cancelled, it finishes first.
        """
        checkpoints = self._checkpoints
        if checkpoints is None or self._saved == progress:
            return
        if self._saved is None and (rounds := await asyncio.to_thread(checkpoints.rounds)):
            raise CheckpointError(
                f"{checkpoints.folder} holds round {rounds[-1]} of an earlier run: resume it (--resume), or give "
                "this run a folder of its own"
            )
        run = self._members.run
        state = asdict(State(run=run, fingerprint=self._fingerprint, progress=progress))

        def save() -> None:
            if self._saved is not None and self._saved.round == progress.round:
                checkpoints.amend(progress.round, state)
            else:
                checkpoints.save(progress.round, weights, state)
            self._saved = progress

        await finish_in_thread(save)

    async def _succeed(self) -> RoundResult:
        """One round, tried until it has its quorum."""
        settings, number = self._settings, self._progress.round + 1
        tries = Tries(settings.min_silos)
        while True:
            try:
                # Those who do not die each time come first; but the busy ones of them may never catch up.
                async with asyncio.timeout(tries.patience_s(settings.absence_timeout_s)):
                    free = await self._members.gather(settings.min_silos, tries.worth_asking)
            except TimeoutError:
                free = await self._members.gather(settings.min_silos, tries.left)
            asked = {name: free[name] for name in self._choose(free)}
            try:
                result = await run_round(
                    asked,
                    self._weights,
                    round=number,
                    strategy=self._strategy,
                    min_silos=settings.min_silos,
                    train_deadline_s=settings.train_deadline_s,
                    upload_deadline_s=settings.upload_deadline_s,
                    arguments=self._arguments,
                    before_commit=self._take_over,
                )
            except QuorumNotReached as exc:
                self._members.settle(asked, exc.outcomes)
                self._tell_faults(number, exc.outcomes)
                tries.note(exc.outcomes)
                # Who is late catches up, and who died may come back: both are worth waiting for.
                there = {*self._members.names, *asked}
                if tries.is_hopeless(there):
                    raise
                await asyncio.sleep(tries.pause_s(there))
            else:
                self._members.settle(asked, result.outcomes)
                return result

    def _tell_faults(self, round: int, outcomes: Mapping[str, Outcome]) -> None:
        """What no `on_round` will tell; of those whose channel broke the membership does."""
        for name, outcome in outcomes.items():
            is_told = isinstance(outcome.error, ChannelError)
            if outcome.status is not Status.ABANDONED and not is_told:
                self._told.tell(name, f"{outcome.status} in round {round}: {outcome.reason}")

    def _choose(self, free: Collection[str]) -> list[str]:
        settings = self._settings
        return choose(
            free,
            round=self._progress.round + 1,
            seed=settings.seed,
            fraction=settings.fraction,
            at_least=settings.min_silos,
        )

    async def _evaluate(self) -> None:
        """Let the silos judge the weights, if that is due and was not done."""
        every, round = self._settings.evaluate_every, self._progress.round
        if every is None or not round or round % every or self._progress.evaluated == round:
            return
        asked = await self._members.gather(self._settings.min_silos)
        evaluation = await run_evaluation(
            asked,
            self._weights,
            round=round,
            deadline_s=self._settings.train_deadline_s,
            arguments=self._arguments,
        )
        self._members.settle(asked, evaluation.outcomes)
        figures = self._progress.figures + self._figure(evaluation.metrics)
        self._progress = replace(self._progress, evaluated=round, figures=figures)
        await self._save(self._weights, self._progress)
        await call(self._on_evaluation, evaluation)
