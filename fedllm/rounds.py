"""One federated round as a coroutine, for those who own the loop and the channels.

A round has two phases. Silos train and say READY; when all have, or at the deadline, those who did are the
cohort. The cohort uploads, the updates are folded, and COMMIT tells each silo whether its update counts.
What goes wrong with one silo is its `Outcome`, and never disturbs another.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import msgspec
from numpy.typing import NDArray

from aiordma import (
    AiordmaError,
    Busy,
    Channel,
    ChannelClosed,
    ChannelError,
    ChecksumError,
    Outgoing,
    Transfer,
    TransferAborted,
    TransferTimeout,
    prepare,
)
from fedllm.aggregate import Aggregation, Arrays, Contribution, check_layout
from fedllm.config import check_seconds
from fedllm.errors import QuorumNotReached, RoundAbandoned, SettingError, UpdateError
from fedllm.messages import FROM_SILO, Commit, Decline, Ready, Task, Upload, is_for
from fedllm.strategy import Strategy

__all__ = [
    "Outcome",
    "Participation",
    "Ready",
    "RoundResult",
    "Status",
    "Task",
    "exchange",
    "run_round",
    "turn_away",
]

UPLOAD_ATTEMPTS: Final = 2
"""How often an upload is asked for that was damaged or given up."""
UPLOAD_START_TIMEOUT_S: Final = 60.0
"""How long a silo that said READY may take to begin its upload; from then on aiordma's idle timeout runs."""
NOTICE_TIMEOUT_S: Final = 10.0
"""How long a silo may take to make room for one small message before it counts as failed."""


class Status(enum.StrEnum):
    """What became of a silo in a round."""

    COMMITTED = "committed"
    """Its update is in the new weights."""
    REFUSED = "refused"
    """Its update, or what it said of it, is not acceptable; or it declined."""
    FAILED = "failed"
    """Its channel or one of its transfers failed."""
    LATE = "late"
    """It missed the deadline of a phase."""
    ABANDONED = "abandoned"
    """The round ended without a result, and nothing was wrong with this silo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one silo in a round. Times are seconds; bytes are tensor bytes."""

    status: Status
    reason: str = ""
    """Why, for a person; also set if a committed silo died before it heard of the commit."""
    error: Exception | None = None
    """The cause, without its traceback, whose frames would keep whole models alive."""
    weight: float | None = None
    """What the silo reported; None before READY."""
    norm: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    """Of the global weights."""
    sent_seconds: float = 0.0
    bytes: int = 0
    """Of the update."""
    seconds: float = 0.0
    """From the request for the update to its last byte."""
    is_busy: bool = False
    """Whether the silo has yet to answer this round's task, so that it would be late for the next as well."""


