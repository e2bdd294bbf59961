"""The door that a silo's uploads come through: what was not asked for is turned away at once, with the reason."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiordma import Busy, Channel, ChannelClosed, Transfer
from fedllm.messages import is_for

__all__ = ["Door", "turn_away"]


class Door:
    """One channel's door, for as long as a silo is asked something. Nobody else may receive transfers there then."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._turned_away = 0
        self._expected: tuple[int, int] | None = None
        self._update: asyncio.Future[Transfer] | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def note(self) -> str:
        """What the server's log is to say of the uploads that were turned away; empty if there were none."""
        if not self._turned_away:
            return ""
        return f"turned away {self._turned_away} upload(s) that nobody had asked for, or that came twice"

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Somebody stands at the door."""
        keeping = self._keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    def expect(self, ticket: int, attempt: int) -> None:
        """Let the update of this ticket and attempt in, once. To be called before it is asked for."""
        self._expected = ticket, attempt
        self._update = asyncio.get_running_loop().create_future()

    async def update(self) -> Transfer:
        """Wait for the update that is expected. Raises an `aiordma` error if it cannot come any more."""
        assert self._update is not None
        assert self._keeping is not None
        either: set[asyncio.Future[Any]] = {self._update, self._keeping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._update.done():
            return self._update.result()
        self._keeping.result()
        raise ChannelClosed("the silo closed the channel before its upload")

    async def _keep(self) -> None:
        async with contextlib.aclosing(self._channel.incoming()) as transfers:
            async for transfer in transfers:
                is_the_one = self._expected is not None and is_for(transfer.meta, *self._expected)
                if not is_the_one or self._update is None:
                    reason = "it is for another round, or another attempt"
                elif self._update.done():
                    reason = "it came before: an update is sent once"
                else:
                    self._update.set_result(transfer)
                    continue
                self._turned_away += 1
                await turn_away(transfer, reason)


async def turn_away(transfer: Transfer, reason: str) -> None:
    """Refuse a transfer, unless its sender has given it up."""
    with contextlib.suppress(Busy):
        await transfer.refuse(reason)
