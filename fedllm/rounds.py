"""One federated round as a coroutine, for those who own the loop and the channels.

A round has two phases. Silos train and say READY; when all have, or at the deadline, those who did are the
cohort. The cohort uploads, the updates are folded, and COMMIT tells each silo whether its update counts.
What goes wrong with one silo is its `Outcome`, and never disturbs another.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from aiordma import prepare
from fedllm.aggregate import Aggregation, Arrays, Contribution
from fedllm.config import check_seconds
from fedllm.errors import QuorumNotReached, RoundAbandoned, SettingError
from fedllm.fold import shares_of
from fedllm.messages import Commit, Ready, Task, check_arguments
from fedllm.participation import Outcome, Status, exchange, tell, without_traceback
from fedllm.shards import Peer, Shards
from fedllm.strategy import Strategy
from fedllm.threads import run_in_thread

__all__ = ["BeforeCommit", "RoundResult", "run_round"]

BeforeCommit: TypeAlias = Callable[
    [Mapping[str, NDArray[Any]], Mapping[str, Ready]], Awaitable[object]
]
"""Is given the new weights, and what those reported whose updates are in them, by name."""


LAST_WORD_S: Final = 0.5
"""How long the end of a round waits for silos that are out of it, and have no room for the word that they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """New weights, and how they came about."""

    round: int
    weights: dict[str, NDArray[Any]]
    outcomes: Mapping[str, Outcome]
    """By silo, in the order of the names."""
    metrics: Mapping[str, float]
    """Means over the committed silos of what all of them reported, by their reported weights; plain ones if a silo
    does not disclose its own. Without figures that are not finite."""
    seconds: float


async def run_round(
    channels: Mapping[str, Peer],
    weights: Arrays,
    *,
    round: int,
    strategy: Strategy,
    min_silos: int,
    train_deadline_s: float | None = None,
    upload_deadline_s: float | None = None,
    arguments: Mapping[str, object] | None = None,
    before_commit: BeforeCommit | None = None,
) -> RoundResult:
    """One round with the silos behind `channels`, by name; `weights` are not changed. Sharded silos have `Shards`.

    From the task to READY it may take `train_deadline_s`, and from there to the whole update `upload_deadline_s`; if
    all have to upload once more because a silo fell out (`Aligned`), the second begins anew.
    `arguments` reach the silos' training as they are: anything that msgspec encodes. The result does not
    depend on the order in which anything arrives. `before_commit` is awaited before any silo hears that its update
    counts, to save the new weights, say: what it raises is raised here, and the silos are told that none counts.

    Raises `QuorumNotReached`, with the outcomes, as soon as fewer than `min_silos` can be committed; all silos
    are told. Raises `WeightsError` or `aiordma.TensorError` for weights that cannot be averaged or sent, and
    `SettingError` for other arguments that cannot work.
    Cancelled, it leaves each channel usable or closed, no task, and no thread that folds; the silos learn of it by
    their next task.
    """
    if min_silos < 1:
        raise SettingError(f"min_silos must be at least 1, not {min_silos}")
    for name, seconds in (("train", train_deadline_s), ("upload", upload_deadline_s)):
        if seconds is not None:
            check_seconds(f"{name}_deadline_s", seconds)
    task = Task(round, secrets.randbits(63), check_arguments(arguments or {}))
    leading = _Round(channels, weights, task, strategy, min_silos)
    return await leading.run(train_deadline_s, upload_deadline_s, before_commit)


class _At(enum.Enum):
    TRAINING = "READY"
    UPLOADING = "its update"
    WAITING = "the commit"
    OUT = "nothing"