class Participation(Protocol):
    """One silo's place in a round: the gates between the phases of `exchange`.

    Who owns the loop may let everybody through at once: ``ready`` returns ``aggregation.begin(name,
    report.weight)`` and ``decided`` returns when the aggregation is committed.
    """

    @property
    def task(self) -> Task:
        """What the silo is told to do."""

    async def ready(self, report: Ready) -> Contribution:
        """Wait for the choice of the cohort; the place for the update.

        Raises `UpdateError` for a report that is not acceptable, `RoundAbandoned` if there is no cohort.
        """

    async def decided(self) -> None:
        """The update was added. Wait for the commit. Raises `RoundAbandoned` if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """New weights, and how they came about."""

    round: int
    weights: dict[str, NDArray[Any]]
    outcomes: Mapping[str, Outcome]
    """By silo, in the order of the names."""
    metrics: Mapping[str, float]
    """Means over the committed silos of what all of them reported, by their reported weights."""
    seconds: float


@dataclass(kw_only=True)
class _Record:
    """What is known of an exchange so far."""

    doing: str = "sending the weights"
    report: Ready | None = None
    sent_bytes: int = 0
    sent_seconds: float = 0.0
    bytes: int = 0
    seconds: float = 0.0

    def outcome(self, status: Status, error: Exception | None, *, is_busy: bool) -> Outcome:
        report = self.report
        return Outcome(
            status=status,
            reason=f"{self.doing}: {error}" if error else "",
            error=_without_traceback(error),
            weight=report.weight if report else None,
            norm=report.norm if report else None,
            metrics=report.metrics if report else {},
            sent_bytes=self.sent_bytes,
            sent_seconds=self.sent_seconds,
            bytes=self.bytes,
            seconds=self.seconds,
            is_busy=is_busy,
        )


async def exchange(channel: Channel, outgoing: Outgoing, contribution: Participation) -> Outcome:
    """One silo's half of a round, on the server's side: task, READY, upload, COMMIT.

    `outgoing` are the prepared global weights, which any number of exchanges may share. Has no deadline of its
    own: cancel it, which aborts the contribution and leaves the channel usable; the silo is then to be told by
    a `Commit` that is not accepted, or by the next task. All that goes wrong with the silo is returned.
    """
    record = _Record()
    task = contribution.task
    error: Exception | None = None
    try:
        await _hand_out(channel, outgoing, task, record)
        record.doing = "waiting for READY"
        record.report = await _receive_report(channel, task)
        record.doing = "waiting for the cohort"
        place = await contribution.ready(record.report)
        record.doing = "receiving the update"
        await _contribute(channel, task, place, record)
        record.doing = "waiting for the commit"
        await contribution.decided()
        status = Status.COMMITTED
    except UpdateError as exc:
        status, error = Status.REFUSED, exc
    except RoundAbandoned as exc:
        status, error = Status.ABANDONED, exc
    except (AiordmaError, msgspec.DecodeError) as exc:
        status, error = Status.FAILED, exc
    is_busy = record.report is None and not isinstance(error, UpdateError | msgspec.DecodeError)
    if isinstance(error, ChannelError):
        return record.outcome(status, error, is_busy=False)
    unheard = await _tell(channel, Commit(task.ticket, error is None, str(error or "")))
    if unheard is not None and error is None:
        record.doing, error = "sending the commit", unheard
    return record.outcome(status, error, is_busy=is_busy)


async def _hand_out(channel: Channel, outgoing: Outgoing, task: Task, record: _Record) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    await channel.send(task)
    await channel.send_tensors(outgoing, meta=task.meta(0))
    record.sent_bytes = outgoing.manifest.total_bytes
    record.sent_seconds = loop.time() - started


async def _receive_report(channel: Channel, task: Task) -> Ready:
    while True:
        message: Ready | Decline = await channel.recv(FROM_SILO)
        if message.ticket != task.ticket:
            continue  # late for an earlier task, of whose end the silo was told
        if isinstance(message, Decline):
            raise UpdateError(f"the silo declined: {message.reason}")
        return message


async def _contribute(channel: Channel, task: Task, place: Contribution, record: _Record) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as undo:
        undo.callback(place.abort)
        started = loop.time()
        record.bytes = await _receive_update(channel, task, place.buffers)
        record.seconds = loop.time() - started
        record.doing = "checking the update"
        await asyncio.to_thread(place.add)
        undo.pop_all()


async def _receive_update(channel: Channel, task: Task, buffers: Arrays) -> int:
    for attempt in itertools.count(1):
        await channel.send(Upload(task.ticket, attempt))
        transfer = await _next_update(channel, task, attempt)
        specs = transfer.manifest.tensors
        try:
            check_layout(buffers, ((spec.name, spec.dtype, spec.shape) for spec in specs))
            await transfer.into(buffers)
            break
        except UpdateError as exc:
            await turn_away(transfer, str(exc))
            raise
        except (ChecksumError, TransferAborted):
            if attempt == UPLOAD_ATTEMPTS:
                raise
    return transfer.manifest.total_bytes


async def _next_update(channel: Channel, task: Task, attempt: int) -> Transfer:
    try:
        async with (
            asyncio.timeout(UPLOAD_START_TIMEOUT_S),
            contextlib.aclosing(channel.incoming()) as transfers,
        ):
            async for transfer in transfers:
                if is_for(transfer.meta, task.ticket, attempt):
                    return transfer
                await turn_away(transfer, "it is for another round, or another attempt")
    except TimeoutError as exc:
        raise TransferTimeout(
            f"the silo was asked for its update and began none within {UPLOAD_START_TIMEOUT_S:g} s"
        ) from exc
    raise ChannelClosed("the silo closed the channel before its upload")


async def turn_away(transfer: Transfer, reason: str) -> None:
    """Refuse a transfer, unless its sender has given it up."""
    with contextlib.suppress(Busy):
        await transfer.refuse(reason)


async def _tell(channel: Channel, message: Commit) -> Exception | None:
    """Send the last word of a round; what went wrong, if the silo cannot hear it."""
    try:
        async with asyncio.timeout(NOTICE_TIMEOUT_S):
            await channel.send(message)
    except (AiordmaError, TimeoutError) as exc:
        return exc
    return None


async def run_round(
    channels: Mapping[str, Channel],
    weights: Arrays,
    *,
    round: int,
    strategy: Strategy,
    min_silos: int,
    deadline_s: float | None = None,
    arguments: Mapping[str, object] | None = None,
) -> RoundResult:
    """One round with the silos behind `channels`, by name; `weights` are not changed.

    Each of the two phases, from the task to READY and from there to the whole update, may take `deadline_s`.
    `arguments` reach the silos' training as they are: anything that msgspec encodes. The result does not
    depend on the order in which anything arrives.

    Raises `QuorumNotReached`, with the outcomes, as soon as fewer than `min_silos` can be committed; all silos
    are told. Raises `WeightsError` or `aiordma.TensorError` for weights that cannot be averaged or sent.
    Cancelled, it leaves each channel usable or closed and no task; the silos learn of it by their next task.
    """
    if min_silos < 1:
        raise SettingError(f"min_silos must be at least 1, not {min_silos}")
    if deadline_s is not None:
        check_seconds("deadline_s", deadline_s)
    task = Task(round, secrets.randbits(63), dict(arguments or {}))
    return await _Round(channels, weights, task, strategy, min_silos).run(deadline_s)


class _At(enum.Enum):
    TRAINING = "READY"
    UPLOADING = "its update"
    WAITING = "the commit"
    OUT = "nothing"


class _Place:
    """One silo's `Participation` in a `run_round`."""

    def __init__(self, name: str, round_: _Round) -> None:
        self.at = _At.TRAINING
        self._name = name
        self._round = round_

    @property
    def task(self) -> Task:
        return self._round.task

    async def ready(self, report: Ready) -> Contribution:
        weight = self._round.strategy.weight(report.weight)
        self._round.move(self, _At.UPLOADING)
        await self._round.pass_gate(self._round.cohort_chosen)
        return self._round.aggregation.begin(self._name, weight)

    async def decided(self) -> None:
        self._round.move(self, _At.WAITING)
        await self._round.pass_gate(self._round.folded)


