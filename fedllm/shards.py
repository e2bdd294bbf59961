"""A sharded silo on the server's side: the channels of its ranks, which in a round are one silo.

Each rank gets its rows of the global weights and sends its rows of the update, over its own channel, straight from
and into the arrays of the whole. There is one weight, one place in the aggregation, one outcome: what goes wrong
with one rank goes wrong with the silo, and all of its ranks are told the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from aiordma import Channel, Outgoing, Transfer, prepare
from fedllm.aggregate import Arrays, Contribution, check_layout
from fedllm.errors import RoundAbandoned, SettingError, StagingError, UpdateError
from fedllm.messages import Begin, Commit, Ready, Shard, Task
from fedllm.participation import (
    Outcome,
    Participation,
    Status,
    answered,
    ask,
    exchange,
    tell,
    without_traceback,
)
from fedllm.staged import StagedContribution

__all__ = ["Peer", "Shards", "all_of", "caught_up", "hand_outs"]


class Shards:
    """The channels of one sharded silo's ranks, for `run_round` in the place of a channel."""

    def __init__(self, ranks: Sequence[tuple[Channel, Shard]]) -> None:
        """Raises `SettingError` unless all ranks are there, each once."""
        ordered = sorted(ranks, key=lambda one: one[1].rank)
        self.channels: Final = tuple(channel for channel, _ in ordered)
        self.shards: Final = tuple(shard for _, shard in ordered)
        found = [(shard.rank, shard.world) for shard in self.shards]
        if not found or found != [(rank, len(found)) for rank in range(len(found))]:
            raise SettingError(f"a silo's ranks are all of 0 to world - 1, not {found[:5]}")
        self.is_split = False
        """Whether some of the ranks train and others do not: they would wait for each other for ever."""
        self.owing: set[int] = set()
        """The ranks that have yet to answer the last task."""

    @property
    def is_closed(self) -> bool:
        """Whether it can take part no more: a rank's channel is closed, or not all were told the same."""
        return self.is_split or any(channel.is_closed for channel in self.channels)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `SettingError`, naming the tensor, unless each row of weights of these shapes is uploaded by exactly
        one rank."""
        if misfit := self.misfit(shapes):
            raise SettingError(misfit)
        uploads: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
        for shard in self.shards:
            for name in shard.rows.keys() - shard.replicas:
                uploads[name].append(shard.rows[name] or (0, _height(shapes[name])))
        for name, parts in uploads.items():
            end = 0
            for start, stop in [*sorted(parts), (_height(shapes[name]),) * 2]:
                if start != end:
                    who = "no rank uploads" if start > end else "more than one rank uploads"
                    low, high = sorted((start, end))
                    raise SettingError(f"{who} rows {low} to {high} of {name!r}")
                end = stop

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """What a rank holds that weights of these shapes do not have, whatever the others hold; empty if nothing."""
        for shard in self.shards:
            for name, rows in shard.rows.items():
                if name not in shapes:
                    return f"rank {shard.rank} holds {name[:80]!r}, which is not among the weights"
                shape = shapes[name]
                if rows is None:
                    continue
                start, stop = rows
                if not shape or not 0 <= start <= stop <= shape[0]:
                    return f"rank {shard.rank} holds rows {start} to {stop} of {name!r}, which has shape {shape}"
        return ""

    def outgoing(self, weights: Arrays) -> list[Outgoing]:
        """What each rank gets of the weights. Raises `SettingError`; see `check`."""
        self.check({name: array.shape for name, array in weights.items()})
        return [prepare(shard.part_of(weights)) for shard in self.shards]

    async def exchange(self, weights: Arrays, place: Participation) -> Outcome:
        """The silo's half of a round: `fedllm.exchange` with all of its ranks. Raises `SettingError`; see `check`."""
        outgoing = self.outgoing(weights)
        together = _Together(self, place.task)
        return await together.run(
            (
                exchange(channel, part, _Rank(together, shard, place.task), begin=together.begun)
                for channel, part, shard in zip(self.channels, outgoing, self.shards, strict=True)
            ),
            together.lead(place),
        )

    async def ask(self, weights: Arrays, task: Task) -> Outcome:
        """The silo's half of an evaluation: `fedllm.participation.ask` with all of its ranks."""
        outgoing = self.outgoing(weights)
        together = _Together(self, task)
        try:
            return await together.run(
                (
                    ask(channel, part, task, begin=together.begun)
                    for channel, part in zip(self.channels, outgoing, strict=True)
                ),
                together.lead(),
            )
        except asyncio.CancelledError:
            # A rank may still wait for the others.
            await tell(self, Commit(task.ticket, False, "the evaluation is over"))
            raise

    async def send(self, obj: Any) -> None:
        """Tell all ranks the same."""
        await all_of(channel.send(obj) for channel in self.channels)

    async def ping(self) -> None:
        """Wait until all ranks have answered a ping."""
        await all_of(channel.ping() for channel in self.channels)

    async def answered(self, ticket: int) -> None:
        """Wait until the ranks that are `owing` have answered. Raises an `aiordma` error if any rank's channel ends."""
        waits = [asyncio.create_task(answered(channel, ticket)) for channel in self.channels]
        owing = {waits[rank] for rank in self.owing}
        try:
            while not all(wait.done() for wait in owing):
                pending = {wait for wait in waits if not wait.done()}
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for wait in done:
                    wait.result()
        finally:
            await _cancel(waits)
        self.owing.clear()

    async def aclose(self) -> None:
        """Close all channels."""
        await all_of(channel.aclose() for channel in self.channels)


