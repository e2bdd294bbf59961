"""Who is a member of a run: silos are admitted, come and go, are busy or free, and told of the end."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from aiordma import (
    AiordmaError,
    Channel,
    ChannelClosed,
    ChannelError,
    MessageError,
)
from fedllm.aggregate import Arrays
from fedllm.assembly import Assembly
from fedllm.config import RunConfig
from fedllm.errors import QuorumNotReached, SettingError
from fedllm.messages import Goodbye, Join, Refused, Task, Welcome
from fedllm.participation import Outcome
from fedllm.sending import send_while_taken
from fedllm.shards import Peer, all_of, caught_up, hand_outs

__all__ = ["Membership", "choose"]

FINAL_SILENCE_S: Final = 30.0
"""A silo that takes nothing for so long at the end of a run does not get the final weights."""
Wanted: TypeAlias = Callable[[Collection[str]], Collection[str]]
"""Who of the members, by name, may be asked."""
PING_TIMEOUT_S: Final = 3.0
"""How long to ask a member whether it is there, when another silo wants its name."""


def choose(
    names: Collection[str], *, round: int, seed: int, fraction: float, at_least: int
) -> list[str]:
    """The silos that a round asks, sorted: `fraction` of the names, rounded up, but `at_least` so many.

    Names are ranked by a hash of seed, round and name ("rendezvous hashing", Thaler and Ravishankar 1998): who is
    chosen depends on nothing else, and one name more or less changes the choice by at most one other.
    """

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{round}/{name}".encode()).digest()

    # 0.1 * 30 is 3.0000000000000004, and three silos are meant.
    count = max(at_least, math.ceil(fraction * len(names) - 1e-9))
    return sorted(sorted(names, key=rank)[:count])


@dataclass(eq=False)
class _Member:
    name: str
    keys: Collection[str]
    channel: Peer
    is_welcome: bool = False
    """Whether it has got its Welcome, which comes before anything else."""
    unanswered: int | None = None
    """The ticket of an earlier task that it has yet to answer: it would be late for the next as well."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_busy(self) -> bool:
        return self.unanswered is not None