class _Round:
    """Leads the exchanges of one round through its gates."""

    def __init__(
        self,
        channels: Mapping[str, Channel],
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

    def move(self, place: _Place, at: _At) -> None:
        """A silo got on."""
        place.at = at
        self._changed.set()

    async def pass_gate(self, gate: asyncio.Event) -> None:
        """Wait for a decision. Raises `RoundAbandoned` if it is that the round ends."""
        await gate.wait()
        if self._abandoned is not None:
            raise RoundAbandoned(self._abandoned)

    async def run(self, deadline_s: float | None) -> RoundResult:
        """Do it all; see `run_round`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        outgoing = prepare(self._weights)
        for name, channel in self._channels.items():
            task = loop.create_task(exchange(channel, outgoing, self._places[name]))
            task.add_done_callback(lambda _: self._changed.set())
            self._exchanges[name] = task
        weights: dict[str, NDArray[Any]] = {}
        try:
            await self._phase(_At.TRAINING, deadline_s)
            self.cohort_chosen.set()
            if self._abandoned is None:
                await self._phase(_At.UPLOADING, deadline_s)
            if self._abandoned is None:
                weights = await asyncio.to_thread(self._fold)
            self.folded.set()
            outcomes = {name: await task for name, task in self._exchanges.items()}
        finally:
            await _cancel(self._exchanges.values())
        if self._abandoned is not None:
            raise QuorumNotReached(self._abandoned, outcomes)
        return RoundResult(
            round=self.task.round,
            weights=weights,
            outcomes=outcomes,
            metrics=_mean_metrics(outcomes),
            seconds=loop.time() - started,
        )

    def _fold(self) -> dict[str, NDArray[Any]]:
        self.aggregation.commit()
        return dict(self.strategy.step(self._weights, self.aggregation.result()))

    async def _phase(self, at: _At, deadline_s: float | None) -> None:
        """Wait until nobody is `at` any more; who still is at the deadline is late, and out.

        Ends early, and abandons the round, when too few are left.
        """
        status = Status.ABANDONED
        try:
            async with asyncio.timeout(deadline_s):
                while self._under_way(at) and len(self._under_way()) >= self._min_silos:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            status = Status.LATE
        slow = self._under_way(at)
        left = len(self._under_way()) - (len(slow) if status is Status.LATE else 0)
        if left < self._min_silos:
            self._abandoned = (
                f"round {self.task.round}: {left} of {len(self._channels)} silos are left, "
                f"and {self._min_silos} are needed"
            )
        reason = str(self._abandoned)
        if status is Status.LATE:
            reason = f"{at.value} did not come within {deadline_s} s"
        # Before the fold: a cancelled exchange takes its contribution out.
        await _cancel([self._exchanges[name] for name in slow])
        for name in slow:
            told = self._dismiss(
                name, Outcome(status=status, reason=reason, is_busy=at is _At.TRAINING)
            )
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
        unheard = await _tell(self._channels[name], Commit(self.task.ticket, False, outcome.reason))
        if unheard is None:
            return outcome
        return replace(outcome, error=_without_traceback(unheard))


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


def _mean_metrics(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    committed = [o for o in outcomes.values() if o.status is Status.COMMITTED]
    shared = set.intersection(*(set(o.metrics) for o in committed))
    total = sum(o.weight or 0.0 for o in committed)
    return {
        key: sum((o.weight or 0.0) * o.metrics[key] for o in committed) / total
        for key in sorted(shared)
    }


def _without_traceback(error: BaseException | None) -> Any:
    link = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
