"""When to try again."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from fedllm.config import check_seconds
from fedllm.errors import SettingError

__all__ = ["Backoff"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Pauses between attempts, each twice as long as the one before, but random, so that many silos that lost one
    server do not come back to it in step ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Times are seconds. What cannot work raises `SettingError`.
    """

    first_s: float = 0.5
    most_s: float = 30.0
    patience_s: float = 600.0
    """Pauses of so much in all are enough: the attempt after them is the last. `math.inf`: never."""
    jitter: Callable[[], float] = random.random
    """From 0 to 1: a pause is from half its length to all of it."""
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep

    def __post_init__(self) -> None:
        check_seconds("first_s", self.first_s)
        check_seconds("most_s", self.most_s)
        if self.patience_s != math.inf:
            check_seconds("patience_s", self.patience_s)
        if self.most_s < self.first_s:
            raise SettingError(
                f"most_s must be at least first_s ({self.first_s}), not {self.most_s}"
            )

    def pauses(self) -> Iterator[float]:
        """The pauses after one failure, and the next, until patience is at its end."""
        whole, left = self.first_s, self.patience_s
        while left > 0:
            pause = min(whole * (0.5 + 0.5 * self.jitter()), left)
            yield pause
            left -= pause
            whole = min(2 * whole, self.most_s)
