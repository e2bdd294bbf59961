"""Weights on their way to somebody who may never take them."""

from __future__ import annotations

import asyncio
from typing import Final

from aiordma import Channel, Outgoing, TransferTimeout

__all__ = ["send_while_taken"]

_TICKS: Final = 8
"""How often it is looked at within the time that it may stand still."""


async def send_while_taken(
    channel: Channel, outgoing: Outgoing, meta: object, *, confirm: bool, silence_s: float
) -> None:
    """Send, as long as it goes on: a transfer that nobody asks for never times out by itself.

    Raises `aiordma.TransferTimeout` when nothing moved for `silence_s`, and what `Channel.send_tensors` does.
    Cancelled, the transfer is aborted.
    """
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(channel.send_tensors(outgoing, meta=meta, confirm=confirm))
    moved: tuple[int, int] | None = None
    moved_at = loop.time()
    try:
        while not sending.done():
            stats = channel.stats()
            now = stats.sent_bytes, stats.in_flight_chunks
            if now != moved:
                moved, moved_at = now, loop.time()
            elif loop.time() - moved_at >= silence_s:
                raise TransferTimeout(f"it took nothing for {silence_s:g} s")
            await asyncio.wait({sending}, timeout=silence_s / _TICKS)
        await sending
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
