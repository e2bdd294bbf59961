"""The server's side of a run: who is a member, and the loop over rounds."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from numpy.typing import NDArray

import aiordma
from aiordma import (
    AiordmaError,
    Channel,
    ChannelConfig,
    ChannelError,
    MessageError,
    Outgoing,
    TransferTimeout,
    prepare,
)
from fedllm.aggregate import Arrays
from fedllm.config import RunConfig
from fedllm.errors import FedError, QuorumNotReached
from fedllm.messages import FROM_SILO, Goodbye, Join, Refused, Task, Welcome, check_arguments
from fedllm.participation import Outcome
from fedllm.rounds import RoundResult, run_round
from fedllm.strategy import FedAvg, Strategy

__all__ = ["History", "RoundRecord", "Server"]

FINAL_SILENCE_S: Final = 30.0
"""A silo that takes nothing for so long at the end of a run does not get the final weights."""
PING_TIMEOUT_S: Final = 3.0
"""How long to ask a member whether it is there, when another silo wants its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """A `RoundResult` without its weights."""

    round: int
    outcomes: Mapping[str, Outcome]
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a run has come to."""

    weights: Mapping[str, NDArray[Any]]
    """Those of the last of the rounds, or the first global weights."""
    rounds: tuple[RoundRecord, ...]
    """Those that succeeded."""


@dataclass(eq=False)
class _Member:
    name: str
    channel: Channel
    is_busy: bool = False
    """Whether it has yet to answer an earlier task: it would be late for the next as well."""
    unanswered: int | None = None
    """That task's ticket."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Server:
    """Admits silos and runs rounds with them.

    ``history = await Server(weights, ...).run(host, port)``, or, to know the address first::

        async with Server(weights, ...) as server:
            await server.start()
            ... server.address ...
            history = await server.run()

    Silos that join while a round is under way take part from the next one. A silo that was late is left out
    until it has caught up. One whose channel broke is no member any more, and may join again by its name.
    """

    def __init__(
        self,
        weights: Arrays,
        *,
        fingerprint: Mapping[str, str],
        min_silos: int,
        rounds: int,
        strategy: Strategy | None = None,
        arguments: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
        expect: int | None = None,
        join_timeout_s: float = 10.0,
        absence_timeout_s: float | None = None,
        on_round: Callable[[RoundResult], object] | None = None,
        on_silo: Callable[[str, str], object] | None = None,
        config: ChannelConfig | None = None,
    ) -> None:
        """`min_silos` to `absence_timeout_s` are explained in `RunConfig`, and `arguments` in `run_round`.

        `weights`: the first global weights; they are not changed. `fingerprint`: digests by what they are of
        ("weights", "tokenizer", "adapter"); a silo with any other is refused. `strategy`: `FedAvg()` if None.
        `on_round` is called (and awaited, if it returns an awaitable) after each round that succeeded;
        `on_silo` with a silo's name, or the address of one that has none, and what became of it: "joined",
        "refused: ...", "caught up" (it was late), "gone: ...". What they raise ends the run, or that silo's membership.

        Raises `SettingError`; `WeightsError` for weights that cannot be averaged, `aiordma.TensorError` for such
        that cannot be sent.
        """
        self._plan = RunConfig(
            min_silos=min_silos,
            rounds=rounds,
            expect=expect,
            deadline_s=deadline_s,
            join_timeout_s=join_timeout_s,
            absence_timeout_s=absence_timeout_s,
        )
        self._weights: Arrays = dict(weights)
        self._strategy: Strategy = FedAvg() if strategy is None else strategy
        # Both raise what a round would raise.
        self._strategy.aggregation(self._weights)
        prepare(self._weights)
        self._fingerprint = dict(fingerprint)
        self._arguments = check_arguments(arguments or {})
        self._on_round = on_round
        self._on_silo = on_silo
        self._config = config
        self._name = secrets.token_hex(8)
        self._records: list[RoundRecord] = []
        self._round = 1
        self._members: dict[str, _Member] = {}
        self._changed = asyncio.Event()
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
    def silos(self) -> tuple[str, ...]:
        """The names of the members, sorted."""
        return tuple(sorted(self._members))

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False
    ) -> tuple[str, int]:
        """Listen, and admit silos from now on; the address. Raises like `aiordma.listen`."""
        if self._serving is not None:
            raise FedError("the server listens already")
        self._serving = await aiordma.serve(
            self._serve_silo, host, port, config=self._config, insecure=insecure
        )
        return self._serving.address

    async def run(
        self, host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False
    ) -> History:
        """Start unless that was done, run all rounds, send the final weights and say goodbye, close.

        A round that lost its quorum because silos died is tried again, with the same weights, once the quorum
        is there again. Raises `QuorumNotReached` when it was lost otherwise, or when the silos stay away for
        `absence_timeout_s`; the silos are told. Cancelled, it closes the channels and leaves nothing behind. What
        the run had come to is `history`; run again, it goes on from there.
        """
        try:
            if self._serving is None:
                await self.start(host, port, insecure=insecure)
            try:
                await self._gather(self._plan.expect or self._plan.min_silos)
                while self._round <= self._plan.rounds:
                    result = await self._succeed()
                    self._weights = result.weights
                    self._round += 1
                    self._records.append(_record(result))
                    if self._on_round is not None:
                        answer = self._on_round(result)
                        if inspect.isawaitable(answer):
                            await answer
            except QuorumNotReached as exc:
                await self._say_goodbye(exc.reason)
                raise
            await self._say_goodbye("")
            return self.history
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Stop listening and close all channels. A closed server can be started again."""
        serving, self._serving = self._serving, None
        if serving is not None:
            await serving.aclose()

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

    async def _succeed(self) -> RoundResult:
        """One round, tried until it has its quorum."""
        while True:
            members = await self._gather(self._plan.min_silos)
            try:
                result = await run_round(
                    {name: member.channel for name, member in members.items()},
                    self._weights,
                    round=self._round,
                    strategy=self._strategy,
                    min_silos=self._plan.min_silos,
                    deadline_s=self._plan.deadline_s,
                    arguments=self._arguments,
                )
            except QuorumNotReached as exc:
                self._settle(members, exc.outcomes)
                if not any(isinstance(o.error, ChannelError) for o in exc.outcomes.values()):
                    raise
            else:
                self._settle(members, result.outcomes)
                return result

    def _settle(self, members: Mapping[str, _Member], outcomes: Mapping[str, Outcome]) -> None:
        for name, member in members.items():
            if isinstance(outcomes[name].error, ChannelError):
                self._drop(member, outcomes[name].reason)
            elif outcomes[name].is_busy:
                member.is_busy, member.unanswered = True, outcomes[name].unanswered
                member.news.set()

    async def _gather(self, count: int) -> dict[str, _Member]:
        """The members that are there and free, once there are so many."""
        try:
            async with asyncio.timeout(self._plan.absence_timeout_s):
                while len(free := self._free()) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as exc:
            raise QuorumNotReached(
                f"round {self._round}: {len(self._free())} silos were there within "
                f"{self._plan.absence_timeout_s} s, and {count} are needed"
            ) from exc
        return free

    def _free(self) -> dict[str, _Member]:
        for member in list(self._members.values()):
            if member.channel.is_closed:
                self._drop(member, "its channel was closed")
        return {name: member for name, member in self._members.items() if not member.is_busy}

    async def _say_goodbye(self, failure: str) -> None:
        outgoing = prepare(self._weights)
        ticket = secrets.randbits(63)
        async with asyncio.TaskGroup() as group:
            for member in self._members.values():
                goodbye = Goodbye(ticket, not (failure or member.is_busy), failure)
                group.create_task(self._part(member, goodbye, outgoing))

    async def _part(self, member: _Member, goodbye: Goodbye, outgoing: Outgoing) -> None:
        try:
            async with asyncio.timeout(FINAL_SILENCE_S):
                await member.channel.send(goodbye)
            if goodbye.has_weights:
                meta = Task(self._round, goodbye.ticket, {}).meta(0)
                await _send_while_taken(member.channel, outgoing, meta)
        except (AiordmaError, TimeoutError) as exc:
            self._report(member.name, f"gone without the final weights: {exc}")

    # Membership

    async def _serve_silo(self, channel: Channel) -> None:
        """The life of a channel: join, take part, go. It is closed when this returns."""
        member = await self._admit(channel)
        if member is None:
            return
        try:
            await channel.send(Welcome(self._name, self._round, self._plan.rounds))
            member.is_busy = False
            self._changed.set()
            self._report(member.name, "joined")
            while self._members.get(member.name) is member:
                await member.news.wait()
                member.news.clear()
                if member.is_busy:
                    # Its answer to this task was late. One to an earlier task may come before: a Decline
                    # of an upload that was not waited for any more.
                    while (await channel.recv(FROM_SILO)).ticket != member.unanswered:
                        pass
                    member.is_busy = False
                    self._changed.set()
                    self._report(member.name, "caught up")
        except AiordmaError as exc:
            self._drop(member, str(exc))

    async def _admit(self, channel: Channel) -> _Member | None:
        name = channel.peer
        try:
            async with asyncio.timeout(self._plan.join_timeout_s):
                join = await channel.recv(Join)
            name = join.name
            objection = _difference(self._fingerprint, join.fingerprint)
            if not objection and await self._is_taken(name):
                objection = f"the name {name!r} is in use by a silo that is there"
        except TimeoutError:
            objection = f"it did not say who it is within {self._plan.join_timeout_s:g} s"
        except MessageError as exc:
            objection = f"this is no valid request to join: {exc}"
        except ChannelError as exc:
            self._report(name, f"refused: {exc}")
            return None
        if objection:
            self._report(name, f"refused: {objection}")
            await channel.send(Refused(objection))
            return None
        # No await since the name was found free. Busy until it has its Welcome, which comes before any task.
        member = self._members[name] = _Member(name, channel, is_busy=True)
        return member

    async def _is_taken(self, name: str) -> bool:
        """Whether the name's silo is there; one that is not is dropped."""
        while (member := self._members.get(name)) is not None:
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await member.channel.ping()
            except ChannelError as exc:
                self._drop(member, str(exc))
            except TimeoutError:
                return True  # it may be training with the interpreter locked
            else:
                return True
        return False

    def _drop(self, member: _Member, why: str) -> None:
        if self._members.get(member.name) is member:
            del self._members[member.name]
            member.news.set()
            self._report(member.name, f"gone: {why}")

    def _report(self, name: str, what: str) -> None:
        if self._on_silo is not None:
            self._on_silo(name, what)


async def _send_while_taken(channel: Channel, outgoing: Outgoing, meta: object) -> None:
    """Send, as long as it goes on: a transfer that nobody asks for never times out by itself."""
    sending = asyncio.create_task(channel.send_tensors(outgoing, meta=meta, confirm=True))
    try:
        before = None
        while not sending.done():
            stats = channel.stats()
            now = stats.sent_bytes, stats.in_flight_chunks
            if now == before:
                raise TransferTimeout(f"it took nothing for {FINAL_SILENCE_S:g} s")
            before = now
            await asyncio.wait({sending}, timeout=FINAL_SILENCE_S)
        await sending
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def _difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs between two fingerprints, and what to do; empty if nothing does."""
    found = "; ".join(
        f"not the same {key}: the server has {ours.get(key, 'none')}, the silo {theirs.get(key, 'none')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )
    return found and f"{found}; both need the same base model and settings (--base, --mode)"


def _record(result: RoundResult) -> RoundRecord:
    return RoundRecord(
        round=result.round,
        outcomes=result.outcomes,
        metrics=result.metrics,
        seconds=result.seconds,
    )
