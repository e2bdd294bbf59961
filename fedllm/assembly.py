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
    shard: Shard
    key: str
    speaker: asyncio.Future[asyncio.Task[Any] | None] = field(default_factory=asyncio.Future)
    """The task of who speaks for all ranks; None if another channel took this one's place."""


class Assembly:
    """The ranks that wait, by the names of their silos."""

    def __init__(self) -> None:
        self._silos: dict[str, dict[int, _Waiting]] = {}

    async def meet(
        self, channel: Channel, join: Join, shard: Shard
    ) -> tuple[Shards, frozenset[str]] | None:
        """Wait for the other ranks, however long that takes: the last one may have to be restarted.

        Who comes last gets all of them and their keys, to speak for them in its task; the others get None when that
        is over. Raises
        `SettingError` for a rank that waits already, or one of another number of ranks; an `aiordma` error when the
        channel ends.
        """
        waiting = self._silos.setdefault(join.name, {})
        for rank, one in list(waiting.items()):
            if one.channel.is_closed or (join.key and one.key == join.key):
                one.speaker.set_result(None)
                del waiting[rank]
        worlds = {one.shard.world for one in waiting.values()} - {shard.world}
        if worlds or shard.rank in waiting:
            raise SettingError(
                f"rank {shard.rank} of {shard.world} is not wanted: of {join.name!r} "
                f"there are ranks {sorted(waiting)} of {min(worlds, default=shard.world)} waiting"
            )
        me = waiting[shard.rank] = _Waiting(channel, shard, join.key)
        if len(waiting) < shard.world:
            await self._wait(join.name, me)
            return None
        del self._silos[join.name]
        for one in waiting.values():
            one.speaker.set_result(asyncio.current_task())
        ranks = Shards([(one.channel, one.shard) for one in waiting.values()])
        return ranks, frozenset(one.key for one in waiting.values())

    async def _wait(self, name: str, me: _Waiting) -> None:
        # A rank that waits says nothing: what is heard is that its channel ends.
        listening = asyncio.create_task(me.channel.recv(FROM_SILO))
        try:
            await asyncio.wait({me.speaker, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not me.speaker.done():
                raise SettingError(f"a rank that waits for the others said {listening.result()}")
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            waiting = self._silos.get(name, {})
            if waiting.get(me.shard.rank) is me:
                del waiting[me.shard.rank]
            if not waiting:
                self._silos.pop(name, None)
        speaker = me.speaker.result()
        if speaker is not None:
            await asyncio.wait({speaker})
