"""The tries of one round: what silos did in them, and who is asked the next time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

from aiordma import ChannelError, PeerTimeout, RemoteProtocolError
from fedllm.participation import Outcome, Status

__all__ = ["Tries"]

MAX_FAULTS: Final = 2
"""A silo that fails so often in tries of one round is out for that round."""
MAX_BREAKS: Final = 2
"""One whose connection broke so often is asked only if there is no quorum without it."""
FIRST_PAUSE_S: Final = 0.5
"""Before a try that needs such a silo; it doubles with each break more."""
MOST_PAUSE_S: Final = 15.0


class Tries:
    """What became of each silo in the tries of one round so far::

        status                   error                              counts as
        REFUSED, FAILED, LATE    none of the connection's           a fault
                                 PeerTimeout (a stall),
                                 RemoteProtocolError                a fault
        any                      another ChannelError: it died      a break

    All else is nothing that a silo did.
    """

    def __init__(self, min_silos: int) -> None:
        self._min_silos = min_silos
        self._faults: Counter[str] = Counter()
        self._breaks: Counter[str] = Counter()

    @property
    def out(self) -> set[str]:
        """Who is asked no more."""
        return {name for name, count in self._faults.items() if count >= MAX_FAULTS}

    def note(self, outcomes: Mapping[str, Outcome]) -> None:
        """Count what became of the silos in a try."""
        for name, outcome in outcomes.items():
            if _has_died(outcome.error):
                self._breaks[name] += 1
            elif outcome.status in (Status.REFUSED, Status.FAILED, Status.LATE):
                self._faults[name] += 1

    def is_hopeless(self, there: Collection[str]) -> bool:
        """Whether the silos that are there, or may come back, can be no quorum."""
        return len(set(there) - self.out) < self._min_silos

    def left(self, there: Collection[str]) -> set[str]:
        """All that are not out."""
        return set(there) - self.out

    def patience_s(self, limit_s: float | None) -> float | None:
        """How long to wait for silos that are busy, before one that died each time is asked in their place; None: there
        is none."""
        pause_s = _pause_s(max(self._breaks.values(), default=0))
        return (pause_s if limit_s is None else min(pause_s, limit_s / 2)) or None

    def worth_asking(self, there: Collection[str]) -> set[str]:
        """All that are not out; if they are enough, without those that die each time."""
        left = self.left(there)
        steady = {name for name in left if self._breaks[name] < MAX_BREAKS}
        return steady if len(steady) >= self._min_silos else left

    def pause_s(self, there: Collection[str]) -> float:
        """How long to wait before a try with those that are there, or may come back: the others train in vain when
        one dies that they need."""
        return _pause_s(max((self._breaks[name] for name in self.worth_asking(there)), default=0))


def _pause_s(breaks: int) -> float:
    if breaks < MAX_BREAKS:
        return 0.0
    return min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(breaks - MAX_BREAKS, 64))


def _has_died(error: Exception | None) -> bool:
    return isinstance(error, ChannelError) and not isinstance(
        error, PeerTimeout | RemoteProtocolError
    )