class Membership:
    """The silos of a run, by name."""

    def __init__(
        self,
        settings: RunConfig,
        fingerprint: Mapping[str, str],
        like: Arrays,
        on_silo: Callable[[str, str], object] | None,
        *,
        takes_parts: bool = True,
    ) -> None:
        """`on_silo` is told of everybody who comes, goes or is refused; see `Federation`. Of the weights `like` only
        names and shapes matter. `takes_parts`: whether silos may be sharded; see `Aggregation`."""
        self.run = secrets.token_hex(8)
        """The run's name."""
        self.round = 1
        """The round that is under way, or next."""
        self._settings = settings
        self._fingerprint = dict(fingerprint)
        self._shapes = {name: array.shape for name, array in like.items()}
        self._on_silo = on_silo
        self._takes_parts = takes_parts
        self._members: dict[str, _Member] = {}
        self._assembly = Assembly(settings.absence_timeout_s)
        self._left: set[str] = set()
        """Who closed its channel in order, and is not expected back."""
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        """The members, sorted."""
        return tuple(sorted(self._members))

    def free(self) -> dict[str, Peer]:
        """The members that could take part in a round now."""
        for member in list(self._members.values()):
            if member.channel.is_closed:
                self._drop(member, "its channel was closed")
        return {
            name: member.channel
            for name, member in self._members.items()
            if member.is_welcome and not member.is_busy
        }

    async def gather(self, count: int, wanted: Wanted = lambda names: names) -> dict[str, Peer]:
        """Those that are free, of the members that are `wanted`, once there are so many.

        Raises `QuorumNotReached` after `absence_timeout_s`.
        """
        limit_s = self._settings.absence_timeout_s
        free: dict[str, Peer] = {}
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    free = self.free()
                    those = wanted(self._members)
                    free = {name: peer for name, peer in free.items() if name in those}
                    if len(free) >= count:
                        return free
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as exc:
            raise QuorumNotReached(
                f"round {self.round}: {len(free)} silos were there within "
                f"{limit_s} s, and {count} are needed"
            ) from exc

    def settle(self, asked: Mapping[str, Peer], outcomes: Mapping[str, Outcome]) -> None:
        """Take note of what became of the silos that were asked something, over these channels."""
        for name, channel in asked.items():
            member, outcome = self._members.get(name), outcomes[name]
            if member is None or member.channel is not channel:
                continue  # it has joined anew since
            if isinstance(outcome.error, ChannelError):
                self._drop(member, outcome.reason, outcome.error)
            elif outcome.is_busy:
                member.unanswered = outcome.unanswered
                member.news.set()

    # Joining

    async def serve(self, channel: Channel) -> None:
        """The life of a channel: join, take part, go. It is closed when this returns."""
        member = await self._admit(channel)
        if member is None:
            return
        try:
            await member.channel.send(Welcome(self.run, self.round, self._settings.rounds))
            member.is_welcome = True
            self._changed.set()
            self._report(member.name, "joined")
            while self._members.get(member.name) is member:
                await member.news.wait()
                member.news.clear()
                if member.unanswered is not None:
                    await caught_up(member.channel, member.unanswered)
                    member.unanswered = None
                    self._changed.set()
                    self._report(member.name, "caught up")
        except AiordmaError as exc:
            self._drop(member, str(exc), exc)

    async def _admit(self, channel: Channel) -> _Member | None:
        name = channel.peer
        peer: Peer = channel
        try:
            async with asyncio.timeout(self._settings.join_timeout_s):
                join = await channel.recv(Join)
            keys = frozenset({join.key})
            name = join.name
            refusal = await self._refusal(join)
            if refusal is None and join.shard is None:
                self._assembly.check_free(name)
            elif refusal is None and join.shard is not None:
                self._report(name, f"rank {join.shard.rank} of {join.shard.world} is there")
                met = await self._assembly.meet(channel, join, join.shard)
                if met is None:
                    return None  # another rank has spoken for it
                peer, keys = met
                if misfit := peer.misfit(self._shapes):
                    refusal = Refused(misfit)
                else:
                    peer.check(self._shapes)
        except TimeoutError:
            # The way there may be slow, or its processes were stopped.
            limit_s = self._settings.join_timeout_s
            refusal = Refused(f"it did not say who it is within {limit_s:g} s", is_final=False)
        except MessageError as exc:
            refusal = Refused(f"this is no valid request to join: {exc}")
        except SettingError as exc:
            # Of ranks that are not of one kind, some may be gone soon.
            refusal = Refused(str(exc), is_final=False)
        except ChannelError as exc:
            self._report(name, f"refused: {exc}")
            return None
        if refusal is not None:
            self._report(name, f"refused: {refusal.reason}")
            await peer.send(refusal)
            return None
        # No await since the name was found free: the rank that comes last waits for none.
        member = self._members[name] = _Member(name, keys, peer)
        self._left.discard(name)
        return member

    async def _refusal(self, join: Join) -> Refused | None:
        """Why this silo is not wanted; None if it is. A silo of its name that is not there any more is dropped."""
        if difference := _difference(self._fingerprint, join.fingerprint):
            return Refused(difference)
        if join.shard is not None and not self._takes_parts:
            return Refused(
                "a sharded silo sends its update in parts, and this server takes whole ones: it needs Staged"
            )
        while (member := self._members.get(join.name)) is not None:
            if join.key and join.key in member.keys:
                # What is left of it is a connection whose end was not seen here.
                await member.channel.aclose()
                self._drop(member, "it joined anew")
                continue
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await member.channel.ping()
            except ChannelError as exc:
                self._drop(member, str(exc), exc)
            except TimeoutError:
                return Refused(
                    f"the name {join.name!r} is in use by a silo that has not answered for {PING_TIMEOUT_S:g} s: "
                    "it may be gone, or train with its interpreter locked",
                    is_final=False,
                )
            else:
                return Refused(f"the name {join.name!r} is in use by a silo that is there")
        return None

    def _drop(self, member: _Member, why: str, error: Exception | None = None) -> None:
        if self._members.get(member.name) is member:
            del self._members[member.name]
            if isinstance(error, ChannelClosed):
                self._left.add(member.name)
            member.news.set()
            self._changed.set()
            self._report(member.name, f"gone: {why}")

    def _report(self, name: str, what: str) -> None:
        if self._on_silo is not None:
            self._on_silo(name, what)

    # The end

    async def part(self, weights: Arrays, cohort: Collection[str]) -> None:
        """Give all members the final weights and say goodbye.

        Those of the last `cohort` who are not there, because their connection broke, are waited for for
        `farewell_s`.
        """
        expected = set(cohort)
        told: set[_Member] = set()
        async with asyncio.TaskGroup() as group:
            try:
                async with asyncio.timeout(self._settings.farewell_s):
                    while True:
                        members = {m for m in self._members.values() if m.is_welcome}
                        for member in members - told:
                            told.add(member)
                            goodbye = Goodbye(secrets.randbits(63), not member.is_busy)
                            group.create_task(self._part_from(member, goodbye, weights, expected))
                        if not expected - self._left:
                            break
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                for name in sorted(expected - self._left - self._members.keys()):
                    self._report(name, "gone without the final weights: it did not come back")

    async def give_up(self, reason: str) -> None:
        """Tell all members that the run has failed."""
        async with asyncio.TaskGroup() as group:
            for member in self._members.values():
                if member.is_welcome:
                    goodbye = Goodbye(secrets.randbits(63), False, reason)
                    group.create_task(self._part_from(member, goodbye, {}, set()))

    async def _part_from(
        self, member: _Member, goodbye: Goodbye, weights: Arrays, expected: set[str]
    ) -> None:
        try:
            async with asyncio.timeout(FINAL_SILENCE_S):
                await member.channel.send(goodbye)
            if goodbye.has_weights:
                meta = Task(self.round, goodbye.ticket, {}).meta(0)
                await all_of(
                    send_while_taken(
                        channel, outgoing, meta, confirm=True, silence_s=FINAL_SILENCE_S
                    )
                    for channel, outgoing in hand_outs(member.channel, weights)
                )
            expected.discard(member.name)
        except (AiordmaError, TimeoutError) as exc:
            if isinstance(exc, ChannelError):  # it may come back
                self._drop(member, f"without the last word: {exc}", exc)
            else:
                expected.discard(member.name)
                why = str(exc) or f"it read nothing for {FINAL_SILENCE_S:g} s"
                self._report(member.name, f"gone without the final weights: {why}")
        self._changed.set()


def _difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs between two fingerprints, and what to do; empty if nothing does."""
    found = "; ".join(
        f"not the same {key}: the server has {ours.get(key, 'none')}, the silo {theirs.get(key, 'none')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )
    return found and f"{found}; both need the same base model and settings (--base, --mode)"