class _Place:
    """One silo's `Participation` in a `run_round`."""

    def __init__(self, name: str, round_: _Round) -> None:
        self.at = _At.TRAINING
        self.contribution: Contribution | None = None
        self.report: Ready | None = None
        self._name = name
        self._round = round_

    @property
    def task(self) -> Task:
        return self._round.task

    async def ready(self, report: Ready) -> Contribution:
        self.report = report
        weight = self._round.strategy.weight(report.weight)
        with contextlib.ExitStack() as undo:
            # Before the gate: no upload is asked for until all of the cohort have begun.
            self.contribution = self._round.aggregation.begin(self._name, weight)
            undo.callback(self.contribution.abort)
            self._round.move(self, _At.UPLOADING)
            await self._round.pass_gate(self._round.cohort_chosen)
            undo.pop_all()
        return self.contribution

    @property
    def is_awaited(self) -> bool:
        """Whether the others could go on if this silo did."""
        return self.contribution is None or self.contribution.is_awaited

    async def decided(self) -> None:
        self._round.move(self, _At.WAITING)
        await self._round.pass_gate(self._round.folded)


class _Round:
    """Leads the exchanges of one round through its gates."""

    def __init__(
        self,
        channels: Mapping[str, Peer],
        weights: Arrays,
        task: Task,
        strategy: Strategy,
        min_silos: int,
    ) -> None:
        self.task = task
        self.strategy = strategy
        self.aggregation: Aggregation = strategy.aggregation(weights)
        self.cohort_chosen = asyncio.Event()
        self.folded = asyncio.Event()
        self._channels = {name: channels[name] for name in sorted(channels)}
        self._weights = weights
        self._min_silos = min_silos
        self._abandoned: str | None = None
        self._changed = asyncio.Event()
        self._places = {name: _Place(name, self) for name in self._channels}
        self._exchanges: dict[str, asyncio.Task[Outcome]] = {}
        self._out: dict[str, Outcome] = {}
        """Who is out before the end, and is being told so in the place of its exchange."""

    def move(self, place: _Place, at: _At) -> None:
        """A silo got on."""
        place.at = at
        self._changed.set()

    async def pass_gate(self, gate: asyncio.Event) -> None:
        """Wait for a decision. Raises `RoundAbandoned` if it is that the round ends."""
        await gate.wait()
        if self._abandoned is not None:
            raise RoundAbandoned(self._abandoned)

    async def run(
        self, train_s: float | None, upload_s: float | None, before_commit: BeforeCommit | None
    ) -> RoundResult:
        """Do it all; see `run_round`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        outgoing = prepare(self._weights, is_constant=True)
        for name, peer in self._channels.items():
            place = self._places[name]
            if isinstance(peer, Shards):
                task = loop.create_task(peer.exchange(self._weights, place))
            else:
                task = loop.create_task(exchange(peer, outgoing, place))
            task.add_done_callback(lambda _: self._changed.set())
            self._exchanges[name] = task
        weights: dict[str, NDArray[Any]] = {}
        try:
            await self._phase(_At.TRAINING, train_s)
            self.cohort_chosen.set()
            if self._abandoned is None:
                await self._phase(_At.UPLOADING, upload_s)
            if self._abandoned is None:
                weights = await run_in_thread(lambda _: self._fold())
                try:
                    if before_commit is not None:
                        await before_commit(weights, self._reports())
                except Exception:
                    self._abandoned = f"round {self.task.round}: the server could not finish it"
                    await self._end()
                    raise
            outcomes = await self._end()
        finally:
            await _cancel(self._exchanges.values())
            # They know this round, a circle: it would hold whole models until the collector comes by.
            self._places.clear()
        if self._abandoned is not None:
            raise QuorumNotReached(self._abandoned, outcomes)
        return RoundResult(
            round=self.task.round,
            weights=weights,
            outcomes=outcomes,
            metrics=mean_metrics(committed(outcomes)),
            seconds=loop.time() - started,
        )

    def _reports(self) -> dict[str, Ready]:
        """Of those whose updates are folded."""
        places = ((name, self._places[name]) for name in self._under_way(_At.WAITING))
        return {name: place.report for name, place in places if place.report is not None}

    async def _end(self) -> dict[str, Outcome]:
        """Tell all silos; what became of them. Who is out, and reads nothing, is not waited for."""
        self.folded.set()
        under_way = [task for name, task in self._exchanges.items() if name not in self._out]
        if under_way:
            await asyncio.wait(under_way)
        if self._out:
            await asyncio.wait([self._exchanges[name] for name in self._out], timeout=LAST_WORD_S)
        unheard = TimeoutError("it reads nothing")
        return {
            name: task.result() if task.done() else replace(self._out[name], error=unheard)
            for name, task in self._exchanges.items()
        }

    def _fold(self) -> dict[str, NDArray[Any]]:
        self.aggregation.commit()
        return dict(self.strategy.step(self._weights, self.aggregation.result()))

    async def _phase(self, at: _At, deadline_s: float | None) -> None:
        """Wait until nobody is `at` any more; who is to be waited for at the deadline is late, and out.

        Ends early, and abandons the round, when too few are left.
        """
        while self._under_way(at) and len(self._under_way()) >= self._min_silos:
            try:
                async with asyncio.timeout(deadline_s):
                    await self._pass(at)
            except TimeoutError:
                reason = f"{at.value} did not come within {deadline_s} s"
                awaited = [name for name in self._under_way(at) if self._places[name].is_awaited]
                await self._put_out(awaited, at, Status.LATE, reason)
        left = len(self._under_way())
        if left < self._min_silos:
            self._abandoned = (
                f"round {self.task.round}: {left} of {len(self._channels)} silos are left, "
                f"and {self._min_silos} are needed"
            )
            await self._put_out(self._under_way(at), at, Status.ABANDONED, self._abandoned)

    async def _pass(self, at: _At) -> None:
        """Wait until nobody is `at` any more, too few are left, or those who are have to begin anew."""
        restarts = self.aggregation.restarts
        while (
            self._under_way(at)
            and len(self._under_way()) >= self._min_silos
            and self.aggregation.restarts == restarts
        ):
            self._changed.clear()
            await self._changed.wait()

    async def _put_out(self, names: list[str], at: _At, status: Status, reason: str) -> None:
        # Before the fold: a cancelled exchange takes its contribution out.
        await _cancel([self._exchanges[name] for name in names])
        for name in names:
            unanswered = self.task.ticket if at is _At.TRAINING else None
            self._out[name] = Outcome(status=status, reason=reason, unanswered=unanswered)
            told = self._dismiss(name, self._out[name])
            self._exchanges[name] = asyncio.get_running_loop().create_task(told)
            self._places[name].at = _At.OUT

    def _under_way(self, at: _At | None = None) -> list[str]:
        """The silos that are still in the round, or of them those that are `at`."""
        found = []
        for name, task in self._exchanges.items():
            if task.done():
                task.result()  # raises what is no failure of the silo's
            elif self._places[name].at is (at or self._places[name].at) is not _At.OUT:
                found.append(name)
        return found

    async def _dismiss(self, name: str, outcome: Outcome) -> Outcome:
        """Tell a silo that it is out. Goes on beside the round: nobody waits for one silo's ears."""
        unheard = await tell(self._channels[name], Commit(self.task.ticket, False, outcome.reason))
        if unheard is None:
            return outcome
        return replace(outcome, error=without_traceback(unheard))


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


def committed(outcomes: Mapping[str, Outcome]) -> list[Outcome]:
    """Of the committed silos, in the order of the names."""
    return [one for one in outcomes.values() if one.status is Status.COMMITTED]


def mean_metrics(reports: Collection[Ready | Outcome]) -> dict[str, float]:
    """Of what all of them report, by their shares of the reported weights; empty if there are none.

    Who reports a figure that is not finite is left out of its mean: one silo's training may diverge.
    """
    means = {}
    for key in sorted(set.intersection(*(set(one.metrics) for one in reports)) if reports else ()):
        finite = [one for one in reports if math.isfinite(one.metrics[key])]
        if finite:
            shares = shares_of([one.weight for one in finite])
            means[key] = sum(s * one.metrics[key] for s, one in zip(shares, finite, strict=True))
    return means
