"""Where the ranks of a sharded silo, which join one by one, wait until all of them are there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiordma import Channel
from fedllm.errors import SettingError
from fedllm.messages import FROM_SILO, Join, Shard
from fedllm.shards import Shards

__all__ = ["Assembly"]


@dataclass(eq=False)
class _Waiting:
    channel: Channel
    join: Join
    shard: Shard
    speaker: asyncio.Future[asyncio.Task[Any] | None] = field(default_factory=asyncio.Future)
    """The task of who speaks for all ranks; None if another channel took this one's place."""


class Assembly:
    """The ranks that wait for others of their silos."""

    def __init__(self, limit_s: float | None) -> None:
        """`limit_s`: how long a rank waits; None: for ever."""
        self._limit_s = limit_s
        self._waiting: list[_Waiting] = []

    def check_free(self, name: str) -> None:
        """Raise `SettingError` if ranks wait by this name: it is theirs, or the last of them would find it taken."""
        waiting = [one.shard for one in self._waiting if one.join.name == name]
        if waiting:
            raise SettingError(
                f"{name!r} is the name of ranks that wait here for others: rank {waiting[0].rank} of {waiting[0].world}"
            )

    async def meet(
        self, channel: Channel, join: Join, shard: Shard
    ) -> tuple[Shards, frozenset[str]] | None:
        """Wait for the other ranks. There may be no limit: the last one may have to be restarted.

        Who comes last gets all of them and their keys, at once, to speak for them in its task; the others get None when
        that is over. Raises `SettingError` for a rank that waits already, or one of another number of ranks, and when
        the others do not come; an `aiordma` error when the channel ends.
        """
        others = [one for one in self._waiting if one.join.name == join.name]
        for one in others:
            if join.key and one.join.key == join.key:
                # What is left of it is a connection whose end was not seen here.
                others.remove(one)
                self._waiting.remove(one)
                one.speaker.set_result(None)
                break
        for one in others:
            if one.shard.world != shard.world or one.shard.rank == shard.rank:
                raise SettingError(
                    f"rank {shard.rank} of {shard.world} is not wanted: for {join.name!r} rank {one.shard.rank} of "
                    f"{one.shard.world} waits here"
                )
        me = _Waiting(channel, join, shard)
        if len(others) + 1 < shard.world:
            await self._wait(me)
            return None
        for one in others:
            self._waiting.remove(one)
            one.speaker.set_result(asyncio.current_task())
        ranks = [*others, me]
        shards = Shards([(one.channel, one.shard) for one in ranks])
        return shards, frozenset(one.join.key for one in ranks)

    async def _wait(self, me: _Waiting) -> None:
        self._waiting.append(me)
        # A rank that waits says nothing: what is heard is that its channel ends.
        listening = asyncio.create_task(me.channel.recv(FROM_SILO))
        try:
            both = {me.speaker, listening}
            await asyncio.wait(both, timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not me.speaker.done() and not listening.done():
                raise SettingError(
                    f"the other ranks of {me.join.name!r} did not come within {self._limit_s:g} s: one may have been "
                    "refused, or have died"
                )
            if not me.speaker.done():
                raise SettingError(f"a rank that waits for the others said {listening.result()}")
        finally:
            if not me.speaker.done():
                self._waiting.remove(me)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        speaker = me.speaker.result()
        if speaker is not None:
            await asyncio.wait({speaker})
