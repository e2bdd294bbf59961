"""Time on a channel: pings while something is open, and the idle timeout. Nothing runs on an idle channel, but a
heartbeat where one is wanted."""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from aiordma.errors import AiordmaError, PeerTimeout, again

_TICKS: Final = 8
"""How often an idle timeout is looked at, and the peer pinged, while it runs."""

_NOBODYS: Final = 0
"""The token of a heartbeat: nobody waits for its pong."""


class PulseOwner(Protocol):
    """What the pulse asks of its link."""

    @property
    def is_busy(self) -> bool:
        """Whether anything is open that could stall."""

    def send_ping(self, token: int) -> None:
        """Ask the peer for a sign of life."""

    def judge(self, now: float) -> None:
        """Fail what made no progress for too long."""

    def fail(self, error: PeerTimeout) -> None:
        """The peer said nothing for too long."""


class Pulse:
    """Measures the round trip, and notices a silent peer."""

    def __init__(
        self, owner: PulseOwner, idle_timeout_s: float, heartbeat_s: float | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._idle_s = idle_timeout_s
        self._heard_at = self._loop.time()
        self._tokens = 0
        self._pings: dict[int, tuple[float, asyncio.Future[float]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._heart: asyncio.TimerHandle | None = None
        if heartbeat_s is not None:
            self._heart = self._loop.call_later(heartbeat_s, self._beat, heartbeat_s)

    def now(self) -> float:
        """The loop's clock."""
        return self._loop.time()

    def heard(self) -> None:
        """The peer gave a sign of life."""
        self._heard_at = self._loop.time()

    def start(self) -> None:
        """Tick until the link is no longer busy."""
        if self._timer is None:
            self.heard()
            self._schedule()

    def stop(self, error: AiordmaError) -> None:
        """No more ticks; who waits for a pong gets the error."""
        for timer in (self._timer, self._heart):
            if timer is not None:
                timer.cancel()
        self._timer = self._heart = None
        pings, self._pings = self._pings, {}
        for _, future in pings.values():
            if not future.done():
                future.set_exception(again(error))

    async def ping(self) -> float:
        """Seconds for one round trip. Cancelling forgets the answer."""
        token, future = self._ping()
        try:
            return await future
        finally:
            self._pings.pop(token, None)

    def answered(self, token: int) -> float | None:
        """A pong came; its round trip in seconds, if we asked for it."""
        sent_at, future = self._pings.pop(token, (0.0, None))
        if future is None:
            return None
        rtt_s = time.perf_counter() - sent_at
        if not future.done():
            future.set_result(rtt_s)
        return rtt_s

    def _ping(self) -> tuple[int, asyncio.Future[float]]:
        self._tokens += 1
        future: asyncio.Future[float] = self._loop.create_future()
        # uvloop's own clock counts whole milliseconds.
        self._pings[self._tokens] = time.perf_counter(), future
        self._owner.send_ping(self._tokens)
        return self._tokens, future

    def _beat(self, every_s: float) -> None:
        self._heart = self._loop.call_later(every_s, self._beat, every_s)
        self._owner.send_ping(_NOBODYS)

    def _schedule(self) -> None:
        due = self._loop.time() + self._idle_s / _TICKS
        self._timer = self._loop.call_at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        self._timer = None
        if not self._owner.is_busy:
            return
        now = self._loop.time()
        # A loop that somebody blocked reads the peer's signs of life only after this callback: do not judge.
        if now - due < self._idle_s / _TICKS:
            if now - self._heard_at > self._idle_s:
                self._owner.fail(
                    PeerTimeout(
                        f"the peer said nothing for {now - self._heard_at:.1f} s while a transfer was open: "
                        "it hangs or is cut off; look there, or raise idle_timeout_s "
                        f"(now {self._idle_s:g})"
                    )
                )
                return
            self._owner.judge(now)
        if len(self._pings) < _TICKS:
            self._ping()[1].add_done_callback(_retrieve)
        if self._owner.is_busy:
            self._schedule()


def _retrieve(future: asyncio.Future[float]) -> None:
    if not future.cancelled():
        future.exception()
