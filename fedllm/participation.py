"""One silo's half of a round, on the server's side: what is said and sent over its channel, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

from aiordma import (
    AiordmaError,
    Channel,
    ChannelError,
    ChecksumError,
    MessageError,
    Outgoing,
    Transfer,
    TransferAborted,
    TransferTimeout,
)
from fedllm.aggregate import Contribution, check_weight
from fedllm.door import Door, turn_away
from fedllm.errors import RoundAbandoned, StagingError, UpdateError
from fedllm.messages import FROM_SILO, Begin, Commit, Decline, Ready, Task, Upload
from fedllm.patience import patience
from fedllm.sending import send_while_taken

__all__ = [
    "Outcome",
    "Participation",
    "Ready",
    "Status",
    "Task",
    "answered",
    "ask",
    "exchange",
    "tell",
]

TAKING_TIMEOUT_S: Final = 600.0
"""How long a silo may take nothing of the weights. It may still be busy with its own work on the round before; once it
has them, its training takes as long as it does."""
UPLOAD_ATTEMPTS: Final = 2
"""How often an upload is asked for that was damaged or given up."""
UPLOAD_START_TIMEOUT_S: Final = 60.0
"""How long a silo that said READY may take to begin its upload; from then on aiordma's idle timeout runs."""
NOTICE_TIMEOUT_S: Final = 10.0
"""How long a silo may take to make room for one small message before it counts as failed."""


Begins: TypeAlias = Callable[[], Awaitable[object]]


class Status(enum.StrEnum):
    """What became of a silo in a round."""

    COMMITTED = "committed"
    """Its update is in the new weights; or, in an evaluation, its metrics in the means."""
    REFUSED = "refused"
    """Its update, or what it said of it, is not acceptable; or it declined."""
    FAILED = "failed"
    """Its channel or one of its transfers failed, or there was no room for its update."""
    LATE = "late"
    """It missed the deadline of a phase."""
    ABANDONED = "abandoned"
    """The round ended without a result, and nothing was wrong with this silo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one silo in a round. Times are seconds; bytes are tensor bytes."""

    status: Status
    reason: str = ""
    """Why, for a person; also set if a committed silo died before it heard of the commit, or uploaded what nobody had
    asked for, which was turned away."""
    error: Exception | None = None
    """The cause, without its traceback, whose frames would keep whole models alive."""
    weight: float | None = None
    """What the silo reported; None before READY, or if it does not disclose it."""
    norm: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    """Of the global weights."""
    sent_seconds: float = 0.0
    bytes: int = 0
    """Of the update."""
    seconds: float = 0.0
    """From the request for the update until it was taken whole."""
    unanswered: int | None = None
    """The ticket of this round's task, if the silo has yet to say Ready or Decline to it."""

    @property
    def is_busy(self) -> bool:
        """Whether it has yet to answer this round's task, so that it would be late for the next as well."""
        return self.unanswered is not None


class Hearer(Protocol):
    """A channel, or several that are told the same."""

    async def send(self, obj: Any) -> None:
        """Tell it. Raises an `aiordma` error."""


class Participation(Protocol):
    """One silo's place in a round: the gates between the phases of `exchange`.

    Who owns the loop may let everybody through at once: ``ready`` returns ``aggregation.begin(name,
    report.weight)``, which with `Aligned` all do before the first upload, and ``decided`` returns when the aggregation
    is committed.
    """

    @property
    def task(self) -> Task:
        """What the silo is told to do."""

    async def ready(self, report: Ready) -> Contribution:
        """Wait for the choice of the cohort; the place for the update.

        Raises `UpdateError` for a report that is not acceptable, `StagingError` if there is no room for the update,
        `RoundAbandoned` if there is no cohort.
        """

    async def decided(self) -> None:
        """The update was added. Wait for the commit. Raises `RoundAbandoned` if there is none."""


@dataclass(kw_only=True)
class _Record:
    """What is known of an exchange so far."""

    door: Door
    doing: str = "sending the weights"
    is_asked: bool = False
    report: Ready | None = None
    sent_bytes: int = 0
    sent_seconds: float = 0.0
    bytes: int = 0
    seconds: float = 0.0

    def outcome(self, status: Status, error: Exception | None, unanswered: int | None) -> Outcome:
        """What it amounts to, now that the exchange is over."""
        report = self.report
        reasons = (f"{self.doing}: {error}" if error else "", self.door.note)
        return Outcome(
            status=status,
            reason="; ".join(filter(None, reasons)),
            error=without_traceback(error) if error else None,
            weight=report.weight if report else None,
            norm=report.norm if report else None,
            metrics=report.metrics if report else {},
            sent_bytes=self.sent_bytes,
            sent_seconds=self.sent_seconds,
            bytes=self.bytes,
            seconds=self.seconds,
            unanswered=unanswered,
        )