Peer: TypeAlias = Channel | Shards
"""How a silo is reached, whole or sharded."""


def hand_outs(peer: Peer, weights: Arrays) -> list[tuple[Channel, Outgoing]]:
    """Which weights go over which channel."""
    if isinstance(peer, Channel):
        return [(peer, prepare(weights))]
    return list(zip(peer.channels, peer.outgoing(weights), strict=True))


async def caught_up(peer: Peer, ticket: int) -> None:
    """Wait for the answer to a task that was not waited for any more. Raises an `aiordma` error if it cannot come."""
    await (answered(peer, ticket) if isinstance(peer, Channel) else peer.answered(ticket))


class _Gate:
    """Where ranks wait for each other, and then for what comes of that."""

    def __init__(self, ranks: int) -> None:
        self._missing = ranks
        self.is_full = asyncio.Event()
        self.is_open = asyncio.Event()

    async def wait(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.is_full.set()
        await self.is_open.wait()


class _Together:
    """Leads the exchanges of one silo's ranks through their gates."""

    def __init__(self, shards: Shards, task: Task) -> None:
        self.shards = shards
        self.reports: dict[int, Ready] = {}
        self.buffers: Mapping[str, NDArray[Any]] = {}
        self.error: Exception | None = None
        """What goes wrong with the silo as a whole."""
        self._task = task
        ranks = len(shards.channels)
        self._holding, self.reporting, self.uploaded = (_Gate(ranks) for _ in range(3))
        shards.owing = set(range(ranks))

    async def begun(self) -> None:
        """A rank has its weights; wait until all have been told to begin."""
        await self.pass_gate(self._holding)

    async def pass_gate(self, gate: _Gate) -> None:
        """Wait for all ranks, and what comes of that."""
        await gate.wait()
        if self.error is not None:
            raise self.error

    async def lead(self, place: Participation | None = None) -> None:
        """Open the gates one after the other; in an evaluation there is no `place`, and one gate."""
        await self._holding.is_full.wait()
        self.shards.is_split = True
        unheard = await tell(self.shards, Begin(self._task.ticket))
        self.shards.is_split = unheard is not None
        self._holding.is_open.set()
        if place is not None:
            try:
                await self._lead_upload(place)
            except (UpdateError, RoundAbandoned, StagingError) as exc:
                self.error = exc
            self.reporting.is_open.set()
            self.uploaded.is_open.set()

    async def _lead_upload(self, place: Participation) -> None:
        await self.reporting.is_full.wait()
        _check_weights(report.weight for report in self.reports.values())
        contribution = await place.ready(self.reports[0])
        with contextlib.ExitStack() as undo:
            undo.callback(contribution.abort)
            if not isinstance(contribution, StagedContribution):
                raise UpdateError(
                    f"a sharded silo sends its update in parts, and {type(contribution).__name__} takes whole ones: "
                    "use Staged aggregation"
                )
            self.buffers = contribution.buffers
            self.reporting.is_open.set()
            await self.uploaded.is_full.wait()
            self.buffers = {}
            await asyncio.to_thread(contribution.add)
            undo.pop_all()
        await place.decided()

    async def run(
        self,
        exchanges: Iterable[Coroutine[Any, Any, Outcome]],
        lead: Coroutine[Any, Any, None],
    ) -> Outcome:
        """All ranks' exchanges, until all are over, or one fails: then those of the others are cancelled and told."""
        ranks = [asyncio.create_task(one) for one in exchanges]
        leading = asyncio.create_task(lead)
        pending: set[asyncio.Task[Any]] = {leading, *ranks}
        try:
            while pending and not any(_is_out(rank) for rank in ranks):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises what is no failure of the silo's
        finally:
            await _cancel([leading, *ranks])
            outcomes = {r: one.result() for r, one in enumerate(ranks) if not one.cancelled()}
            self.shards.owing -= {rank for rank, one in outcomes.items() if not one.is_busy}
        outcome = self._outcome(outcomes)
        untold = [c for r, c in enumerate(self.shards.channels) if r not in outcomes]
        word = Commit(self._task.ticket, False, outcome.reason)
        await asyncio.gather(*(tell(channel, word) for channel in untold))
        return outcome

    def _outcome(self, outcomes: Mapping[int, Outcome]) -> Outcome:
        """What the ranks' outcomes amount to; those who were cancelled have none."""
        whole = outcomes.get(0, Outcome(status=Status.COMMITTED))
        rank, cause = next(
            ((rank, one) for rank, one in outcomes.items() if one.error is not None), (0, None)
        )
        if cause is not None:
            reason = str(self.error or f"rank {rank}: {cause.reason}")
            whole = replace(whole, status=cause.status, reason=reason, error=cause.error)
        if whole.status is Status.COMMITTED:
            # Who did not hear of it goes on otherwise than the others.
            self.shards.is_split |= whole.error is not None
            try:
                _check_weights(one.weight for one in outcomes.values())
            except UpdateError as exc:
                error = without_traceback(exc)
                whole = replace(whole, status=Status.REFUSED, reason=str(exc), error=error)
        return replace(
            whole,
            sent_bytes=sum(one.sent_bytes for one in outcomes.values()),
            sent_seconds=max((one.sent_seconds for one in outcomes.values()), default=0.0),
            bytes=sum(one.bytes for one in outcomes.values()),
            seconds=max((one.seconds for one in outcomes.values()), default=0.0),
            unanswered=self._task.ticket if self.shards.owing else None,
        )


class _Rank:
    """One rank's `Participation`."""

    def __init__(self, together: _Together, shard: Shard, task: Task) -> None:
        self.task: Final = task
        self._together = together
        self._shard = shard

    async def ready(self, report: Ready) -> Contribution:
        together = self._together
        together.reports[self._shard.rank] = report
        together.shards.owing.discard(self._shard.rank)
        await together.pass_gate(together.reporting)
        part = self._shard.part_of(together.buffers)
        return _Part({n: rows for n, rows in part.items() if n not in self._shard.replicas})

    async def decided(self) -> None:
        await self._together.pass_gate(self._together.uploaded)


class _Part:
    """One rank's part of a contribution; the whole is added, or aborted, by who leads the ranks."""

    is_awaited: Final = True

    def __init__(self, buffers: Arrays) -> None:
        self._buffers = buffers

    async def receive(self, transfer: Transfer) -> bool:
        specs = transfer.manifest.tensors
        check_layout(self._buffers, ((spec.name, spec.dtype, spec.shape) for spec in specs))
        await transfer.into(self._buffers)
        self._buffers = {}
        return True

    def abort(self) -> None:
        pass


def _is_out(rank: asyncio.Task[Outcome]) -> bool:
    return rank.done() and rank.result().status is not Status.COMMITTED


def _height(shape: tuple[int, ...]) -> int:
    """Rows; a scalar has one."""
    return shape[0] if shape else 1


def _check_weights(weights: Iterable[float | None]) -> None:
    found = sorted(set(weights), key=lambda weight: -1.0 if weight is None else weight)
    if len(found) > 1:
        raise UpdateError(
            f"its ranks report different weights, {found[:5]}: each is to report that of the whole silo"
        )


async def all_of(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Do all at once. The first error is raised, and the other calls are cancelled."""
    doing = [asyncio.create_task(call) for call in calls]
    try:
        await asyncio.gather(*doing)
    finally:
        await _cancel(doing)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
