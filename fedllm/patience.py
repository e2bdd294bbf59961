"""A timeout of the time in which what is waited for could come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

__all__ = ["patience"]

TICKS: Final = 8
"""In which the time is counted."""


@contextlib.asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """As `asyncio.timeout`, by a clock that stands while somebody blocks the loop, or the process is stopped."""
    async with asyncio.timeout(None) as timeout:
        clock = _Clock(timeout, seconds / TICKS)
        try:
            yield timeout
        finally:
            clock.stop()


class _Clock:
    def __init__(self, timeout: asyncio.Timeout, tick_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._tick_s = tick_s
        self._left = TICKS
        self._schedule()

    def stop(self) -> None:
        self._timer.cancel()

    def _schedule(self) -> None:
        due = self._loop.time() + self._tick_s
        self._timer = self._loop.call_at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        # A loop that was blocked may read what came meanwhile only after this callback.
        self._left -= self._loop.time() - due < self._tick_s
        if self._left:
            self._schedule()
        else:
            self._timeout.reschedule(due)