async def exchange(
    channel: Channel,
    outgoing: Outgoing,
    contribution: Participation,
    *,
    begin: Begins | None = None,
) -> Outcome:
    """One silo's half of a round, on the server's side: task, READY, upload, COMMIT.

    `outgoing` are the prepared global weights, which any number of exchanges may share. A silo that takes nothing of
    them for 10 minutes has failed, and is not to be asked again before it has answered. Has no other deadline of its
    own: cancel it, which aborts the contribution and leaves the channel usable; the silo is then to be told by
    a `Commit` that is not accepted, or by the next task. All that goes wrong with the silo is returned.
    `begin` is awaited when the silo has the weights.
    """
    record = _Record(door=Door(channel))
    task = contribution.task
    error: Exception | None = None
    try:
        async with record.door.kept():
            await _hand_out(channel, outgoing, task, record, begin)
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
    except (AiordmaError, StagingError) as exc:
        status, error = Status.FAILED, exc
    if isinstance(error, ChannelError) or not record.is_asked:
        return record.outcome(status, error, None)
    is_answered = record.report is not None or isinstance(error, UpdateError | MessageError)
    unheard = await tell(channel, Commit(task.ticket, error is None, str(error or "")))
    if unheard is not None and error is None:
        record.doing, error = "sending the commit", unheard
    return record.outcome(status, error, None if is_answered else task.ticket)


async def ask(
    channel: Channel, outgoing: Outgoing, task: Task, *, begin: Begins | None = None
) -> Outcome:
    """One silo's half of an evaluation: the weights go there, its metrics come back; nothing is uploaded.

    Has no deadline of its own: cancel it, which leaves the channel usable. All that goes wrong with the silo is
    returned. `begin` is awaited when the silo has the weights.
    """
    record = _Record(door=Door(channel))
    try:
        async with record.door.kept():
            await _hand_out(channel, outgoing, task, record, begin)
            record.doing = "waiting for its metrics"
            record.report = await _receive_report(channel, task)
        check_weight(record.report.weight)
        return record.outcome(Status.COMMITTED, None, None)
    except UpdateError as exc:
        return record.outcome(Status.REFUSED, exc, None)
    except AiordmaError as exc:
        is_answered = not record.is_asked or isinstance(exc, ChannelError | MessageError)
        return record.outcome(Status.FAILED, exc, None if is_answered else task.ticket)


async def _hand_out(
    channel: Channel, outgoing: Outgoing, task: Task, record: _Record, begin: Begins | None
) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(NOTICE_TIMEOUT_S):
            await channel.send(task)
    except TimeoutError as exc:
        raise TransferTimeout(f"it has no room for a message for {NOTICE_TIMEOUT_S:g} s") from exc
    record.is_asked = True
    await send_while_taken(
        channel,
        outgoing,
        task.meta(0),
        confirm=begin is not None,
        silence_s=TAKING_TIMEOUT_S,
    )
    record.sent_bytes = outgoing.manifest.total_bytes
    record.sent_seconds = loop.time() - started
    if begin is not None:
        record.doing = "waiting for the other ranks"
        await begin()


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
        record.bytes = await _receive_update(channel, task, place, record.door)
        record.seconds = loop.time() - started
        undo.pop_all()


async def _receive_update(channel: Channel, task: Task, place: Contribution, door: Door) -> int:
    faults = 0
    for attempt in itertools.count(1):
        door.expect(task.ticket, attempt)
        await channel.send(Upload(task.ticket, attempt))
        transfer = await _next_update(channel, task, door)
        try:
            if await place.receive(transfer):
                break
        except UpdateError as exc:
            await turn_away(transfer, str(exc))
            raise
        except (ChecksumError, TransferAborted):
            faults += 1
            if faults == UPLOAD_ATTEMPTS:
                raise
    return transfer.manifest.total_bytes


async def _next_update(channel: Channel, task: Task, door: Door) -> Transfer:
    """The transfer that was asked for. Raises `UpdateError` if the silo declines instead."""
    update = asyncio.create_task(door.update())
    answer = asyncio.create_task(_receive_report(channel, task))
    both = (update, answer)
    try:
        async with patience(UPLOAD_START_TIMEOUT_S):
            await asyncio.wait(both, return_when="FIRST_COMPLETED")
    except TimeoutError:
        pass  # and yet one of them may have come in the same turn
    finally:
        is_there, is_answered = update.done(), answer.done()
        for waiting in both:
            waiting.cancel()
        await asyncio.gather(*both, return_exceptions=True)
    if is_there:
        return update.result()
    if is_answered:
        answer.result()
        raise UpdateError("the silo said READY twice")
    raise TransferTimeout(
        f"the silo was asked for its update and began none within {UPLOAD_START_TIMEOUT_S:g} s"
    )


async def answered(channel: Channel, ticket: int) -> None:
    """Wait for the silo's answer to a task, whatever it is: it came too late to count."""
    # One to an earlier task may come before: a Decline of an upload that was not waited for any more.
    while (await channel.recv(FROM_SILO)).ticket != ticket:
        pass


async def tell(channel: Hearer, message: Commit | Begin) -> Exception | None:
    """Send a word that is not answered, as the last one of a round; what went wrong, if the silo cannot hear it."""
    try:
        async with asyncio.timeout(NOTICE_TIMEOUT_S):
            await channel.send(message)
    except (AiordmaError, TimeoutError) as exc:
        return exc
    return None


def without_traceback(error: Exception) -> Exception:
    """The error and its causes without the frames in which they were raised, and all that these hold."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
